"""Find every fault of a slice store: a flipped bit, a missing shard, a series that was never committed."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from typing import TYPE_CHECKING

from preprocess.mapper import Mapper, TaskFailure, map_here
from preprocess.store.read import Finding, SliceStore, manifest_partitions, read_manifest, structural_findings
from preprocess.store.schema import COMMIT_NAME, IncompleteStoreError, fan_out, root_attributes, series_path

if TYPE_CHECKING:
    from pathlib import Path


def verify_store(path: Path, mapper: Mapper = map_here) -> list[Finding]:
    """Check everything: completeness as `SliceStore.open` does, then every pixel, attribute and commit file.

    Parameters
    ----------
    path
        The store.
    mapper
        Where the parts are read.

    Returns
    -------
    list of Finding
        Empty for a sound store.
    """
    length = int(root_attributes(path)["part_characters"])
    parts = sorted({folder.name[:length] for folder in fan_out(path)} | set(manifest_partitions(path)))
    items = ((f"verify-{part}", part) for part in parts)
    findings: list[Finding] = []
    for part, found in mapper(partial(_verify_part, path), items, title="verify", total=len(parts), unit="part"):
        findings += [Finding(f"part {part}", "corrupted")] if isinstance(found, TaskFailure) else found
    return sorted(findings, key=lambda finding: (finding.series_id, finding.fault))


def _verify_part(path: Path, part: str) -> list[Finding]:
    manifest = read_manifest(path, part)
    findings = list(structural_findings(path, manifest, part))
    faulty = {finding.series_id for finding in findings}
    store = SliceStore(path, manifest)
    for study_id, series_id in zip(manifest["study_id"], manifest["series_id"], strict=True):
        if series_id not in faulty and not _is_sound(store, study_id, series_id):
            findings.append(Finding(series_id, "corrupted"))
    return findings


def _is_sound(store: SliceStore, study_id: str, series_id: str) -> bool:
    folder = series_path(store.path, study_id, series_id)
    try:
        store.read(series_id)
        commit = json.loads((folder / COMMIT_NAME).read_bytes())
        array_sha256 = hashlib.sha256((folder / "zarr.json").read_bytes()).hexdigest()
    except (IncompleteStoreError, OSError, ValueError):
        return False
    row = store.manifest.set_index("series_id").loc[series_id]
    return bool(commit["array_sha256"] == array_sha256 and commit["row"]["content_hash"] == row["content_hash"])
