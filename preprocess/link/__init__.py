"""Labels, gradings and annotation names → the store's pseudonyms.

- ``uid_index``: the private index of which identifiers became which pseudonyms.
- ``resolve``: keys of label rows and image names to exams and slices of the store.
- ``link``: tables and annotation files, translated, with an account of every row.
"""
