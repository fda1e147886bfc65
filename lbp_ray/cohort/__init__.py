"""Who is in the study: questionnaire, readers' grades and acquisition → groups, labels, Tables 3 and 4.

The rooms, in the order a cohort meets them:

- ``questionnaire``: answers to groups by the Oulu study's rules, and every row that meets several of them or none.
- ``gradings``: readers' Pfirrmann and Modic grades, validated and adjudicated to one grade per disc.
- ``agreement``: weighted kappa of two readers, with an interval over patients.
- ``protocol``: acquisition parameters against those that the study wanted.
- ``summary``: all of the above as the one `lbp_ray.result.CohortSummary`.
- ``tables``: Tables 3 and 4, and the agreement of the readers, as CSV and Markdown.
- ``funnel``: a cohort's way from the register to the analysis, read from a CSV and drawn.

``python -m lbp_ray.cohort`` is the command line.
"""

from lbp_ray.cohort.questionnaire import ANSWERS, LABELS, CohortError, classify, label_exams, matched_rules
from lbp_ray.cohort.summary import summarise_cohort

__all__ = ["ANSWERS", "LABELS", "CohortError", "classify", "label_exams", "matched_rules", "summarise_cohort"]
