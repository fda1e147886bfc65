"""Speed and memory as ratios, measured side by side in one run; ``python -m benchmarks`` prints JSON lines.

- ``frozen_stage``: cached features against the whole network in the loop.
- ``phantom_speed``: seconds per synthetic contrast.
- ``preprocess_speed``: conversion against dcm2niix, dicom2nifti and SimpleITK; header reading; two workers.
- ``preprocess_memory``: what driver and workers of the conversion hold.
- ``roi_masks``: the region finder's workers against a plain PyTorch loop.
"""
