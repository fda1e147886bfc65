from dataclasses import replace

import numpy as np
import pytest
from dicom_factory import AXIAL, SAGITTAL, make_dataset, make_series, save

from preprocess.headers.index import FileRow, index_files, walk
from preprocess.select import CONTRASTS, OverrideError, Policy, choose, read_overrides, select
from preprocess.stacks import make_stacks

T2_ROW = {
    "study_uid": "1.2",
    "series_uid": "1.2.3",
    "patient_id": "P1",
    "modality": "MR",
    "photometric": "MONOCHROME2",
    "image_type": ("ORIGINAL", "PRIMARY"),
    "scanning_sequence": ("SE",),
    "rows": 256.0,
    "columns": 256.0,
    "echo_time_ms": 112.7,
    "repetition_time_ms": 3500.0,
    "orientation": SAGITTAL,
    "spacing_mm": (1.0, 1.0),
}


def rows_of(count=11, **changes):
    fields = {**T2_ROW, **changes}
    prefix = f"{fields['series_uid']}.{fields['echo_time_ms']}"
    return [
        FileRow(f"{prefix}/{i}", 1, sop_uid=f"{prefix}.{i}", position_mm=(4.0 * i, 0.0, 0.0), **fields)
        for i in range(count)
    ]


def codes(*series):
    selection = select([row for rows in series for row in rows])
    verdicts = [verdict for exam in selection.exams for verdict in exam.verdicts]
    return [verdict.code for verdict in verdicts] + sorted({code for _, code in selection.settled})


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        pytest.param({}, "", id="t2"),
        pytest.param({"scanning_sequence": ("SE", "SK")}, "", id="ge-fse"),
        pytest.param({"scanning_sequence": ("RM",)}, "", id="ge-research-mode"),
        pytest.param({"echo_time_ms": 12.0, "repetition_time_ms": 600.0}, "t1_weighted", id="t1"),
        pytest.param({"echo_time_ms": 30.0, "repetition_time_ms": 3000.0}, "proton_density", id="pd"),
        pytest.param({"echo_time_ms": 60.0}, "unknown_contrast", id="between"),
        pytest.param({"echo_time_ms": None}, "unknown_contrast", id="no-physics"),
        pytest.param({"echo_time_ms": None, "series_description": "T2 sag"}, "", id="description"),
        pytest.param({"echo_time_ms": None, "series_description": "T2* sag"}, "unknown_contrast", id="t2-star"),
        pytest.param({"image_type": ("DERIVED", "SECONDARY")}, "derived", id="derived"),
        pytest.param(
            {"image_type": ("DERIVED", "PRIMARY", "M"), "transfer_syntax": "1.2.840.10008.1.2.4.90"},
            "",
            id="recompressed",
        ),
        pytest.param(
            {"image_type": ("DERIVED", "PRIMARY", "MPR"), "transfer_syntax": "1.2.840.10008.1.2.4.90"},
            "derived",
            id="recompressed-reformat",
        ),
        pytest.param({"image_type": ("ORIGINAL", "PRIMARY", "LOCALIZER")}, "localizer", id="localizer"),
        pytest.param({"series_description": "3-plane loc"}, "localizer", id="localizer-by-name"),
        pytest.param({"series_description": "lumbar T2 local coil"}, "", id="local-coil-is-no-localizer"),
        pytest.param({"image_type": ("ORIGINAL", "PRIMARY", "P")}, "not_magnitude", id="phase"),
        pytest.param({"image_type": ("ORIGINAL", "PRIMARY", "M", "MOSAIC")}, "mosaic", id="mosaic"),
        pytest.param({"b_value": 500.0}, "diffusion", id="diffusion"),
        pytest.param({"orientation": AXIAL}, "not_sagittal", id="axial"),
        pytest.param({"scanning_sequence": ("EP", "SE")}, "echo_planar", id="epi"),
        pytest.param({"scanning_sequence": ("GR",)}, "gradient_echo", id="gre"),
        pytest.param({"scanning_sequence": ("SE", "IR")}, "inversion_recovery", id="ir"),
        pytest.param({"inversion_time_ms": 160.0}, "inversion_recovery", id="stir-by-time"),
        pytest.param({"series_description": "Sag STIR"}, "inversion_recovery", id="stir-by-name"),
        pytest.param({"scan_options": ("FS",)}, "fat_suppressed", id="fatsat"),
        pytest.param({"series_description": "T2_FS_sag"}, "fat_suppressed", id="fatsat-by-name"),
        pytest.param({"acquisition_type": "3D"}, "acquisition_3d", id="3d"),
        pytest.param({"body_part": "CSPINE"}, "body_part", id="neck"),
        pytest.param({"body_part": "LSPINE"}, "", id="lumbar"),
        pytest.param({"orientation": (0.1, 0.99, 0.0, 0.0, 0.0, -1.0)}, "", id="angled"),
        pytest.param({"orientation": ()}, "no_geometry", id="no-orientation"),
        pytest.param({"orientation": (0.0, 1.0, 0.0, 0.0, 1.0, 0.0)}, "no_geometry", id="degenerate"),
        pytest.param({"spacing_mm": ()}, "no_geometry", id="no-spacing"),
    ],
)
def test_one_series(changes, code):
    assert codes(rows_of(**changes)) == [code]


ALL = Policy(contrasts=CONTRASTS, stir="fat_suppressed")
T1_TIMES = {"echo_time_ms": 12.0, "repetition_time_ms": 600.0}


@pytest.mark.parametrize(
    ("changes", "contrast"),
    [
        pytest.param({}, "t2_sagittal", id="t2"),
        pytest.param(T1_TIMES, "t1_sagittal", id="t1"),
        pytest.param({"echo_time_ms": None, "series_description": "sag T1"}, "t1_sagittal", id="t1-by-name"),
        pytest.param(
            {"echo_time_ms": 10.0, "repetition_time_ms": 2200.0, "inversion_time_ms": 860.0},
            "t1_sagittal",
            id="t1-flair",
        ),
        pytest.param({"scan_options": ("FS",)}, "t2_fatsat_sagittal", id="fat-sat"),
        pytest.param({"inversion_time_ms": 160.0}, "t2_fatsat_sagittal", id="stir"),
        pytest.param({"image_type": ("DERIVED", "PRIMARY", "DIXON", "WATER")}, "t2_fatsat_sagittal", id="water"),
        pytest.param({"image_type": ("DERIVED", "PRIMARY", "DIXON", "IN_PHASE")}, "t2_sagittal", id="in-phase"),
    ],
)
def test_each_contrast_is_found(changes, contrast):
    (verdict,) = select(rows_of(**changes), ALL).exams[0].selected
    assert verdict.contrast == contrast


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        pytest.param({"image_type": ("DERIVED", "PRIMARY", "DIXON", "FAT")}, "dixon", id="fat"),
        pytest.param({"image_type": ("DERIVED", "PRIMARY", "DIXON", "OPP_PHASE")}, "dixon", id="opposed"),
        pytest.param({**T1_TIMES, "scan_options": ("FS",)}, "fat_suppressed", id="fat-suppressed-t1"),
        pytest.param({"inversion_time_ms": 2500.0, "scanning_sequence": ("IR",)}, "inversion_recovery", id="flair"),
    ],
)
def test_what_is_no_contrast_of_ours(changes, code):
    (exam,) = select(rows_of(**changes), ALL).exams
    assert [verdict.code for verdict in exam.verdicts] == [code]


def test_one_stack_of_each_wanted_contrast_is_taken():
    rows = [
        *rows_of(series_uid="1.1"),
        *rows_of(series_uid="1.2", **T1_TIMES),
        *rows_of(series_uid="1.3", scan_options=("FS",)),
        *rows_of(series_uid="1.4", count=7),
    ]
    (exam,) = select(rows, ALL).exams
    assert [(verdict.code, verdict.contrast) for verdict in exam.verdicts] == [
        ("", "t2_sagittal"),
        ("", "t1_sagittal"),
        ("", "t2_fatsat_sagittal"),
        ("not_best", "t2_sagittal"),
    ]
    (exam,) = select(rows, Policy(contrasts=("t1_sagittal",))).exams
    assert [verdict.code for verdict in exam.verdicts] == ["t2_weighted", "", "fat_suppressed", "t2_weighted"]


def test_fat_suppressed_stands_in_only_where_it_may_and_must():
    suppressed = rows_of(series_uid="1.3", scan_options=("FS",))
    fallback = Policy(fat_suppressed="fallback")
    assert select(suppressed).exams[0].selected == ()
    (verdict,) = select(suppressed, fallback).exams[0].selected
    assert (verdict.contrast, verdict.confidence, verdict.evidence[-1]) == ("t2_sagittal", "flagged", "fat_suppressed")
    (verdict,) = select([*suppressed, *rows_of(series_uid="1.1")], fallback).exams[0].selected
    assert verdict.stack.series_uid == "1.1"


@pytest.mark.parametrize("by_name", [False, True], ids=["uid", "pseudonym"])
def test_a_persons_word_replaces_the_rules(by_name):
    rows = rows_of(series_uid="1.1") + rows_of(series_uid="1.2", image_type=("DERIVED",))

    def chosen(**words):
        overrides = {(f"name {uid}" if by_name else uid): word for uid, word in words.items()}
        policy = Policy(overrides={name.replace("_", "."): word for name, word in overrides.items()})
        (exam,) = select(rows, policy, lambda stack: f"name {stack.series_uid}").exams
        return {verdict.stack.series_uid: verdict.code for verdict in exam.verdicts}

    assert chosen() == {"1.1": "", "1.2": "derived"}
    assert chosen(**{"1_2": "use"}) == {"1.1": "not_best", "1.2": ""}
    assert chosen(**{"1_1": "skip"}) == {"1.1": "overridden", "1.2": "derived"}


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("series,action\n1.2,use\n1.3,drop\n1.2,skip\n", "3, 4"),
        ("uid,what\n1.2,use\n", "2"),
        ("series,action\n", "1"),
    ],
    ids=["values", "columns", "empty"],
)
def test_faulty_override_files_are_refused_whole(tmp_path, text, lines):
    (tmp_path / "overrides.csv").write_text(text)
    with pytest.raises(OverrideError, match=rf"line\(s\) {lines}:"):
        read_overrides(tmp_path / "overrides.csv")


@pytest.mark.parametrize(
    ("broken", "code"),
    [
        pytest.param({"fault": "burned_in"}, "series_incomplete", id="same-size"),
        pytest.param({"fault": "unreadable_header", "rows": None}, "series_incomplete", id="size-unknown"),
        pytest.param({"fault": "burned_in", "rows": 512.0}, "", id="other-size"),
        pytest.param({"fault": "no_pixels"}, "", id="no-error"),
    ],
)
def test_a_quarantined_slice_makes_its_stack_incomplete(broken, code):
    rows = rows_of(12)
    rows[-1] = replace(rows[-1], **broken)
    (exam,) = select(rows).exams
    assert [verdict.code for verdict in exam.verdicts] == [code]
    assert [len(verdict.stack.rows) for verdict in select(rows, Policy(allow_gaps=True)).exams[0].selected] == [11]


def test_an_exam_without_any_sound_image_is_still_an_exam():
    (exam,) = select(rows_of(orientation=())).exams
    assert (exam.study_uid, exam.verdicts) == ("1.2", ())


def test_numbered_slices_are_no_passes():
    rows = [replace(row, acquisition_number=float(number)) for number, row in enumerate(rows_of(7))]
    twin = replace(rows[3], sop_uid="twin", path="twin", acquisition_number=9.0)
    assert [len(stack.rows) for stack in make_stacks([*rows, twin], [])] == [8]


def test_too_few_slices():
    assert codes(rows_of(4)) == ["too_few_slices"]
    assert codes(rows_of(3, orientation=AXIAL)) == ["localizer"]


def test_slices_of_two_orientations_are_two_stacks():
    tilted = tuple(np.round([np.sin(0.02), np.cos(0.02), 0, 0, 0, -1], 6))
    mixed = rows_of(11)[:6] + rows_of(11, orientation=tilted)[6:]
    assert sorted(len(stack.rows) for stack in make_stacks(mixed, [])) == [5, 6]


def test_nearly_parallel_slices_are_one_stack():
    wobble = tuple(np.round([np.sin(0.002), np.cos(0.002), 0, 0, 0, -1], 6))
    mixed = rows_of(11)[:6] + rows_of(11, orientation=wobble)[6:]
    assert [len(stack.rows) for stack in make_stacks(mixed, [])] == [11]


def test_relaxation_map_is_refused_but_not_a_dual_echo():
    echoes = [rows_of(echo_time_ms=te, echo_number=float(n)) for n, te in enumerate((20.0, 80.0, 120.0), 1)]
    assert codes(*echoes) == ["multi_echo"] * 3
    assert sorted(codes(*echoes[:2])) == ["", "proton_density"]


def test_repeats_at_equal_positions_split_by_acquisition():
    first = rows_of(acquisition_number=1.0)
    second = [
        FileRow(f"again/{i}", 1, sop_uid=f"again.{i}", position_mm=row.position_mm, acquisition_number=2.0, **T2_ROW)
        for i, row in enumerate(first)
    ]
    verdicts = choose(make_stacks([*first, *second], []), Policy())
    assert sorted(verdict.code for verdict in verdicts) == ["", "not_best"]


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        pytest.param({"count": 6}, {}, id="typical-slice-count"),
        pytest.param({"rows": 128.0, "columns": 128.0}, {}, id="matrix"),
        pytest.param({"echo_time_ms": None, "series_description": "t2"}, {}, id="sure-contrast"),
        pytest.param({"acquisition_time": "101500"}, {"acquisition_time": "104500"}, id="latest"),
    ],
)
def test_ranking(worse, better):
    for first, second in (("1.2.3.1", "1.2.3.2"), ("1.2.3.2", "1.2.3.1")):
        rows = rows_of(series_uid=first, **worse) + rows_of(series_uid=second, **better)
        (exam,) = select(rows).exams
        assert [verdict.stack.series_uid for verdict in exam.selected] == [second]


def test_one_study_under_two_patients_is_quarantined():
    assert codes(rows_of(), rows_of(patient_id="P2", series_uid="1.2.4")) == ["patient_mismatch"]


def test_spelling_of_the_patient_id_is_no_mismatch():
    assert codes(rows_of(), rows_of(patient_id=" p1", series_uid="1.2.4", orientation=AXIAL)) == ["", "not_sagittal"]


def test_files_that_contradict_each_other_are_quarantined():
    rows = rows_of()
    twin = FileRow("twin", 1, sop_uid=rows[0].sop_uid, position_mm=(99.0, 0.0, 0.0), **T2_ROW)
    assert "conflicting_duplicate" in codes([*rows, twin])


def test_selection_ignores_the_order_of_files():
    rows = rows_of() + rows_of(series_uid="1.2.4", echo_time_ms=12.0, repetition_time_ms=500.0)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert select(rows) == select(shuffled)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_file"),
        (b"some text, longer than the shortest header", "not_dicom"),
        (b"PK\x03\x04" + bytes(200), "archive"),
        (b"\x1f\x8b" + bytes(200), "archive"),
        (bytes(128) + b"DICM" + b"\xff" * 40, "unreadable_header"),
        (bytes(5000), "not_dicom"),
    ],
    ids=["empty", "text", "zip", "gzip", "garbage-after-magic", "zeros"],
)
def test_junk_gets_a_code(tmp_path, content, code):
    (tmp_path / "file").write_bytes(content)
    (row,) = index_files(str(tmp_path), list(walk(tmp_path)))
    assert row.fault.partition(":")[0] in {code, "no_pixels"}


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ({"Modality": "CT"}, "not_mr"),
        ({"BurnedInAnnotation": "YES"}, "burned_in"),
        ({"PatientID": ""}, "no_patient_id"),
        ({"StudyInstanceUID": None}, "no_exam_id"),
        ({"NumberOfFrames": 3}, "multiframe"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "rgb"),
        ({"PixelData": None}, "no_pixels"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, ""),
        ({"SeriesDescription": "ñandú 磁共振"}, ""),
    ],
)
def test_header_alone_settles(tmp_path, header, code):
    header = {"SpecificCharacterSet": "ISO_IR 192", **header}
    save(make_dataset(np.ones((4, 4), np.uint16), **header), tmp_path / "image")
    (row,) = index_files(str(tmp_path), list(walk(tmp_path)))
    assert row.fault == code


def test_links_and_pipes_are_listed_but_not_opened(tmp_path):
    import os

    make_series(tmp_path / "a")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    found = {row.path: row.fault for row in index_files(str(tmp_path), list(walk(tmp_path)))}
    assert (found["loop"], found["pipe"], len(found)) == ("symlink", "special_file", 7)
