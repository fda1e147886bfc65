"""Labels, gradings, annotations and masks → the store's pseudonyms.

- ``uid_index``: the private index of which identifiers became which pseudonyms.
- ``resolve``: keys of label rows and image names to exams and slices of the store.
- ``source``: what every file to link has in common.
- ``table``: labels and gradings.
- ``drawn``: CVAT exports, whose shapes move with the flips of the stored slices.
- ``masks``: folders of PNG and NIfTI masks, on the grid of the store or refused.
- ``link``: all of them, translated, with an account of every row.
"""
