"""Where the token may come from: a file of the user's own that nobody else can read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

MAKE_ONE = "umask 077; ray get-auth-token --generate > /dev/null; or copy the head's token there, mode 0600"


class TokenError(ValueError):
    """A token that must not be used; the message never holds it."""


def token_file(environment: Mapping[str, str]) -> Path:
    """Return the file that Ray's clients read the token from."""
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    return Path(named) if named else Path(environment.get("HOME", "~")).expanduser() / ".ray" / "auth_token"


def has_token(environment: Mapping[str, str]) -> bool:
    """Say whether there is a token, and refuse one that others can read.

    Parameters
    ----------
    environment
        Variables of the process.

    Raises
    ------
    TokenError
        If the token stands in the environment, its file is missing though required, can be read by others, belongs to
        somebody else or holds more than one word.
    """
    if environment.get("RAY_AUTH_TOKEN"):
        msg = (
            "RAY_AUTH_TOKEN is set, and every process started from here would inherit the token; write it to a file of "
            "mode 0600, name that by RAY_AUTH_TOKEN_PATH, and unset RAY_AUTH_TOKEN"
        )
        raise TokenError(msg)
    file = token_file(environment)
    if not file.is_file():
        if not environment.get("RAY_AUTH_TOKEN_PATH") and environment.get("RAY_AUTH_MODE") != "token":
            return False
        msg = f"a token is required, and its file {file} is not there: {MAKE_ONE}"
        raise TokenError(msg)
    _require_private(file)
    return True


def _require_private(file: Path) -> None:
    state = file.stat()
    if state.st_mode & 0o077 or state.st_uid != os.geteuid():
        whose = "" if state.st_uid == os.geteuid() else " and belongs to somebody else"
        msg = (
            f"the token's file {file} has mode {state.st_mode & 0o777:04o}{whose}, 0600 and your own is required: "
            f"whoever reads it can run code as you; chmod 600 {file}, or make a new token if others could log in"
        )
        raise TokenError(msg)
    if not re.fullmatch(rb"\s*[!-~]+\s*", file.read_bytes()):  # an HTTP client would quote it in its error
        msg = f"the token's file {file} must hold one word of ASCII characters and nothing else: {MAKE_ONE}"
        raise TokenError(msg)
