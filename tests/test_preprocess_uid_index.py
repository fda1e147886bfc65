import csv

import pytest

from preprocess.commit import stream_atomic
from preprocess.link import uid_index
from preprocess.link.uid_index import ExamEntry, SliceEntry, UidIndex, UidIndexError, write_mapping_table


def exam(study_id, patient="P1", accession="", issuer=""):
    return ExamEntry(issuer, patient, accession, f"1.2.{study_id}", f"pseudo-{issuer}{patient}", study_id)


@pytest.fixture
def private(tmp_path):
    folder = tmp_path / "x.private"
    folder.mkdir(mode=0o700)
    exams = [exam("ab1", "Müller 7", "acc 1"), exam("ab2", "P2", "A2", "Clinic")]
    uid_index.write_index_part(
        folder, "ab", exams, [SliceEntry("1.1", "ab1", "s1", 0), SliceEntry("1.2", "ab1", "s1", 1)]
    )
    uid_index.write_index_part(folder, "c", [exam("c1", "P2", "A3")], [SliceEntry("9.9#12", "c1", "s2", 11)])
    return folder


def studies(table):
    return table["study_id"].to_pylist()


@pytest.mark.parametrize("rows_at_a_time", [1, 1_000])
def test_exams_are_found_by_patient_or_accession(private, monkeypatch, rows_at_a_time):
    monkeypatch.setattr(uid_index, "LOOKUP_ROWS", rows_at_a_time)
    index = UidIndex(private)
    assert studies(index.exams_of(["P2"], [])) == ["ab2", "c1"]
    assert studies(index.exams_of(["MÜLLER 7"], ["A3", "A3"])) == ["ab1", "c1"]
    assert index.exams_of([], ["ACC 1"]).to_pylist() == [
        {
            "patient_id": "pseudo-Müller 7",
            "study_id": "ab1",
            "issuer_key": "",
            "patient_key": "MÜLLER 7",
            "accession_key": "ACC 1",
        }
    ]


def test_empty_keys_match_no_exam_that_lacks_them(private):
    uid_index.write_index_part(private, "d", [exam("d1", accession="")], [])
    assert studies(UidIndex(private).exams_of([], [""])) == []
    assert studies(UidIndex(private).exams_of([""], ["A2", ""])) == ["ab2"]


def test_slices_and_frames_are_located_in_the_order_asked(private):
    index = UidIndex(private)
    assert index.locate(["9.9#12", "1.1"]) == [("s2", 11), ("s1", 0)]
    assert index.slices_of(["9.9"]).num_rows == 0


@pytest.mark.parametrize("faulty", ["5.5.5", "1.2"], ids=["unknown", "in-two-studies"])
def test_templates_that_are_no_single_slice_are_named_by_line(private, faulty):
    uid_index.write_index_part(private, "c", [], [SliceEntry("1.2", "c1", "s2", 0)])
    with pytest.raises(UidIndexError, match=r"line\(s\) 3 name") as error:
        UidIndex(private).locate(["1.1", faulty])
    assert faulty not in str(error.value)


def test_missing_index_says_what_to_run(tmp_path):
    with pytest.raises(UidIndexError, match="run `python -m preprocess`"):
        UidIndex(tmp_path)


def files(private):
    return {path.relative_to(private).as_posix(): path for path in sorted(private.rglob("*.parquet"))}


def test_files_are_for_their_owner_only(private):
    assert list(files(private)) == ["exams/ab.parquet", "exams/c.parquet", "slices/ab.parquet", "slices/c.parquet"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files(private).values())
    assert all((private / kind).stat().st_mode & 0o777 == 0o700 for kind in ("exams", "slices"))


def test_bytes_do_not_depend_on_order_or_repetition(private, tmp_path):
    exams = [exam("ab2", "P2", "A2", "Clinic"), exam("ab1", "Müller 7", "acc 1")]
    slices = [SliceEntry("1.2", "ab1", "s1", 1), SliceEntry("1.1", "ab1", "s1", 0)]
    for _ in range(2):
        uid_index.write_index_part(tmp_path / "other", "ab", exams, slices)
    for name in ("exams/ab.parquet", "slices/ab.parquet"):
        assert (tmp_path / "other" / name).read_bytes() == (private / name).read_bytes()


def test_later_runs_replace_their_own_studies_only(private):
    uid_index.write_index_part(
        private, "ab", [exam("ab2", "P2", "A-new", "Clinic")], [SliceEntry("2.1", "ab2", "s3", 0)]
    )
    index = UidIndex(private)
    assert index.exams_of(["P2"], ["ACC 1"])["accession_key"].to_pylist() == ["ACC 1", "A-NEW", "A3"]
    assert index.locate(["1.1", "2.1"]) == [("s1", 0), ("s3", 0)]


# --- mapping table ---------------------------------------------------------------------------------------------------


def test_mapping_table_has_every_exam_as_in_the_header(private, tmp_path):
    out = tmp_path / "kept" / "mapping.csv"
    for _ in range(2):
        assert write_mapping_table(private, out) == 3
    assert out.stat().st_mode & 0o777 == 0o600
    rows = list(csv.reader(out.read_text(encoding="utf-8").splitlines()))
    assert rows[0] == [
        "IssuerOfPatientID",
        "PatientID",
        "AccessionNumber",
        "StudyInstanceUID",
        "patient_id",
        "study_id",
    ]
    assert rows[1:3] == [
        ["", "Müller 7", "acc 1", "1.2.ab1", "pseudo-Müller 7", "ab1"],
        ["Clinic", "P2", "A2", "1.2.ab2", "pseudo-ClinicP2", "ab2"],
    ]


@pytest.mark.parametrize(
    "place", ["x.zarr/m.csv", "x.report/deep/m.csv", "x.midsagittal/m.csv", "m.zarr", "link/m.csv"]
)
def test_mapping_table_is_kept_out_of_what_is_shared(private, tmp_path, place):
    (tmp_path / "x.report").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "x.report")
    with pytest.raises(UidIndexError, match="made to be shared"):
        write_mapping_table(private, tmp_path / place)


def test_mapping_table_replaces_no_other_file(private):
    (private / "pseudonym.key").write_text("secret")
    with pytest.raises(UidIndexError, match="no mapping table"):
        write_mapping_table(private, private / "pseudonym.key")
    assert (private / "pseudonym.key").read_text() == "secret"


def test_a_stream_that_fails_leaves_nothing(tmp_path):
    def fail():
        with stream_atomic(tmp_path / "table.csv") as file:
            file.write("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
