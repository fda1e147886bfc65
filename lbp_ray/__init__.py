"""Lumbar-MRI back-pain studies: from a slice store to an out-of-fold report.

The rooms, in the order the data meets them:

- ``phantom``: synthetic lumbar cohort with known truth, written as real DICOM, CSV and CVAT XML.
- ``config``: YAML + ``key=value`` to frozen models, every error at once.
- ``study``: the configuration of a study, one model per section.
- ``runs``: every path a run reads or writes.
- ``cohort``: questionnaire and gradings to groups, labels and the tables of a cohort; ``python -m lbp_ray.cohort``.
- ``splits``: sealed hold-out and stratified group folds; saved, hashed, refused if leaky.
- ``roi``: annotated shapes or predicted masks to one box per exam and its crops.
- ``segment``: the region finder: annotated slices to out-of-fold masks; ``python -m lbp_ray.segment`` runs it.
- ``duplicates``: exams of different patients that show the same pixels.
- ``export``: crops as NIfTI and PNG, in the coordinates of their series.
- ``seal``: draws and commits a study's split before anything is trained; ``python -m lbp_ray.seal``.
- ``prepare``: everything that all trials of a study share, validated before any training.
- ``nets``: plain modules and where their weights come from.
- ``features``: frozen-backbone features of every slice, computed once, shared by every trial.
- ``cell``: what a trial is: its specification, its address, the data that all trials share.
- ``samples``: slices as independent samples, and the order in which an epoch takes them.
- ``resident``: what a process keeps between trials.
- ``training``: the training loop of one trial.
- ``selection``: which epoch of a trial scores, decided from its learning curve alone.
- ``streaming``: features that stay on disk: the order of an epoch by blocks, and its reader.
- ``sharing``: what the workers of one trial tell each other.
- ``gpu``: what a trial does on a GPU alone.
- ``packing``: how many trials share a GPU.
- ``trial``: one fold x seed x slice count; no ray; resumable.
- ``tune``: plans the trials and runs them on Ray Tune; ``python -m lbp_ray.tune`` runs the study.
- ``plan``: what a study of some size costs before it runs; ``python -m lbp_ray.plan``.
- ``native``: which arithmetic a device computes natively.
- ``distributed``: work spread over Ray tasks.
- ``metrics``: the eight metrics, thresholds, study rules and resamples of patients.
- ``intervals``: how sure a metric is, and whether two areas under the ROC curve differ on the same exams.
- ``result``: the one object that every table, figure and sentence comes from.
- ``out_of_fold``: trial outputs to one complete table; refuses gaps, duplicates and mixtures.
- ``summaries``: decisions to metrics with their intervals over patients and spread over models.
- ``ensemble``: what is averaged where, and the threshold of the average.
- ``rules``: study rules at equal false-positive rates.
- ``variance``: how much patients, folds and seeds move the area under the ROC curve.
- ``choices``: what the thesis leaves open, the options, their defaults and what each changes.
- ``permutation``: the frozen stage against labels shuffled among patients.
- ``association``: crop sources against labels shuffled among patients.
- ``aggregate``: the table to the one result object.
- ``report``: tables, figures and a self-contained HTML page from the result alone.
- ``finished``: a finished result read back, checked, and its report rendered again.
- ``unseal``: opens the sealed hold-out of a finished study and records it; ``python -m lbp_ray.unseal``.
- ``excluded``: scores of the subjects that a study left out; ``python -m lbp_ray.excluded``.
- ``predict``: one exam, DICOM to probability and evidence.
"""
