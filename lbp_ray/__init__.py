"""Lumbar-MRI back-pain studies: from a slice store to an out-of-fold report.

The rooms, in the order the data meets them:

- ``phantom``: synthetic lumbar cohort with known truth, written as real DICOM, CSV and CVAT XML.
- ``config``: YAML + ``key=value`` to frozen models, every error at once.
- ``runs``: every path a run reads or writes.
- ``cohort``: questionnaire to groups and labels.
- ``splits``: sealed hold-out and stratified group folds; saved, hashed, refused if leaky.
- ``roi``: rectangles to centroid to fixed crops, written as a crops artefact.
- ``nets``: plain modules and where their weights come from.
- ``features``: frozen-backbone features of every slice, computed once, shared by every trial.
- ``trial``: one fold x seed x slice count; no ray; resumable.
- ``tune``: plans the trials and runs them on Ray Tune; ``python -m lbp_ray.tune`` runs the study.
- ``distributed``: work spread over Ray tasks.
- ``metrics``: the eight metrics, thresholds, study rules and intervals.
- ``aggregate``: trial outputs to one complete out-of-fold table and one result object.
- ``report``: tables, figures and a self-contained HTML page from the result alone.
- ``predict``: one exam, DICOM to probability and evidence.
"""
