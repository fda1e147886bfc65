"""Lumbar-MRI back-pain studies: from a slice store to an out-of-fold report.

The rooms, in the order the data meets them:

- ``phantom``: synthetic lumbar cohort with known truth, written as real DICOM, CSV and CVAT XML.
- ``config``: YAML + ``key=value`` to frozen models, every error at once.
- ``study``: the configuration of a study, one model per section.
- ``runs``: every path a run reads or writes.
- ``cohort``: questionnaire to groups and labels.
- ``splits``: sealed hold-out and stratified group folds; saved, hashed, refused if leaky.
- ``roi``: annotated shapes or predicted masks to one box per exam and its crops.
- ``segment``: the region finder: annotated slices to out-of-fold masks; ``python -m lbp_ray.segment`` runs it.
- ``export``: crops as NIfTI and PNG, in the coordinates of their series.
- ``seal``: draws and commits a study's split before anything is trained; ``python -m lbp_ray.seal``.
- ``prepare``: everything that all trials of a study share, validated before any training.
- ``nets``: plain modules and where their weights come from.
- ``features``: frozen-backbone features of every slice, computed once, shared by every trial.
- ``cell``: what a trial is: its specification, its address, the data that all trials share.
- ``training``: the training loop of one trial.
- ``trial``: one fold x seed x slice count; no ray; resumable.
- ``tune``: plans the trials and runs them on Ray Tune; ``python -m lbp_ray.tune`` runs the study.
- ``native``: which arithmetic a device computes natively.
- ``distributed``: work spread over Ray tasks.
- ``metrics``: the eight metrics, thresholds, study rules and intervals.
- ``intervals``: how sure an area under the ROC curve is, and whether two differ on the same exams.
- ``result``: the one object that every table, figure and sentence comes from.
- ``out_of_fold``: trial outputs to one complete table; refuses gaps, duplicates and mixtures.
- ``permutation``: the frozen stage against labels shuffled among patients.
- ``association``: crop sources against labels shuffled among patients.
- ``aggregate``: the table to the one result object.
- ``report``: tables, figures and a self-contained HTML page from the result alone.
- ``unseal``: opens the sealed hold-out of a finished study and records it; ``python -m lbp_ray.unseal``.
- ``predict``: one exam, DICOM to probability and evidence.
"""
