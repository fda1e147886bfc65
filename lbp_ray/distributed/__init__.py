"""Work spread over Ray: the only package, with ``lbp_ray.tune``, that imports ray.

- ``worker``: what one Ray worker process keeps between calls, and the two remote calls (feature shard, cell).
- ``extract``: feature shards over all workers, resumable, assembled into one table.
"""
