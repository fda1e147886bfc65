"""Selected files → stored pixel values.

- ``volume``: a stack of files to one array in canonical orientation.
- ``native``: pixels of uncompressed images straight from the file.
- ``codecs``: compressed pixels: which decoder, in which order, and whether the stream is what the header says.
"""
