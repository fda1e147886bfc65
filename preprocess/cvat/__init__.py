"""Annotations as CVAT writes them: boxes, polygons and masks of images, in and out.

- ``shapes``: one model of what is drawn on an image: moved by flips, rasterised, run lengths both ways.
- ``document``: CVAT XML, streamed, with every number checked.
- ``backup``: task backups: shapes as JSON, images by manifest.
- ``read``: any layout that CVAT exports to images with their shapes.
- ``write``: images with their shapes to the XML that CVAT imports.
"""
