"""From one result object to the console table, the figures and one self-contained HTML page.

Everything here reads a `StudyResult`, and what was opened or scored for it later, and nothing else, so a saved result
can be rendered again anywhere, at any time: ``python -m lbp_ray.report RUN/result.json --out DIR``. The roles, in the
order the result meets them:

- ``checks``: refuses a result that cannot be reported (NaN, a missing metric, an interval of an optimistic result).
- ``words``: names, number formats and what a label-blind guess would score; shared by all that follows.
- ``optimism``: the mark and the sentences of a result that was judged by what was chosen on the evaluated fold.
- ``provenance``: where crops come from, and whether that depends on the label.
- ``verdict``: the plain-language paragraph and the "not distinguishable here" sentences.
- ``theme``: colours, type and deterministic SVG, for the page (light and dark) and for publication.
- ``figures``: estimates: overview, eight metrics, score distributions, confusion matrices, folds, permutation null.
- ``curves``: ROC, precision-recall and learning curves.
- ``sheets``: a table as the page shows it, as CSV and as Markdown.
- ``thesis_tables``: Tables 3, 4 and 5 of the Oulu thesis.
- ``readers``: rules and answers, two readers' agreement, acquisition protocol, doubled images.
- ``details``: the other level, areas by fold, slice counts compared, variance, scoring epochs, each fold alone, ways of
  judging.
- ``rules``: study rules at equal false-positive rates and the OR rule alone: tables and figures.
- ``holdout``: the opened hold-out: tables and figure of every opening.
- ``spectrum``: the groups that the study left out: table and figure.
- ``settings``: the thesis's open points beside what this study did.
- ``gallery``: every figure of the result with title, caption and alternative text; a new figure is one entry here.
- ``tables``: the console table, ``metrics.csv`` and ``metrics.md``.
- ``page``: `write_report`; fills ``report.html.j2`` with its parts and ``style.css``.
"""

from lbp_ray.report.page import write_report
from lbp_ray.report.tables import render_console

__all__ = ["render_console", "write_report"]
