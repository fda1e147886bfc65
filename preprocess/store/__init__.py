"""THE CONTRACT: the Zarr slice store, and everything that reads or writes one.

- ``schema``: layout, columns and hashes.
- ``paths``: the store and its siblings.
- ``write``: series, manifest and candidates, each committed whole.
- ``read``: a complete store, and a refusal of any other.
- ``verify``: every fault, by name.
- ``scan``: a few columns of the manifest, one part at a time: what a driver may hold.
- ``describe``: what a store holds, in words.
- ``export``: series as NIfTI and PNG.
- ``png``: pixels to PNG.
"""
