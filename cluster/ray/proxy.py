"""Whether a proxy stands between a job's client and the cluster: whoever runs it would read the token."""

from __future__ import annotations

import ipaddress
import os
import urllib.request
from typing import NamedTuple
from urllib.parse import urlsplit

HERE = "http://127.0.0.1:8265"
"""Job server that Ray's client takes where no variable names one."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names of this machine itself, which no proxy can reach for it."""


class Proxy(NamedTuple):
    """A proxy that takes the requests of a job's client."""

    variable: str
    """Environment variable that names it."""
    host: str
    """Host of the job server, which ``no_proxy`` would have to name."""


def proxy_of_job_server() -> Proxy | None:
    """Return the proxy between this process and the job server that it would talk to; None without one."""
    scheme, host = _job_server()
    if scheme not in urllib.request.getproxies() or urllib.request.proxy_bypass(host):
        return None
    return Proxy(f"{scheme}_proxy", host)


def spare_loopback() -> None:
    """Keep this process's requests to its own machine away from proxies, for good."""
    spared = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if spared == "*":  # which stands for all hosts only while it is alone
        return
    _, host = _job_server()
    names = dict.fromkeys([*filter(None, spared.split(",")), *LOOPBACK, *([host] if _is_loopback(host) else [])])
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(names)


def _job_server() -> tuple[str, str]:
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or HERE
    parts = urlsplit(address if "://" in address else f"http://{address}")
    return "https" if parts.scheme == "https" else "http", parts.hostname or "127.0.0.1"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
