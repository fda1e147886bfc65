"""The region of interest: from annotated shapes or predicted masks to one box per exam and its crops.

- ``annotations``: the lumbar region of annotated slices, as shapes, masks and centres.
- ``regions``: lumbar masks of every exam, as the region finder committed them.
- ``provenance``: which regions a study may crop by, and what the report must say of them.
- ``overrides``: what a person decides about crops, exam by exam.
- ``centres``: where each box is centred: an annotation, a predicted mask, or a person's word.
- ``box``: one box per study: size, place, neighbours, resampling, and the way back to the DICOM pixel grid.
- ``contact_sheet``: a picture of what was cropped.
- ``crops``: centres to fixed crops, written as a crops artefact with its review list.
"""
