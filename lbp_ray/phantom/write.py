"""The whole tree of a cohort: DICOM, questionnaire, gradings, annotations, templates and truth."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from lbp_ray.phantom.anatomy import DISC_LEVELS
from lbp_ray.phantom.cohort import Exams, draw_exams
from lbp_ray.phantom.dicom import Identity, Written, write_exam
from lbp_ray.phantom.exam import ExamSpec, ExamTruth, Imaging, simulate_exam
from lbp_ray.phantom.histories import draw_questionnaire
from lbp_ray.phantom.tissue import T1, T2
from preprocess.commit import PARTIAL_PREFIX, content_id, write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from lbp_ray.phantom.config import PhantomConfig

PHANTOM_VERSION = 3
"""Raised by hand when the same configuration gives other bytes; a tree of another version is not taken for this one."""

_JUNK: tuple[tuple[str, bytes], ...] = (
    ("README.txt", b"Exported for the study. Ask the archive for missing exams.\n"),
    (".DS_Store", b"\0\0\0\1Bud1\0\0\x10\0\0\0\x08\0" + b"\0" * 240),
    ("Thumbs.db", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 504),
    ("empty.dcm", b""),
    ("desktop.ini", b"[.ShellClassInfo]\r\nIconIndex=0\r\n"),
    ("export.log", b"1 export started\n2 export finished\n"),
    ("index.xml", b"<?xml version='1.0'?><export/>\n"),
    ("IM000000.part", b"\0" * 128 + b"DIC"),
)


@dataclass(frozen=True)
class CohortSummary:
    """What was written: the folder, numbers of exams and files, and the Bayes AUC, expected and realised."""

    out: Path
    exams: int
    dicom_files: int
    expected_auc: float
    realised_auc: float


@dataclass(frozen=True)
class ExamJob:
    """One exam to simulate and write, in any process."""

    spec: ExamSpec
    imaging: Imaging
    identity: Identity
    file_seed: np.random.SeedSequence
    root: Path
    t1: bool
    localizer: bool
    flipped_share: float


def write_cohort(config: PhantomConfig, *, progress: bool = False) -> CohortSummary:
    """Write a synthetic cohort; does nothing if the same one is already there.

    Parameters
    ----------
    config
        What to write and where. ``config.workers`` changes how fast, never what.
    progress
        Show a progress bar on standard error.

    Returns
    -------
    CohortSummary
        Counts and the Bayes AUC.

    Raises
    ------
    FileExistsError
        If the folder exists and holds anything else.
    """
    identity = content_id([PHANTOM_VERSION, config.model_dump(mode="json", exclude={"out", "workers"})])
    if config.out.exists():
        return _existing(config.out, identity)
    partial = config.out.parent / f"{PARTIAL_PREFIX}{config.out.name}"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "dicom").mkdir(parents=True)
    record = _write(config, partial, progress=progress) | {"config_id": identity}
    (partial / "cohort.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    partial.rename(config.out)
    return _summary(config.out, record)


def _existing(out: Path, identity: str) -> CohortSummary:
    try:
        record = json.loads((out / "cohort.json").read_text())
    except FileNotFoundError:
        record = {}
    if record.get("config_id") != identity:
        msg = f"{out} exists and holds something other than this cohort; remove it or choose another out="
        raise FileExistsError(msg)
    return _summary(out, record)


def _summary(out: Path, record: dict[str, Any]) -> CohortSummary:
    auc = record["bayes_auc"]
    return CohortSummary(out, record["exams"], record["dicom_files"], auc["expected"], auc["realised"])


def _write(config: PhantomConfig, out: Path, *, progress: bool) -> dict[str, Any]:
    asked, chosen, junk = np.random.SeedSequence(config.seed, spawn_key=(1,)).spawn(3)
    exams, identities, jobs = plan_cohort(config, out / "dicom")
    results = _run(jobs, config.workers, progress=progress)
    generator = np.random.default_rng(asked)
    tables = draw_tables(config, exams, identities, generator)
    tables["truth"] = pd.concat([_keys(identities[: len(results)]), _truth_table(config, exams, results)], axis=1)
    write_tables(tables, out, generator)
    _write_choices(config, out, exams, results, np.random.default_rng(chosen))
    _write_junk(out / "dicom", config.tree.junk_files, np.random.default_rng(junk))
    return {
        "seed": config.seed,
        "config": config.model_dump(mode="json", exclude={"out", "workers"}),
        "exams": len(jobs),
        "patients": len(np.unique(exams.patient)),
        "studies": config.cohort.studies,
        "positives": config.cohort.positives,
        "dicom_files": sum(written.files for _, written in results),
        "bayes_auc": {"expected": round(exams.expected_auc, 6), "realised": round(exams.realised_auc, 6)},
        "strength": round(exams.strength, 6),
    }


def invent_identities(patient: np.ndarray, rows: int, rng: np.random.Generator) -> list[Identity]:
    """Invent one identity per questionnaire row: exams first, then people who were never imaged."""
    patients = np.concatenate([patient, patient.max() + 1 + np.arange(rows - len(patient))])
    people = int(patients.max()) + 1
    ids = rng.choice(9_000_000, people, replace=False) + 1_000_000
    accessions = rng.choice(90_000_000, rows, replace=False) + 10_000_000
    letters = np.array(list("ABCDEFGHJKLMNPQRSTUVWXYZ23456789"))
    codes = ["".join(letters[rng.integers(0, len(letters), 8)]) for _ in range(people)]
    sexes, ages = rng.choice(["F", "M"], people), rng.integers(45, 49, people)
    days = np.datetime64("2012-03-01") + rng.integers(0, 900, rows)
    identities = []
    for row, person in enumerate(patients.tolist()):
        clock = f"{rng.integers(7, 19):02d}{rng.integers(0, 50):02d}{rng.integers(0, 60):02d}"
        token, folder = rng.integers(0, 1 << 63, 2).tolist()
        identities.append(
            Identity(
                patient_id=f"P{ids[person]}",
                patient_name=f"SYN^{codes[person]}",
                accession=f"A{accessions[row]}",
                sex=str(sexes[person]),
                age_years=int(ages[person]),
                date=str(days[row]).replace("-", ""),
                time=clock,
                folder=f"{folder % 7:02x}/{folder:016x}"[:14],
                token=f"{token:016x}",
            )
        )
    assert len({identity.folder for identity in identities}) == rows
    return identities


def plan_cohort(config: PhantomConfig, root: Path) -> tuple[Exams, list[Identity], list[ExamJob]]:
    """Decide everything about a cohort but its pixels and answers.

    Parameters
    ----------
    config
        The cohort.
    root
        Where the DICOM tree will be.

    Returns
    -------
    tuple
        The exams (analysed ones first, then imaged excluded ones), one identity per questionnaire row (exams first),
        and one job per exam. Names, order, build, pose and noise come from streams that grades and labels never touch.
    """
    draw, names, seed = np.random.SeedSequence(config.seed, spawn_key=(0,)).spawn(3)
    exams = draw_exams(config.cohort, draw)
    rows = len(exams.patient) + sum(config.cohort.excluded.values()) - config.cohort.excluded_imaged
    identities = invent_identities(exams.patient, rows, np.random.default_rng(names))
    imaging = Imaging(
        **config.image.model_dump(exclude={"slices_min", "slices_max"}),
        slices=(config.image.slices_min, config.image.slices_max),
    )
    jobs = []
    for k, file_seed in enumerate(seed.spawn(len(exams.patient))):
        spec = ExamSpec(
            tuple(exams.pfirrmann[k].tolist()),
            tuple(exams.modic[k].tolist()),
            (config.seed, 101, int(exams.patient[k])),
            (config.seed, 102, k),
        )
        tree = config.tree
        jobs.append(ExamJob(spec, imaging, identities[k], file_seed, root, tree.t1, tree.localizer, tree.flipped_share))
    return exams, identities, jobs


def _run(jobs: list[ExamJob], workers: int | None, *, progress: bool) -> list[tuple[ExamTruth, Written]]:
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    bar: dict[str, Any] = {"total": len(jobs), "desc": "phantom", "unit": "exam", "disable": not progress}
    if workers == 1:
        return list(tqdm(map(run_job, jobs), **bar))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(tqdm(pool.map(run_job, jobs, chunksize=2), **bar))


def run_job(job: ExamJob) -> tuple[ExamTruth, Written]:
    """Simulate and write one exam, on one thread: how many there are changes the last bits of matrix products."""
    with threadpool_limits(1):
        exam = simulate_exam(job.spec, job.imaging, (T2, T1) if job.t1 else (T2,))
    written = write_exam(
        exam,
        job.identity,
        job.root,
        np.random.default_rng(job.file_seed),
        localizer=job.localizer,
        flipped_share=job.flipped_share,
    )
    return exam.truth, written


def draw_tables(
    config: PhantomConfig, exams: Exams, identities: list[Identity], rng: np.random.Generator
) -> dict[str, pd.DataFrame]:
    """Draw the questionnaire of everybody and the gradings of every exam.

    Parameters
    ----------
    config
        The cohort.
    exams, identities
        From `plan_cohort`.
    rng
        Random stream of answers and second readings; `write_tables` goes on with it.

    Returns
    -------
    dict
        ``questionnaire`` (one row per identity) and ``gradings`` (one row per exam and reader), in the order of exams.
    """
    outside = rng.permutation([name for name, count in sorted(config.cohort.excluded.items()) for _ in range(count)])
    groups = [("asymptomatic", "symptomatic")[label] for label in exams.label if label >= 0] + outside.tolist()
    asked = pd.concat([_keys(identities), draw_questionnaire(groups, rng)], axis=1)
    imaged = _keys(identities[: len(exams.patient)])
    gradings = [imaged.assign(reader=1, **_grade_columns(exams.pfirrmann, exams.modic))]
    if config.cohort.readers == 2:
        second = (
            np.where(exams.pfirrmann == 0, 0, _reread(exams.pfirrmann, (1, 5), rng)),
            _reread(exams.modic, (0, 3), rng),
        )
        gradings.append(imaged.assign(reader=2, **_grade_columns(*second)))
    return {"questionnaire": asked, "gradings": pd.concat(gradings)}


def write_tables(tables: dict[str, pd.DataFrame], out: Path, rng: np.random.Generator) -> None:
    """Write each table as a CSV of its name, its rows in random order."""
    for name, table in tables.items():
        table.iloc[rng.permutation(len(table))].to_csv(out / f"{name}.csv", index=False, float_format="%.6g")


def _keys(identities: list[Identity]) -> pd.DataFrame:
    return pd.DataFrame(
        {"PatientID": [i.patient_id for i in identities], "AccessionNumber": [i.accession for i in identities]}
    )


def _grade_columns(pfirrmann: np.ndarray, modic: np.ndarray) -> dict[str, np.ndarray]:
    columns = {f"pfirrmann_{level}": pfirrmann[:, k] for k, level in enumerate(DISC_LEVELS)}
    return columns | {f"modic_{level}": modic[:, k] for k, level in enumerate(DISC_LEVELS)}


def _reread(grades: np.ndarray, ends: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    change = rng.choice([-1, 0, 1], grades.shape, p=[0.08, 0.84, 0.08])
    return np.asarray(np.clip(grades + change, *ends))


def _truth_table(config: PhantomConfig, exams: Exams, results: list[tuple[ExamTruth, Written]]) -> pd.DataFrame:
    matrix = config.image.matrix
    rows = [
        {
            "SOPInstanceUID": written.uids[truth.mid_index],
            "mid_index": truth.mid_index,
            "mid_offset_mm": truth.mid_offset_mm,
            "acceptable_indices": ";".join(map(str, truth.acceptable_indices)),
            "num_slices": len(written.uids),
            "roi_row": truth.roi_row,
            "roi_column": matrix - 1 - truth.roi_column if written.flipped else truth.roi_column,
            "flipped_columns": int(written.flipped),
            "tilt_deg": truth.tilt_deg,
            "scale": truth.scale,
            "spacing_mm": config.image.fov_mm / matrix,
        }
        for truth, written in results
    ]
    table = pd.DataFrame(rows)
    table.insert(5, "label", pd.Series(exams.label).where(exams.label >= 0).astype("Int64"))
    table.insert(6, "probability", exams.probability)
    return table


def _write_choices(
    config: PhantomConfig, out: Path, exams: Exams, results: list[tuple[ExamTruth, Written]], rng: np.random.Generator
) -> None:
    """Write the annotated slices, the template slices and a pseudonym key.

    The key follows from the seed, so that a synthetic study gives the same splits and numbers wherever it is made. A
    key for patients must never be made like this.
    """
    analysed = np.flatnonzero(exams.label >= 0)
    outside = np.flatnonzero(exams.label < 0)
    annotated = rng.permutation(analysed)[: config.cohort.annotated or len(analysed)]
    if config.cohort.annotated is None:
        annotated = np.concatenate([annotated, outside])
    xml = _annotations([results[k] for k in annotated], config.image.matrix)
    ElementTree.indent(xml)
    (out / "annotations.xml").write_bytes(ElementTree.tostring(xml, encoding="utf-8", xml_declaration=True) + b"\n")
    nearest = outside[np.argsort([abs(results[k][0].mid_offset_mm) for k in outside])][: config.cohort.templates]
    uids = sorted(results[k][1].uids[results[k][0].mid_index] for k in nearest)
    pd.DataFrame({"SOPInstanceUID": uids}).to_csv(out / "templates.csv", index=False)
    write_atomic(out / "pseudonym.key", (rng.bytes(32).hex() + "\n").encode(), mode=0o600)


def _annotations(results: list[tuple[ExamTruth, Written]], matrix: int) -> ElementTree.Element:
    """CVAT 1.1 "for images": pixel edges are whole numbers, so the centre of the first pixel is at 0.5."""
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    labels = ElementTree.SubElement(ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task"), "labels")
    for level in DISC_LEVELS:
        ElementTree.SubElement(ElementTree.SubElement(labels, "label"), "name").text = level
    for number, (truth, written) in enumerate(results):
        name = f"{written.uids[truth.mid_index]}.png"
        size = {"width": str(matrix), "height": str(matrix)}
        image = ElementTree.SubElement(root, "image", {"id": str(number), "name": name, **size})
        for level, (left, top, right, bottom) in zip(DISC_LEVELS, truth.rectangles, strict=True):
            if written.flipped:
                left, right = matrix - right, matrix - left
            corners = zip(("xtl", "ytl", "xbr", "ybr"), (left, top, right, bottom), strict=True)
            box = {"label": level, "source": "manual", "occluded": "0"} | {
                key: f"{value:.2f}" for key, value in corners
            }
            ElementTree.SubElement(image, "box", box | {"z_order": "0"})
    return root


def _write_junk(root: Path, count: int, rng: np.random.Generator) -> None:
    folders = sorted(path for path in root.rglob("*") if path.is_dir())
    for k in range(count):
        name, data = _JUNK[k % len(_JUNK)]
        path = folders[int(rng.integers(len(folders)))] / name
        path.write_bytes(data)
