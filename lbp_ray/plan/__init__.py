"""What a study of some size costs before it runs: time, memory, disk and bottleneck of every stage. No Ray here.

- ``spans``: a quantity with its range.
- ``sizes``: what a study's work depends on, from a configuration and the store that it names.
- ``flops``: arithmetic and activations of ResNet50 at any crop size.
- ``counts``: sizes to passes, steps, operations and bytes; pure arithmetic.
- ``calibration``: what was measured on a machine, as a file that another plan can take.
- ``probes``: the micro-benchmarks of networks, as one of a trial's workers runs them.
- ``files``: the micro-benchmarks of conversion, crops and storage.
- ``calibrate``: all micro-benchmarks in one run, with as many workers at once as a study would have.
- ``hardware``: this machine, or a given one with what is assumed of it.
- ``predict``: counts and costs to stages.
- ``advice``: what breaks at a size, and what to set.
- ``check``: a prediction beside what a finished run took.
- ``render``: the plan as text.

``python -m lbp_ray.plan`` is the command line.
"""
