"""Work spread over Ray: the only package, with ``lbp_ray.tune``, that imports ray.

- ``worker``: what one Ray worker process keeps between calls; the remote call of a feature shard.
- ``waiter``: the Tune trial that waits for the remote call of its cell, without importing torch.
- ``tuning``: Ray Tune over the trials that are missing, gone on with where Tune itself would give up.
- ``workers``: the workers of one network, by Ray Train, inside a trial that waits for them.
- ``ddp``: a trial shared by several workers, Ray Train inside the Tune trial.
- ``progress``: the console's table of trials with slices per second and remaining time, and the study's gauges.
- ``trackers``: MLflow and W&B, offline first.
- ``extract``: feature shards over all workers, resumable, assembled into one table.
- ``regions``: region finders as Tune trials of Ray Train workers, masks by actors that hold a network.
"""
