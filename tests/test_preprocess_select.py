import numpy as np
import pytest
from dicom_factory import AXIAL, SAGITTAL, make_dataset, make_series, save

from preprocess.index import FileRow, index_files, walk
from preprocess.select import choose, select
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
    return [verdict.code for verdict in verdicts] + sorted(set(selection.settled.values()))


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


def test_too_few_slices():
    assert codes(rows_of(4)) == ["too_few_slices"]
    assert codes(rows_of(3, orientation=AXIAL)) == ["localizer"]


def test_slices_of_two_orientations_are_two_stacks():
    tilted = tuple(np.round([np.sin(0.02), np.cos(0.02), 0, 0, 0, -1], 6))
    mixed = rows_of(11)[:6] + rows_of(11, orientation=tilted)[6:]
    assert sorted(len(stack.rows) for stack in make_stacks(mixed, {})) == [5, 6]


def test_nearly_parallel_slices_are_one_stack():
    wobble = tuple(np.round([np.sin(0.002), np.cos(0.002), 0, 0, 0, -1], 6))
    mixed = rows_of(11)[:6] + rows_of(11, orientation=wobble)[6:]
    assert [len(stack.rows) for stack in make_stacks(mixed, {})] == [11]


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
    verdicts = choose(make_stacks([*first, *second], {}))
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
        assert exam.selected.stack.series_uid == second


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
    (row,) = index_files(str(tmp_path), walk(tmp_path))
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
    (row,) = index_files(str(tmp_path), walk(tmp_path))
    assert row.fault == code


def test_links_and_pipes_are_listed_but_not_opened(tmp_path):
    import os

    make_series(tmp_path / "a")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    found = {row.path: row.fault for row in index_files(str(tmp_path), walk(tmp_path))}
    assert (found["loop"], found["pipe"], len(found)) == ("symlink", "special_file", 7)
