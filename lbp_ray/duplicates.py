"""Exams of different patients whose mid-sagittal crops show (nearly) the same pixels.

One image under two patients' names that stands in two folds is trained on and tested on. Crops are looked up by short
signatures in near-linear time (random hyperplanes, in bands), and what looks alike is compared at full resolution.
Only the lookup is fitted on data, on exams outside the hold-out; what counts as alike is a constant.

Shape suffixes: V views, N crops, K slice offsets, H rows, W columns, F thumbnail values, B bands, C pairs.

References
----------
Charikar, Similarity estimation techniques from rounding algorithms, STOC 2002 (signs of random projections).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from scipy import fft

from lbp_ray.result import Duplicates
from lbp_ray.splits import HOLDOUT, SplitError, require_no_holdout
from preprocess.commit import canonical_json, committed_directory, content_id

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DUPLICATES_VERSION = 1
"""Raised by hand when the same crops give other pairs."""

LOWEST_CORRELATION = 0.95
"""Pearson's correlation of two crops' pixels from which on they are alike. Of 450 synthetic patients no two reach 0.85
at 0.55 mm a pixel, 0.92 at 2.2 mm, 0.95 at 4.4 mm; neighbouring slices of one real spine, 4 mm apart, not 0.88. Copies
that were windowed, saved as JPEG, halved and enlarged, or given noise of a fifth of their spread reach 0.96."""

MAX_SHIFT = 0.01
"""Largest displacement between two crops at which they are compared, as a share of their height: 4 pixels of 400. Boxes
of one image differ so where two annotations centred them."""

VIEWS = ((0, 0), (1, 0), (0, 1), (1, 1), (1, -1))
"""Displacements, in units of `VIEW_STEP`, at which each crop is looked up: their differences point everywhere."""

VIEW_STEP = 0.0075
"""Share of a crop's height, at least one pixel; the lookup bears a displacement of half of it."""

THUMBNAIL = (16, 8)
"""Rows and columns of the averages that signatures are made of."""

MAX_REFERENCE = 4096
"""Crops that the lookup is fitted on, evenly spaced over the exams outside the hold-out."""

RIDGE = 0.01
"""Share of the largest variance of thumbnails below which a direction counts as noise and is not enlarged."""

BANDS = 24
"""Parts of a signature; crops that agree in a whole part are candidates. A copy in place changes 2 % of
the bits, one a pixel off 4 to 8 %; no two of 450 synthetic patients change less than a third."""

MIN_BAND_BITS = 16
"""Bits of a band in small cohorts; in larger ones, as many as it takes to number the crops."""

MAX_CHANGED = 0.2
"""Share of a signature's bits that a candidate may have changed."""

MAX_NEIGHBOURS = 32
"""Crops of one band's bucket that each is compared with: bounds the work where very many are the same."""

CHUNK = 128
"""Crops, or pairs, in memory at a time."""

COLUMNS = ("study_id_1", "patient_id_1", "fold_1", "study_id_2", "patient_id_2", "fold_2", "correlation")
"""Columns of the table of pairs, both exams in the order of their pseudonyms."""


class Lookup(NamedTuple):
    """What turns thumbnails into signatures."""

    mean_F: np.ndarray
    planes_FD: np.ndarray
    """Normals of hyperplanes, one per bit, in the thumbnails' own units."""


def find_duplicates(crops_NKHW: np.ndarray, exams: pd.DataFrame) -> tuple[Duplicates, pd.DataFrame]:
    """Compare the mid-sagittal crops of different patients.

    Moved by more than `MAX_SHIFT`, mirrored, turned or cut at another scale, a copy is not recognised.

    Parameters
    ----------
    crops_NKHW
        Stored values, of which the middle offset is read, a few crops at a time; a memory map stays one.
    exams
        ``study_id``, ``patient_id``, ``fold``, one row per exam that is compared; the index is its row in the crops.

    Returns
    -------
    duplicates
        Counts of pairs.
    pairs
        `COLUMNS`, those across folds first, then by study; exams of one patient are never among them.
    """
    exams = exams.sort_values("study_id")
    crops_NHW = crops_NKHW[:, crops_NKHW.shape[1] // 2]
    reference = exams.index[exams["fold"] != HOLDOUT]
    lookup = fit_lookup(crops_NHW, exams, reference.to_numpy(), bits=BANDS * _band_bits(len(exams)))
    rows = exams.index.to_numpy()
    candidates_C2 = _candidates(_signatures(crops_NHW, rows, lookup), pd.factorize(exams["patient_id"])[0])
    correlation_C = _correlations(crops_NHW, rows[candidates_C2])
    alike = correlation_C >= LOWEST_CORRELATION
    pairs = _table(exams, candidates_C2[alike], correlation_C[alike])
    across = int((pairs["fold_1"] != pairs["fold_2"]).sum())
    return Duplicates(
        num_exams=len(exams), num_pairs=len(pairs), num_across_folds=across, lowest_correlation=LOWEST_CORRELATION
    ), pairs


def check_duplicates(
    crops_NKHW: np.ndarray, exams: pd.DataFrame, *, crops_hash: str, root: Path, refuse: bool
) -> tuple[Duplicates, tuple[str, ...]]:
    """Look for duplicates, leave the table of pairs on disk and refuse those across folds, or say what was found.

    Parameters
    ----------
    crops_NKHW, exams
        As `find_duplicates` reads them.
    crops_hash
        Address of the crops.
    root
        Folder in which each set of crops and exams has a folder of its own; one that exists is read, not made again.
    refuse
        Whether pairs across folds are refused.

    Returns
    -------
    duplicates
        Counts of pairs.
    statements
        What the report must say.

    Raises
    ------
    SplitError
        Naming the first pair in different folds, or with one exam in the hold-out.
    """
    rows = exams.sort_values("study_id")[["study_id", "patient_id", "fold"]]
    address = content_id({"version": DUPLICATES_VERSION, "crops": crops_hash, "exams": rows.values.tolist()})
    folder = root / address[:16]
    if not folder.is_dir():
        found, pairs = find_duplicates(crops_NKHW, exams)
        with committed_directory(folder, point="duplicates") as partial:
            pairs.to_parquet(partial / "pairs.parquet", index=False)
            (partial / "duplicates.json").write_text(canonical_json(found.model_dump(mode="json")))
    found = Duplicates.model_validate_json((folder / "duplicates.json").read_bytes())
    if not found.num_across_folds:
        return found, ()
    if refuse:
        raise SplitError(_refusal(pd.read_parquet(folder / "pairs.parquet").iloc[0], found, folder))
    return found, (
        f"{found.num_across_folds} pair(s) of exams of different patients in different folds, or with one in the "
        f"hold-out, show nearly the same image (correlation {LOWEST_CORRELATION:g} or more): scores may rest on images "
        "that were trained on.",
    )


def _refusal(pair: pd.Series, found: Duplicates, folder: Path) -> str:
    def told(number: int) -> str:
        fold = pair[f"fold_{number}"]
        where = "the hold-out" if fold == HOLDOUT else f"fold {fold}"
        return f"study {pair[f'study_id_{number}']} (patient {pair[f'patient_id_{number}']}, {where})"

    return (
        f"{told(1)} and {told(2)} show nearly the same image (correlation {pair['correlation']:.3f}), and "
        f"{found.num_across_folds} such pair(s) in all lie across folds: a network would be tested on what it was "
        f"trained on. {folder / 'pairs.parquet'} lists them. If both are of one person, give both exams one patient_id "
        "in the linked questionnaire (another split is then drawn), or exclude one of them by paths.roi_overrides; or "
        "set split.near_duplicates=report and have the report say so"
    )


def fit_lookup(crops_NHW: np.ndarray, exams: pd.DataFrame, reference: np.ndarray, *, bits: int) -> Lookup:
    """Fit what spreads crops evenly over signatures: mean and covariance of thumbnails.

    Parameters
    ----------
    crops_NHW
        Mid-sagittal crops.
    exams
        As `find_duplicates` reads them.
    reference
        Rows of the crops to fit on, none of the hold-out.
    bits
        Length of a signature.

    Raises
    ------
    SplitError
        If a sealed exam is among them.
    """
    require_no_holdout(exams, exams.loc[reference, "study_id"], "duplicates")
    step = -(-len(reference) // MAX_REFERENCE)
    chosen = np.sort(reference)[::step]
    thumbnails_NF = np.concatenate([_thumbnails(_view(crops_NHW[rows])) for rows in _chunks(chosen)]).astype(np.float64)
    mean_F = thumbnails_NF.mean(axis=0)
    variances, axes_FF = np.linalg.eigh(np.cov(thumbnails_NF, rowvar=False, bias=True))
    scale_F = 1 / np.sqrt(np.maximum(variances, 0) + RIDGE * variances[-1] + np.finfo(np.float32).eps)
    chance = np.random.Generator(np.random.Philox(key=[DUPLICATES_VERSION, bits]))
    planes_FD = (axes_FF * scale_F) @ axes_FF.T @ chance.standard_normal((len(mean_F), bits))
    return Lookup(mean_F.astype(np.float32), planes_FD.astype(np.float32))


def _band_bits(num_crops: int) -> int:
    return min(max(MIN_BAND_BITS, int(num_crops).bit_length()), 32)


def _chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))


def _thumbnails(crops_NHW: np.ndarray) -> np.ndarray:
    """Average onto a coarse grid; every thumbnail has mean 0 and length 1, so that gain and offset do not matter."""
    rows, columns = (_averaging(*sizes) for sizes in zip(crops_NHW.shape[1:], THUMBNAIL, strict=True))
    return _standardised(rows @ crops_NHW.astype(np.float32, copy=False) @ columns.T)


def _averaging(size: int, wanted: int) -> np.ndarray:
    """Matrix (wanted, size) that averages equal parts of a line."""
    parts = np.arange(size) * wanted // size == np.arange(wanted)[:, None]
    return np.asarray(parts / np.maximum(parts.sum(axis=1, keepdims=True), 1), np.float32)


def _standardised(images_NHW: np.ndarray) -> np.ndarray:
    """Flatten images to mean 0 and length 1; a constant one becomes 0."""
    flat_NF: np.ndarray = images_NHW.reshape(len(images_NHW), -1).astype(np.float32)
    flat_NF -= flat_NF.mean(axis=1, keepdims=True)
    flat_NF /= np.maximum(np.linalg.norm(flat_NF, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return flat_NF


def _view(crops_NHW: np.ndarray, down: int = 0, right: int = 0) -> np.ndarray:
    """Cut crops one step in from each side, displaced by so many steps; very small crops stay whole."""
    height, width = crops_NHW.shape[1:]
    step = max(round(VIEW_STEP * height), 1)
    if min(height, width) < 8 * step:
        return crops_NHW
    top, left = (1 + down) * step, (1 + right) * step
    return crops_NHW[:, top : top + height - 2 * step, left : left + width - 2 * step]


def _signatures(crops_NHW: np.ndarray, rows: np.ndarray, lookup: Lookup) -> np.ndarray:
    """Return one unsigned number per view, crop and band, shape (V, N, B), uint32."""
    keys_VNB = np.empty((len(VIEWS), len(rows), BANDS), np.uint32)
    weights = 1 << np.arange(lookup.planes_FD.shape[1] // BANDS, dtype=np.uint32)
    for start, chosen in zip(range(0, len(rows), CHUNK), _chunks(rows), strict=True):
        crops = crops_NHW[chosen].astype(np.float32)
        for keys_NB, steps in zip(keys_VNB, VIEWS, strict=True):
            signs_ND = (_thumbnails(_view(crops, *steps)) - lookup.mean_F) @ lookup.planes_FD > 0
            bits_NBD = signs_ND.reshape(len(chosen), BANDS, -1)
            keys_NB[start : start + len(chosen)] = (bits_NBD * weights).sum(axis=2, dtype=np.uint32)
    return keys_VNB


def _candidates(keys_VNB: np.ndarray, patients_N: np.ndarray) -> np.ndarray:
    """Pairs of crops of different patients that share a band and nearly all bits, shape (C, 2), each once, ordered."""
    num_crops, keys = len(patients_N), keys_VNB.reshape(-1, BANDS)
    max_changed = MAX_CHANGED * BANDS * _band_bits(num_crops)
    found = [np.empty(0, np.int64)]
    for first, second in _bucket_neighbours(keys):
        pairs_C2 = np.sort(np.stack([first % num_crops, second % num_crops], axis=1), axis=1)
        differ = patients_N[pairs_C2[:, 0]] != patients_N[pairs_C2[:, 1]]
        changed_C = np.bitwise_count(keys[first[differ]] ^ keys[second[differ]]).sum(axis=1)
        near_C2 = pairs_C2[differ][changed_C <= max_changed]
        found.append(np.unique(near_C2[:, 0] * num_crops + near_C2[:, 1]))
    return np.stack(np.divmod(np.unique(np.concatenate(found)), num_crops), axis=1)


def _bucket_neighbours(keys_NB: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of crops that are equal in one band."""
    for keys_N in keys_NB.T:
        order = np.argsort(keys_N, kind="stable")
        ordered = keys_N[order]
        for step in range(1, MAX_NEIGHBOURS + 1):
            equal = np.flatnonzero(ordered[step:] == ordered[:-step])
            if not len(equal):
                break
            yield order[equal], order[equal + step]


def _correlations(crops_NHW: np.ndarray, pairs_C2: np.ndarray) -> np.ndarray:
    """Correlate the pixels of each pair, moved against each other where they are not alike as they lie."""
    parts = [np.empty(0)]
    for chosen_C2 in _chunks(pairs_C2):
        first, second = (crops_NHW[chosen_C2[:, side]] for side in range(2))
        still_C = (_standardised(first) * _standardised(second)).sum(axis=1)
        parts.append(
            np.array(
                [
                    still if still >= LOWEST_CORRELATION else _moved_correlation(one, other)
                    for still, one, other in zip(still_C.tolist(), first, second, strict=True)
                ]
            )
        )
    return np.concatenate(parts)


def _moved_correlation(first_HW: np.ndarray, second_HW: np.ndarray) -> float:
    """Correlate what two crops share when one is moved, by up to `MAX_SHIFT`, to where it fits best."""
    reach = max(round(MAX_SHIFT * len(first_HW)), 1)
    steps = np.arange(-reach, reach + 1)
    spectra = [fft.rfft2(_standardised(crop[None]).reshape(crop.shape)) for crop in (first_HW, second_HW)]
    fit = fft.irfft2(spectra[0] * np.conj(spectra[1]), s=first_HW.shape)[np.ix_(steps, steps)]
    down, right = (int(steps[place]) for place in np.unravel_index(fit.argmax(), fit.shape))
    shared = _shared(first_HW, down, right), _shared(second_HW, -down, -right)
    return float(np.prod([_standardised(crop[None]) for crop in shared], axis=0).sum())


def _shared(crop_HW: np.ndarray, down: int, right: int) -> np.ndarray:
    height, width = crop_HW.shape
    return crop_HW[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]


def _table(exams: pd.DataFrame, pairs_C2: np.ndarray, correlation_C: np.ndarray) -> pd.DataFrame:
    told = exams[["study_id", "patient_id", "fold"]]
    sides = [
        told.iloc[side].reset_index(drop=True).add_suffix(f"_{1 + number}") for number, side in enumerate(pairs_C2.T)
    ]
    table = pd.concat(sides, axis=1).assign(correlation=np.clip(correlation_C, -1, 1))
    same_fold = (table["fold_1"] == table["fold_2"]).to_numpy()
    ordered: pd.DataFrame = table[list(COLUMNS)].iloc[np.argsort(same_fold, kind="stable")]
    return ordered.reset_index(drop=True)
