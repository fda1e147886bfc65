"""Speed and memory as ratios, measured side by side in one run; ``python -m benchmarks`` prints JSON lines.

- ``frozen_stage``: cached features against the whole network in the loop.
- ``phantom_speed``: seconds per synthetic contrast.
"""
