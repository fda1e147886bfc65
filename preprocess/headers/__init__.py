"""Files → header rows, whatever the files are: nothing here decides, and nothing raised by a file leaves.

- ``index``: walk a messy tree, headers only; one row per image, with a code where the file is none.
- ``reader``: one header: a minimal reader for the common encodings, pydicom for everything else.
- ``enhanced``: functional groups of a multi-frame image to what a single-frame header would say of each frame.
"""
