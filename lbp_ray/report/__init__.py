"""From one result object to the console table, the figures and one self-contained HTML page.

Everything here reads a `StudyResult` and nothing else, so a saved result can be rendered again anywhere, at any time:
``python -m lbp_ray.report RUN/result.json --out DIR``. The roles, in the order the result meets them:

- ``checks``: refuses a result that cannot be reported (NaN, no slice count, a missing metric, curves that do not fit).
- ``words``: names, number formats and what a label-blind guess would score; shared by all that follows.
- ``provenance``: where crops come from, and whether that depends on the label.
- ``verdict``: the plain-language paragraph and the "not distinguishable here" sentences.
- ``theme``: colours, type and deterministic SVG, for the page (light and dark) and for publication.
- ``figures``: estimates: overview, eight metrics, score distributions, confusion matrices, folds, permutation null.
- ``curves``: ROC, precision-recall and learning curves.
- ``gallery``: every figure with its title, caption and alternative text; a new figure is one entry here.
- ``tables``: the console table, ``metrics.csv`` and ``metrics.md``.
- ``page``: `write_report`; fills ``report.html.j2`` and ``style.css``.
"""

from lbp_ray.report.page import write_report
from lbp_ray.report.tables import render_console

__all__ = ["render_console", "write_report"]
