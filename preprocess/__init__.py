"""DICOM series in, a chunked Zarr slice store out.

The rooms, in the order the data meets them:

- ``index``: walk a messy tree, headers only; one row per image, whatever the file is.
- ``header``: one header: a minimal reader for the common encodings, pydicom for everything else.
- ``enhanced``: functional groups of a multi-frame image to what a single-frame header would say of each frame.
- ``partitions``: header rows on disk, in parts by a hash of the study.
- ``stacks``: rows of one study to stacks: parallel slices that agree in what a volume may not mix.
- ``select``: pure rules from stacks to one stack per exam and contrast, with a reason for every rejection.
- ``geometry``: slice order, spacing and affine along the true normal (mm, patient LPS).
- ``volume``: selected stack to stored pixel values.
- ``native``: pixels of uncompressed images straight from the file.
- ``codecs``: compressed pixels: which decoder, in which order, and whether the stream is what the header says.
- ``deidentify``: typed allow-list and keyed pseudonyms.
- ``store``: the contract: schema, writer, reader and verification of the Zarr slice store.
- ``convert``: one stack to one committed series.
- ``settle``: one part of the exams, whole: the unit of work.
- ``uid_index``: the private index of which identifiers became which pseudonyms.
- ``accounting``: one terminal state per file; the private and the shareable report.
- ``manifest_scan``: a few columns of the manifest, one part at a time: what a driver may hold.
- ``template_match``: volume to mid-sagittal slice by FFT correlation with templates.
- ``corrections``: mid-sagittal slices corrected by hand, accepted whole or not at all.
- ``png``: pixels to PNG.
- ``contact_sheet``: pages and a picture of the chosen slices, what needs a look first.
- ``midsagittal``: the choice for every study of a store: found, corrected, flagged, shown.
- ``pipeline``: the order of all this, on whatever runs the tasks.
- ``mapper``: where many calls of one function run.
- ``job``: runs the tasks on Ray: named, bounded, retried.
- ``resolve``: keys of label rows and image names to exams and slices of the store.
- ``link``: labels, gradings and annotation names to the store's pseudonyms.
- ``export``: series of a store as NIfTI and PNG.
- ``describe``: what a store holds, in words.
- ``exam``: one exam in this process, by the same code path.
- ``commit``: atomic files and directories, content hashes and the fail-points that tests kill at.

``python -m preprocess`` is the command line. Nothing here imports torch, and only ``job`` imports ray.
"""
