"""One study on a SLURM partition: a Ray cluster that lives as long as its job.

The text of a job
    ``spec`` says what is asked, ``render`` writes what sbatch reads, ``launch`` submits and follows, ``command`` is
    the command line.
Inside the job (standard library only, because a container may hold everything else)
    ``allocation`` runs in the batch step, ``node`` on every node, ``grant`` reads what SLURM granted, ``gather``
    waits for Ray's nodes, ``container`` puts commands into an image, ``processes`` ends what a process has started.
"""
