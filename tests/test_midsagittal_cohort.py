"""Mid-sagittal finding on two hundred synthetic exams, by templates of other exams."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from lbp_ray.phantom.exam import ExamSpec, Imaging, simulate_exam
from lbp_ray.phantom.tissue import T2
from preprocess.midsagittal.match import find_midsagittal, make_templates

NUM_EXAMS = 200
NUM_TEMPLATES = 6
IMAGING = Imaging(matrix=128)
SPACING_MM = (IMAGING.pixel_mm, IMAGING.pixel_mm)


def simulate(number: int):
    """Exam with drawn grades: volume, true index, acceptable indices."""
    generator = np.random.default_rng(number)
    pfirrmann = tuple(int(grade) for grade in generator.integers(2, 6, 5))
    modic = tuple(int(grade) for grade in generator.choice(4, 5, p=[0.7, 0.1, 0.15, 0.05]))
    exam = simulate_exam(ExamSpec(pfirrmann, modic, (1, number), (2, number)), IMAGING, (T2,))
    truth = exam.truth
    return exam.volumes[T2.name], truth.mid_index, truth.acceptable_indices, abs(truth.mid_offset_mm)


@pytest.fixture(scope="module")
def exams():
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return list(pool.map(simulate, range(NUM_EXAMS + 4 * NUM_TEMPLATES), chunksize=8))


def test_the_mid_sagittal_slice_is_found(exams):
    candidates = sorted(exams[NUM_EXAMS:], key=lambda exam: exam[3])[:NUM_TEMPLATES]
    templates = make_templates(
        [(f"t{row}", f"p{row}", exam[0][exam[1]], SPACING_MM) for row, exam in enumerate(candidates)]
    )
    found, guessed, errors, shifts = 0, 0, [], []
    for volume, middle, acceptable, _ in exams[:NUM_EXAMS]:
        index = find_midsagittal(volume, SPACING_MM, templates).slice_index
        found += index in acceptable
        guessed += len(volume) // 2 in acceptable
        errors.append(min(abs(index - good) for good in acceptable))
        shifts.append(middle - len(volume) // 2)
    print(f"found {found}/{NUM_EXAMS}, centre guess {guessed}/{NUM_EXAMS}, largest error {max(errors)}")
    assert {-3, 3} <= set(shifts)
    assert guessed <= 0.40 * NUM_EXAMS
    assert found >= 0.95 * NUM_EXAMS
    assert max(errors) <= 1
