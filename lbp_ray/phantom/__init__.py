"""Synthetic lumbar-MRI cohorts with known truth, written as real DICOM, CSV and CVAT XML.

The rooms, in the order an exam is made:

- ``config``: what a cohort is: size, grades, label strength, matrix, where it goes.
- ``tissue``: proton density, T1, T2 and fat fraction of every material; the spin-echo signal.
- ``anatomy``: a subject's chain of bodies and discs, its pose, and the spine-following coordinates of every pixel.
- ``grid``: the canvas in those coordinates, interpolation between grids, textures.
- ``column``: vertebral bodies and discs; ``posterior``: the bone behind the canal.
- ``paint``: all materials of one thin sagittal plane.
- ``surround``: what lies around the spine: abdomen, back fat, skin, air.
- ``acquire``: coil sensitivity, saturation band, band-limited k-space with complex noise.
- ``exam``: one exam: volumes of each contrast, geometry, truth and label maps.
- ``cohort``: patients, grades, labels from a logistic model and the Bayes AUC they imply.
- ``histories``: latent pain histories and the questionnaire answers they lead to.
- ``dicom``: headers and files of one exam as a GE scanner would write them.
- ``write``: the whole tree: DICOM, tables, annotations and truth.

``python -m lbp_ray.phantom --config configs/phantom_demo.yaml`` is the command line. Nothing here imports torch or ray.
"""

from lbp_ray.phantom.config import PhantomConfig
from lbp_ray.phantom.exam import ExamSpec, SyntheticExam, simulate_exam
from lbp_ray.phantom.write import CohortSummary, write_cohort

__all__ = ["CohortSummary", "ExamSpec", "PhantomConfig", "SyntheticExam", "simulate_exam", "write_cohort"]
