"""DICOM series in, a chunked Zarr slice store out.

The rooms, in the order the data meets them:

- ``headers/``: files to header rows.
- ``stacks``: rows of one study to stacks: parallel slices that agree in what a volume may not mix.
- ``select``: pure rules from stacks to one stack per exam and contrast, with a reason for every rejection.
- ``geometry``: slice order, spacing and affine along the true normal (mm, patient LPS).
- ``pixels/``: selected files to stored pixel values.
- ``deidentify``: typed allow-list and keyed pseudonyms.
- ``store/``: the contract: the Zarr slice store, written, read, verified, described, exported.
- ``partitions``: header rows on disk, in parts by a hash of the study.
- ``convert``: one stack to one committed series.
- ``settle``: one part of the exams, whole: the unit of work.
- ``accounting``: one terminal state per file; the private and the shareable report.
- ``midsagittal/``: the mid-sagittal slice of every study, to be checked and corrected.
- ``pipeline``: the order of all this, on whatever runs the tasks.
- ``mapper``: where many calls of one function run.
- ``job``: runs the tasks on Ray: named, bounded, retried.
- ``cvat/``: annotations as CVAT writes them: boxes, polygons and masks, in and out.
- ``link/``: labels, gradings, annotations and mask files to the store's pseudonyms.
- ``exam``: one exam in this process, by the same code path.
- ``commit``: atomic files and directories, content hashes and the fail-points that tests kill at.

``python -m preprocess`` is the command line. Nothing here imports torch, and only ``job`` imports ray.
"""
