"""Series → mid-sagittal slice, with what a person needs to check it.

- ``match``: volume to slice by FFT correlation with templates.
- ``corrections``: slices corrected by hand, accepted whole or not at all.
- ``contact_sheet``: pages and a picture of the chosen slices, what needs a look first.
- ``choose``: the choice for every study of a store: found, corrected, flagged, shown.
"""
