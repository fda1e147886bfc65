"""Work spread over Ray: the only package, with ``lbp_ray.tune``, that imports ray.

- ``worker``: what one Ray worker process keeps between calls; the remote call of a feature shard.
- ``waiter``: the Tune trial that waits for the remote call of its cell, without importing torch.
- ``extract``: feature shards over all workers, resumable, assembled into one table.
- ``regions``: region finders as Tune trials of Ray Train workers, masks by actors that hold a network.
"""
