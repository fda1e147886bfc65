"""Speed and memory as ratios, measured side by side in one run; ``python -m benchmarks`` prints JSON lines and a table.

- ``study_cost``: the whole study both ways, from the measured costs of an image and of a step.
- ``scaled_study``: a small study of 150 trials run whole both ways.
- ``scale``: what grows with a cohort: the split of millions, the memory of heads and of a trial's worker.
- ``frozen_stage``: cached features against the whole network in the loop.
- ``heads``: 150 last layers one by one against batched.
- ``peers``: Lightning, MONAI and a plain loop on the same data, with their logits.
- ``tune_overhead``: one process per trial against trials that wait for a named call.
- ``gpu_study``: the full-size study on one GPU without Ray; ``python -m benchmarks.gpu_study``.
- ``phantom_speed``: seconds per synthetic contrast.
- ``preprocess_speed``: conversion against dcm2niix, dicom2nifti and SimpleITK; header reading; two workers.
- ``preprocess_memory``: what driver and workers of the conversion hold.
- ``roi_masks``: the region finder's workers against a plain PyTorch loop.
- ``intervals``, ``optimism``: coverage of intervals, and what is gained by choosing on the evaluated fold.

Shared: ``timing`` (rounds in turn), ``arithmetic`` (counts times costs), ``synthetic`` (studies in memory), ``naive``
(the loop that most people would write), ``summary`` (table and picture).
"""
