"""A study as a job on a Ray cluster that somebody has started: submitted once, followed, and ended with its exit code.

``token`` decides whether the token may be used, ``upload`` measures what is sent, ``package`` hashes it, ``submission``
decides what is started under which name, ``proxy`` keeps requests to this machine away from proxies, ``jobs`` talks to
the job server, ``command`` is the command line.
"""
