"""Keyed pseudonyms, and the typed allow-list of what may leave the DICOM header.

A pseudonym is an HMAC-SHA256 of an identifier under a secret key, with its own domain for patients, studies, series
and sources, cut to 128 bits and written in lower-case base32. It needs no table and no order, so any worker computes
the same one; without the key it cannot be enumerated from guessed identifiers, as a plain hash could. No text of the
header passes: numbers are range-checked, enumerations are closed, everything else stays behind.

References
----------
DICOM PS3.15, Annex E (attribute confidentiality profiles): mirrored here, although a slice store is not DICOM.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import stat
import unicodedata
import uuid
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np

from preprocess.commit import PARTIAL_PREFIX, canonical_json, fsync_path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from preprocess.headers.index import FileRow

KEY_BYTES = 32
"""Length of a generated key; shorter key files are refused."""

PSEUDONYM_BYTES = 16
"""128 bits of the HMAC: collisions are out of reach for any number of exams."""

MAX_DATE_SHIFT_DAYS = 3650
"""Longest shift of a patient's dates, where dates are shifted rather than dropped."""

MANUFACTURERS = ("ge", "siemens", "philips", "toshiba", "canon", "hitachi", "fujifilm", "esaote", "uih", "bruker")
"""Closed list that Manufacturer is matched against (lower case, at its start); anything else becomes ``other``."""

NUMBER_RANGES = {
    "echo_time_ms": (0.1, 2_000.0),
    "repetition_time_ms": (1.0, 60_000.0),
    "inversion_time_ms": (0.0, 20_000.0),
    "echo_train_length": (0.0, 1_024.0),
    "flip_angle_deg": (0.0, 360.0),
    "field_strength_t": (0.01, 30.0),
    "slice_thickness_mm": (0.05, 100.0),
    "averages": (0.1, 100.0),
    "bandwidth_hz": (0.1, 100_000.0),
}
"""Numbers that may pass, and the range outside which a value is dropped as malformed."""

ENUMS = {
    "scanning_sequence": frozenset({"SE", "IR", "GR", "EP", "RM"}),
    "sequence_variant": frozenset({"SK", "MTC", "SS", "TRSS", "SP", "MP", "OSP", "NONE"}),
    "acquisition_type": frozenset({"2D", "3D"}),
    "patient_position": frozenset({"HFP", "HFS", "HFDR", "HFDL", "FFDR", "FFDL", "FFP", "FFS"}),
}
"""Enumerations that may pass, with every value they may take."""


class KeyFileError(ValueError):
    """A pseudonym key that cannot be used."""


class Pseudonymiser:
    """Identifiers → pseudonyms under one key.

    Parameters
    ----------
    key
        Secret bytes, at least `KEY_BYTES` long.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) < KEY_BYTES:
            msg = f"the key has {len(key)} bytes, at least {KEY_BYTES} are required; let the first run create one"
            raise KeyFileError(msg)
        self._key = key

    @property
    def key_id(self) -> str:
        """Public name of the key (40 bits), by which a store refuses another key."""
        return self._mac("key")[:8]

    def patient(self, issuer: str, patient_id: str) -> str:
        """Pseudonym of a patient; spelling variants of the id (case, spaces, Unicode form) agree."""
        return self._mac("patient", normalise(issuer), normalise(patient_id))

    def study(self, study_uid: str) -> str:
        """Pseudonym of an exam, from its Study Instance UID."""
        return self._mac("study", study_uid)

    def series(self, study_uid: str, series_uid: str, stack_key: str) -> str:
        """Pseudonym of one stack of a series: a series UID alone may be shared by several."""
        return self._mac("series", study_uid, series_uid, stack_key)

    def source(self, sop_uids: Sequence[str]) -> str:
        """Name of a set of objects: changes when a stack gains or loses one."""
        return self._mac("source", *sorted(sop_uids))

    def shifted_date(self, issuer: str, patient_id: str, date: str) -> str:
        """Move a date back by the patient's own offset of 1 to `MAX_DATE_SHIFT_DAYS` days; intervals are kept.

        Parameters
        ----------
        issuer, patient_id
            The patient.
        date
            DICOM date, ``YYYYMMDD``.

        Returns
        -------
        str
            ISO date, or empty if `date` is none.
        """
        offset = int.from_bytes(
            base64.b32decode(self._mac("date", normalise(issuer), normalise(patient_id))[:8].upper())
        )
        try:
            day = datetime.strptime(date.strip(), "%Y%m%d").date()
            return (day - timedelta(days=1 + offset % MAX_DATE_SHIFT_DAYS)).isoformat()
        except (ValueError, OverflowError):
            return ""

    def _mac(self, domain: str, *parts: str) -> str:
        # Canonical JSON of the parts is unambiguous where a joined string would not be.
        message = f"{domain}|{canonical_json(list(parts))}".encode()
        digest = hmac.new(self._key, message, hashlib.sha256).digest()[:PSEUDONYM_BYTES]
        return base64.b32encode(digest).decode().rstrip("=").lower()


def normalise(identifier: str) -> str:
    """Bring spelling variants of one identifier together: Unicode NFKC, no outer or repeated spaces, upper case."""
    return " ".join(unicodedata.normalize("NFKC", identifier).split()).upper()


def load_key(path: Path, *, create: bool) -> bytes:
    """Read a key file, or make one.

    Parameters
    ----------
    path
        Hexadecimal text. Must be readable by its owner only.
    create
        Make it when it is missing. Two jobs that both try end up with one key.

    Raises
    ------
    KeyFileError
        If the file is missing, readable by others, or no key.
    """
    if create and not path.exists():
        _create_key(path)
    try:
        mode = path.stat().st_mode
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        msg = f"pseudonym key {path} cannot be read ({type(error).__name__}); name it with --key-file"
        raise KeyFileError(msg) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        msg = f"pseudonym key {path} is open to others (mode {stat.S_IMODE(mode):o}): run chmod 600 on it"
        raise KeyFileError(msg)
    try:
        key = bytes.fromhex(text)
    except ValueError:
        msg = f"pseudonym key {path} must be hexadecimal text; restore the file that the first run created"
        raise KeyFileError(msg) from None
    if len(key) < KEY_BYTES:
        msg = (
            f"pseudonym key {path} has {len(key)} bytes, at least {KEY_BYTES} are required; restore the file that the "
            "first run created, or leave --key-file out for a new store"
        )
        raise KeyFileError(msg)
    return key


def _create_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.parent / f"{PARTIAL_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}"
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(KEY_BYTES) + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(partial, path)  # unlike rename, never replaces a key that another job made meanwhile
    except FileExistsError:
        pass
    finally:
        partial.unlink()
    fsync_path(path.parent)


def allowed_attributes(rows: Sequence[FileRow]) -> dict[str, float | int | str | bool | None]:
    """Reduce the headers of a stack to the acquisition facts that may enter a store.

    Parameters
    ----------
    rows
        Headers of the stack's slices.

    Returns
    -------
    dict
        The numbers of `NUMBER_RANGES` (median over the stack; None when absent or out of range), the enumerations of
        `ENUMS` (values joined by ``+``; unknown ones dropped), ``manufacturer`` from `MANUFACTURERS` and ``lossy``.
    """
    attributes: dict[str, float | int | str | bool | None] = {}
    for name, (low, high) in NUMBER_RANGES.items():
        values = [value for row in rows if (value := getattr(row, name)) is not None and low <= value <= high]
        attributes[name] = float(np.median(values)) if values else None
    for name, allowed in ENUMS.items():
        found = {part for row in rows for part in _parts(getattr(row, name)) if part in allowed}
        attributes[name] = "+".join(sorted(found))
    maker = min(row.manufacturer for row in rows).lower().strip()
    attributes["manufacturer"] = next((name for name in MANUFACTURERS if maker.startswith(name)), "other")
    attributes["lossy"] = any(row.lossy == "01" for row in rows)
    return attributes


def _parts(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value.upper(),) if isinstance(value, str) else value
