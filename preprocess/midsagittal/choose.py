"""The mid-sagittal slice of every study: found by templates, corrected by hand, checked on a contact sheet.

The choice is an artefact of its own beside the store, named by the hash of what it was made from: the sagittal T2
series of the store, templates, corrections and method. One task judges one part of the manifest and opens no other;
the driver holds a few columns of it and the choices, as Arrow tables.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from preprocess.commit import canonical_json, committed_directory, content_id
from preprocess.mapper import TaskFailure
from preprocess.midsagittal.contact_sheet import Card, choose_cards, draw_sheet, make_strip
from preprocess.midsagittal.corrections import read_corrections
from preprocess.midsagittal.match import METHOD_VERSION, MidsagittalError, Templates, find_midsagittal, make_templates
from preprocess.store.read import SliceStore
from preprocess.store.scan import partition_of, scan_manifest
from preprocess.store.schema import hash_contents
from preprocess.store.write import use_one_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    import pandas as pd

    from preprocess.mapper import Mapper

CONTRAST = "t2_sagittal"
"""Series that are judged, and that templates are slices of."""

ARTEFACT_VERSION = 2
"""Raised by hand when the artefact's files or columns change."""

FLAG_BELOW = {"confidence": 0.6, "margin": 0.02, "score": 0.3}
"""A study is flagged when a number lies below its threshold. On synthetic lumbar spines 95 % of exams have a margin
above 0.04 and all have a score above 0.55; T1 images have a margin of 0.004 (median), images turned by 90° a score of
0.19, noise one of 0.05. A confidence below 0.6 means that two in five templates name another slice."""

TEMPLATE, CORRECTION = "template", "correction"
"""Values of the column ``source``: who named the slice."""

_FOUND = pa.schema(
    [
        ("study_id", pa.string()),
        ("series_id", pa.string()),
        ("num_slices", pa.int64()),
        ("found_index", pa.int64()),
        ("score", pa.float64()),
        ("confidence", pa.float64()),
        ("margin", pa.float64()),
        ("template_id", pa.string()),
    ]
)
_SCHEMA = pa.schema(
    [
        ("study_id", pa.string()),
        ("series_id", pa.string()),
        ("slice_index", pa.int64()),
        ("found_index", pa.int64()),
        ("source", pa.string()),
        ("flagged", pa.bool_()),
        ("score", pa.float64()),
        ("confidence", pa.float64()),
        ("margin", pa.float64()),
        ("template_id", pa.string()),
    ]
)


# --- templates by name -----------------------------------------------------------------------------------------------


def read_template_list(path: Path) -> list[str]:
    """Read which slices are templates.

    Parameters
    ----------
    path
        CSV with a column ``SOPInstanceUID``, or with ``series_id`` and ``slice_index`` (pseudonym; from 0 at the
        patient's right).

    Returns
    -------
    list of str
        A UID, or ``<series_id>/<slice_index>``, for each row.

    Raises
    ------
    MidsagittalError
        If the file or its columns are missing, or a row is empty.
    """
    if not path.is_file():
        msg = f"template list not found: {path}"
        raise MidsagittalError(msg)
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    names = [_template_name(row) for row in rows]
    if not names or not all(names):
        lines = ", ".join(str(line) for line, name in enumerate(names, start=2) if not name)
        msg = (
            f"{path} must have at least one row, and in every row a SOPInstanceUID, or a series_id and a slice_index "
            f"(an integer from 0 on); faulty line(s): {lines or 'none, there is no row'}"
        )
        raise MidsagittalError(msg)
    return names


def _template_name(row: Mapping[str, str | None]) -> str:
    uid, series_id, index = ((row.get(name) or "").strip() for name in ("SOPInstanceUID", "series_id", "slice_index"))
    return uid or (f"{series_id}/{int(index)}" if series_id and index.isdecimal() else "")


def locate_templates(
    names: Sequence[str], locate: Callable[[Sequence[str]], list[tuple[str, int]]]
) -> list[tuple[str, int]]:
    """Turn template names into slices of the store.

    Parameters
    ----------
    names
        As `read_template_list` returns them, all UIDs or all pseudonyms.
    locate
        Finds SOP Instance UIDs, as `UidIndex.locate` does; not called for pseudonyms.

    Returns
    -------
    list
        (series_id, slice_index) in the order given.
    """
    if any("/" not in name for name in names):
        return locate(names)
    pairs = (name.rpartition("/") for name in names)
    return [(series_id, int(index)) for series_id, _, index in pairs]


# --- the choice ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Survey:
    """What the driver holds of the store: a few columns of its sagittal T2 series."""

    store_path: Path
    partitions: tuple[str, ...]
    table: Any
    """Arrow table: ``series_id``, ``study_id``, ``patient_id``, ``num_slices``."""
    content_hash: str
    """As `SliceStore.open` with this contrast says it."""

    @classmethod
    def of(cls, store_path: Path) -> _Survey:
        columns = ["series_id", "study_id", "patient_id", "num_slices", "content_hash"]
        parts = dict(scan_manifest(store_path, columns, contrast=CONTRAST))
        if not parts:
            SliceStore.open(store_path, contrast=CONTRAST)  # refuses, and says what is missing
        table = pa.concat_tables(parts.values())
        return cls(store_path, tuple(parts), table.drop_columns(["content_hash"]), hash_contents(table))

    def rows(self, column: str, values: Sequence[str]) -> list[dict[str, Any]]:
        """Rows whose column has one of the values."""
        found = self.table.filter(pc.field(column).isin(pa.array(values, pa.string())))
        return list(found.to_pylist())

    def num_slices(self, study_ids: Sequence[str]) -> dict[str, int]:
        return {row["study_id"]: row["num_slices"] for row in self.rows("study_id", study_ids)}

    def template_rows(self, slices: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
        """Check template slices; returns id, slice and owner of each, sorted by id, none twice."""
        held = {row["series_id"]: row for row in self.rows("series_id", [series_id for series_id, _ in slices])}
        faults = [
            f"line {line}: no slice {index} of a sagittal T2 series in the store"
            for line, (series_id, index) in enumerate(slices, start=2)
            if series_id not in held or not 0 <= index < held[series_id]["num_slices"]
        ]
        if faults:
            msg = f"templates: {'; '.join(faults)}; `python -m preprocess inspect` and the manifest list the series"
            raise MidsagittalError(msg)
        rows = [
            {**held[series_id], "template_id": f"{series_id}/{index}", "slice": index}
            for series_id, index in set(slices)
        ]
        return sorted(rows, key=lambda row: str(row["template_id"]))

    def load_templates(self, rows: Sequence[dict[str, Any]]) -> Templates:
        slices = []
        for row in rows:
            store = self.open_part(partition_of(row["study_id"], self.partitions))
            record = store.record(row["series_id"])
            spacing_mm = (record.spacing_row_mm, record.spacing_column_mm)
            image_HW = store.read(row["series_id"])[row["slice"]]
            slices.append((row["template_id"], row["patient_id"], image_HW, spacing_mm))
        return make_templates(slices)

    def open_part(self, partition: str) -> SliceStore:
        return SliceStore.open(self.store_path, partition=partition, contrast=CONTRAST)


def choose_for_store(
    store_path: Path,
    parent: Path,
    slices: Sequence[tuple[str, int]],
    mapper: Mapper,
    corrections: Path | None = None,
) -> Path:
    """Choose the mid-sagittal slice of every study of a store and commit the choice as an artefact.

    Parameters
    ----------
    store_path
        A complete store.
    parent
        Folder of the artefacts of this store.
    slices
        (series_id, slice_index) of the templates.
    mapper
        Where tasks run.
    corrections
        CSV of ``study_id,slice_index`` that overrules the templates; None corrects nothing.

    Returns
    -------
    pathlib.Path
        Folder with ``midsagittal.parquet``, ``templates.npz``, ``meta.json``, ``contact_sheet.html`` (and further
        pages) and ``contact_sheet.png``; the one that exists, if it does.

    Raises
    ------
    MidsagittalError
        If templates or corrections do not fit the store; all faulty rows are named at once.
    """
    survey = _Survey.of(store_path)
    template_rows = survey.template_rows(slices)
    corrected: dict[str, int] = {}
    if corrections is not None:
        given = read_corrections(corrections)
        corrected = given.resolve(survey.num_slices(sorted(given.study_ids)))
    inputs = _inputs(survey.content_hash, template_rows, corrected)
    final = parent / content_id(inputs)[:16]
    if final.is_dir():
        return final
    templates = survey.load_templates(template_rows)
    found = _find_all(survey, templates, mapper)
    choices = _judge(found, corrected)
    cards = choose_cards(choices.append_column("num_slices", found["num_slices"]))
    strips = _draw_strips(survey, cards, mapper)
    meta = _meta(inputs, template_rows, choices)
    with committed_directory(final, point="midsagittal") as folder:
        pq.write_table(choices, folder / "midsagittal.parquet")
        templates.save(folder / "templates.npz")
        (folder / "meta.json").write_text(canonical_json(meta))
        for name, content in draw_sheet(cards, strips, {**meta, "artefact_id": final.name}).items():
            (folder / name).write_bytes(content)
    return final


def _inputs(store: str, template_rows: Sequence[dict[str, Any]], corrected: Mapping[str, int]) -> dict[str, Any]:
    """Everything that the artefact is made from."""
    return {
        "store": store,
        "templates": [row["template_id"] for row in template_rows],
        "corrections": sorted(corrected.items()),
        "thresholds": FLAG_BELOW,
        "method": METHOD_VERSION,
        "artefact": ARTEFACT_VERSION,
    }


def _meta(inputs: dict[str, Any], template_rows: Sequence[dict[str, Any]], choices: Any) -> dict[str, Any]:  # noqa: ANN401
    corrected = choices.filter(pc.field("source") == CORRECTION)
    return {
        **inputs,
        "templates": [{name: row[name] for name in ("template_id", "study_id", "patient_id")} for row in template_rows],
        "corrections": corrected.num_rows,
        "corrections_that_moved": int(
            (corrected["slice_index"].to_numpy() != corrected["found_index"].to_numpy()).sum()
        ),
        "studies": choices.num_rows,
        "flagged": int(pc.sum(choices["flagged"]).as_py() or 0),
    }


def _find_all(survey: _Survey, templates: Templates, mapper: Mapper) -> Any:  # noqa: ANN401  (pyarrow has no types)
    """Judge every series; Arrow table of `_FOUND`, sorted by series."""
    items = ((f"midsagittal-{name}", name) for name in survey.partitions)
    results = mapper(
        partial(_find_part, survey.store_path, templates),
        items,
        title="mid-sagittal",
        total=len(survey.partitions),
        unit="part",
    )
    tables = [_FOUND.empty_table(), *_finished(results, "the mid-sagittal choice")]
    return pa.concat_tables(tables).sort_by("series_id")


def _finished(results: Iterator[tuple[Any, Any]], what: str) -> Iterator[Any]:
    for _, result in results:
        if isinstance(result, TaskFailure):
            msg = f"{what} failed: a task died on every attempt; check memory and disk, then run the command again"
            raise MidsagittalError(msg)
        yield result


def _find_part(store_path: Path, templates: Templates, partition: str) -> Any:  # noqa: ANN401  (pyarrow has no types)
    """Judge the series of one part of the manifest: Arrow table of `_FOUND`."""
    use_one_thread()
    store = SliceStore.open(store_path, partition=partition, contrast=CONTRAST)
    rows = []
    for series_id in store.manifest["series_id"].tolist():
        record = store.record(series_id)
        spacing_mm = (record.spacing_row_mm, record.spacing_column_mm)
        choice = find_midsagittal(store.read(series_id), spacing_mm, templates.without_patient(record.patient_id))
        values = {name: getattr(choice, name) for name in ("score", "confidence", "margin", "template_id")}
        ids = {"study_id": record.study_id, "series_id": series_id, "num_slices": record.num_slices}
        rows.append({**ids, "found_index": choice.slice_index, **values})
    return pa.Table.from_pylist(rows, _FOUND)


def _judge(found: Any, corrected: Mapping[str, int]) -> Any:  # noqa: ANN401  (pyarrow has no types)
    """Apply corrections and flags: Arrow table of `_SCHEMA`. A corrected study has been looked at: it bears no flag."""
    place = pc.index_in(found["study_id"], pa.array(list(corrected), pa.string()))
    is_corrected = pc.is_valid(place)
    by_hand = pc.take(pa.array(list(corrected.values()), pa.int64()), place)
    low = [pc.less(found[name], limit) for name, limit in FLAG_BELOW.items()]
    columns = {
        "slice_index": pc.coalesce(by_hand, found["found_index"]),
        "source": pc.if_else(is_corrected, CORRECTION, TEMPLATE),
        "flagged": pc.and_not(pc.or_(pc.or_(*low[:2]), low[2]), is_corrected),
    }
    every = {**{name: found[name] for name in found.column_names}, **columns}
    return pa.table([every[name] for name in _SCHEMA.names], schema=_SCHEMA)


def _draw_strips(survey: _Survey, cards: Sequence[Card], mapper: Mapper) -> dict[str, np.ndarray]:
    """Cut the pictures of the sheet, (series → strip), one task per part that is shown."""
    parts: dict[str, list[tuple[str, int]]] = {}
    for card in cards:
        part = parts.setdefault(partition_of(card.study_id, survey.partitions), [])
        part.append((card.series_id, card.slice_index))
    items = ((f"contact-sheet-{name}", (name, tuple(wanted))) for name, wanted in sorted(parts.items()))
    results = mapper(
        partial(_draw_part, survey.store_path), items, title="contact sheet", total=len(parts), unit="part"
    )
    strips: dict[str, np.ndarray] = {}
    for drawn in _finished(results, "drawing the contact sheet"):
        strips |= drawn
    return strips


def _draw_part(store_path: Path, item: tuple[str, tuple[tuple[str, int], ...]]) -> dict[str, np.ndarray]:
    use_one_thread()
    partition, wanted = item
    store = SliceStore.open(store_path, partition=partition, contrast=CONTRAST)
    strips = {}
    for series_id, index in wanted:
        record = store.record(series_id)
        strips[series_id] = make_strip(store.read(series_id), index, (record.spacing_row_mm, record.spacing_column_mm))
    return strips


def load_midsagittal(path: Path) -> pd.DataFrame:
    """Read the choices of an artefact.

    Parameters
    ----------
    path
        The artefact's folder.

    Returns
    -------
    pandas.DataFrame
        Sorted by series: ``study_id``, ``series_id``, ``slice_index`` (what to use), ``found_index`` (what the
        templates say), ``source`` (``template`` or ``correction``), ``flagged``, and the found slice's ``score``,
        ``confidence``, ``margin`` and ``template_id``.

    Raises
    ------
    MidsagittalError
        If the folder holds none.
    """
    table = path / "midsagittal.parquet"
    if not table.is_file():
        msg = f"no mid-sagittal artefact in {path}; run `python -m preprocess` with --templates"
        raise MidsagittalError(msg)
    frame: pd.DataFrame = pq.read_table(table).to_pandas()
    return frame
