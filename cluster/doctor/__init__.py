"""``python -m cluster doctor``: what would go wrong on this cluster, with cause and fix, before a study is started.

Facts are gathered on every node, then judged by small pure functions:

- ``facts``: what is asked and told, as plain data that travels as JSON.
- ``probe``: shared storage tried out with a token and a file of each node.
- ``machine``: CPUs, memory, GPUs, limits and clock of one machine.
- ``gather``: all facts of the node that it runs on.
- ``network``: whether the nodes of a SLURM step reach each other.
- ``lines``: facts as lines of a SLURM step's output, and back.
- ``nodes``: facts from this machine, the nodes of a Ray cluster or a SLURM step.
- ``findings``: what a judge says.
- ``differ``: judges of what must be alike on all nodes.
- ``reach``: judges of storage, inputs, weights, ports and network.
- ``room``: judges of CPUs, memory, GPUs and temporary files.
- ``safety``: judges of token, proxy and upload.
- ``render``: nodes and findings as text.
- ``command``: the command line.
"""
