"""Where and how the work runs, never what is computed.

``slurm`` runs a study inside a SLURM job, ``ray`` runs one as a job of a Ray cluster that is there, ``doctor`` checks
every node before one does. ``python -m cluster`` is their command line.
"""
