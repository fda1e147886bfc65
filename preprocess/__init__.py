"""DICOM series in, a chunked Zarr slice store out.

The rooms, in the order the data meets them:

- ``index``: walk a messy tree, headers only; one row per file, whatever the file is.
- ``stacks``: rows of one study to stacks: parallel slices that agree in what a volume may not mix.
- ``select``: pure rules from stacks to one sagittal T2 stack per exam, with a reason for every rejection.
- ``geometry``: slice order, spacing and affine along the true normal (mm, patient LPS).
- ``volume``: selected stack to stored pixel values.
- ``deidentify``: typed allow-list and keyed pseudonyms.
- ``store``: the contract: schema, writer, reader and verification of the Zarr slice store.
- ``convert``: one stack to one committed series: the unit of work.
- ``uid_index``: the private index of which identifiers became which pseudonyms.
- ``manifest_scan``: a few columns of the manifest, one part at a time: what a driver may hold.
- ``template_match``: volume to mid-sagittal slice by FFT correlation with templates.
- ``corrections``: mid-sagittal slices corrected by hand, accepted whole or not at all.
- ``png``: pixels to PNG.
- ``contact_sheet``: pages and a picture of the chosen slices, what needs a look first.
- ``midsagittal``: the choice for every study of a store: found, corrected, flagged, shown.
- ``export``: series of a store as NIfTI and PNG.
- ``describe``: what a store holds, in words.
- ``accounting``: one terminal state per file; the private and the shareable report.
- ``pipeline``: the order of all this, on whatever runs the tasks.
- ``mapper``: where many calls of one function run.
- ``job``: runs the tasks on Ray: named, bounded, retried.
- ``link``: labels, gradings and annotation names to the store's pseudonyms.
- ``exam``: one exam in this process, by the same code path.
- ``commit``: atomic files and directories, content hashes and the fail-points that tests kill at.

``python -m preprocess`` is the command line. Nothing here imports torch, and only ``job`` imports ray.
"""
