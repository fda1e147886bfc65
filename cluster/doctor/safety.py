"""Judges of who may reach the cluster, and of what is sent to it: the token, the proxy, the upload."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.doctor.findings import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.doctor.facts import Survey


def token_file(survey: Survey) -> Iterator[Finding]:
    """Find token files that others can read, or that are named and not there."""
    for node in survey.nodes:
        token = node.token
        if token.mode is None and token.is_named:
            yield Finding(
                "blocker",
                "token",
                (node.name,),
                f"{token.file}, which RAY_AUTH_TOKEN_PATH names, is not there",
                "the token lies on another machine's disk, or was removed with its job",
                "umask 077; ray get-auth-token --generate; then unset RAY_AUTH_TOKEN_PATH, or keep it in a shared home",
            )
        elif token.mode is not None and (token.mode & 0o077 or not token.is_mine):
            whose = "" if token.is_mine else " and belongs to somebody else"
            yield Finding(
                "blocker",
                "token",
                (node.name,),
                f"{token.file} has mode {token.mode:04o}{whose}, 0600 is required",
                "ray get-auth-token --generate obeys the umask; whoever reads the token can run code as you",
                f"chmod 600 {token.file}; if others could log in meanwhile, delete it and generate a new one",
            )


def authentication(survey: Survey) -> Iterator[Finding]:
    """Find a cluster that asks nobody for a token."""
    open_ = tuple(node.name for node in survey.nodes if not node.token.required)
    if survey.ask.mode == "ray" and open_:
        yield Finding(
            "warning",
            "authentication",
            open_,
            "Ray runs without token authentication",
            "everybody who reaches its ports can run code as you",
            "start it with make head, or with RAY_AUTH_MODE=token on every node and client; see docs/howto-ray-job.md",
        )


def upload(survey: Survey) -> Iterator[Finding]:
    """Find a working directory that the job server refuses."""
    if survey.upload and survey.upload.zipped_bytes > survey.upload.limit_bytes:
        largest = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in survey.upload.largest)
        yield Finding(
            "blocker",
            "upload",
            (),
            f"ray job submit --working-dir would send more than {survey.upload.limit_bytes >> 20} MiB (zipped) of "
            f"{survey.upload.folder}; the largest: {largest}",
            "data or results lie in the clone; Ray's job server answers 413",
            "move them to shared storage, or name them in .rayignore",
        )


def proxy(survey: Survey) -> Iterator[Finding]:
    """Find a proxy between the user and the cluster's own dashboard."""
    if survey.proxied:
        yield Finding(
            "warning",
            "proxy",
            (),
            f"{survey.proxied} is set and would take submissions to the dashboard out of the cluster",
            "Ray's job client goes through the proxy unless no_proxy names the host; the proxy sees the token, and the "
            "answer is 403 or 503 (python -m cluster job leaves the proxy out on the way to 127.0.0.1 alone)",
            "export no_proxy=localhost,127.0.0.1,$(hostname)",
        )


JUDGES = (token_file, authentication, upload, proxy)
