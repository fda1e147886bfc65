"""Acquisition parameters of each exam against those that the study wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from lbp_ray.result import ProtocolRow

if TYPE_CHECKING:
    from lbp_ray.study import ProtocolConfig

FINDINGS = ("study_id", "parameter", "wanted", "found", "finding")
"""Columns of the list of findings."""


def check_protocol(manifest: pd.DataFrame, protocol: ProtocolConfig) -> tuple[tuple[ProtocolRow, ...], pd.DataFrame]:
    """Compare every exam of a store with the protocol.

    Parameters
    ----------
    manifest
        Rows of `preprocess.store.read.SliceStore.manifest`, one series per exam.
    protocol
        Wanted values and the tolerance; a parameter without a wanted value is not checked.

    Returns
    -------
    rows, findings
        One row per checked parameter; and a table with the columns of `FINDINGS`: every exam and parameter that is
        ``out`` of protocol or ``unknown``, because the header does not say.
    """
    rows, findings = [], []
    for parameter, wanted in protocol.wanted.items():
        found = manifest[parameter]
        unknown = found.isna() | (found.astype(str) == "")
        if isinstance(wanted, float):
            out = (found.astype(float) - wanted).abs() > protocol.tolerance * wanted
        else:
            out = (found != wanted) & ~unknown
        for finding, which in (("out", out), ("unknown", unknown)):
            exams = manifest.loc[which, ["study_id"]]
            findings.append(
                exams.assign(parameter=parameter, wanted=_text(wanted), found=found[which].map(_text), finding=finding)
            )
        rows.append(
            ProtocolRow(
                parameter=parameter,
                wanted=_text(wanted),
                found=_range(found[~unknown]),
                num_out=int(out.sum()),
                num_unknown=int(unknown.sum()),
            )
        )
    table = pd.concat(findings) if findings else pd.DataFrame(columns=list(FINDINGS))
    return tuple(rows), table.sort_values(["study_id", "parameter"], ignore_index=True)


def _range(found: pd.Series[float]) -> str:
    """Lowest to highest number, or the names that occur."""
    values = sorted(found.unique())
    if not values:
        return "unknown"
    if isinstance(values[0], str):
        return ", ".join(values)
    return _text(values[0]) if len(values) == 1 else f"{_text(values[0])} to {_text(values[-1])}"


def _text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return "" if pd.isna(value) else f"{value:.6g}"
