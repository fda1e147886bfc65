"""DICOM series in, a chunked Zarr slice store out.

The rooms, in the order the data meets them:

- ``index``: walk a messy tree, headers only; one row and one terminal state per file.
- ``select``: pure rules from rows to stacks to one sagittal T2 stack per exam, with a reason for every rejection.
- ``geometry``: slice order, spacing and affine along the true normal (mm, patient LPS).
- ``volume``: selected stack to stored pixel values.
- ``deidentify``: typed allow-list and keyed pseudonyms; ``link`` rewrites labels, gradings and annotations with them.
- ``store``: the contract: schema, writer, reader and verification of the Zarr slice store.
- ``midsagittal``: volume to mid-sagittal slice by FFT correlation with templates.
- ``job``: the Ray job that fans the work out, resumes and accounts for every file.
- ``commit``: atomic files and directories, content hashes and the fail-points that tests kill at.

``python -m preprocess`` is the command line. Nothing here imports torch, and only ``job`` imports ray.
"""
