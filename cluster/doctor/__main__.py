"""One node of a SLURM step: ``python -m cluster.doctor ASK`` prints its facts.

People run ``python -m cluster doctor``.
"""

from __future__ import annotations

import os
import socket
import sys

from cluster.doctor.facts import Ask
from cluster.doctor.gather import gather
from cluster.doctor.lines import lines_of
from cluster.doctor.network import meet


def main() -> int:
    """Gather and print."""
    ask = Ask.model_validate_json(sys.argv[1])
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    facts = gather(ask, name)
    unreachable = meet(ask, name, nodes=facts.step_nodes)
    print("\n".join(lines_of(facts.model_copy(update={"unreachable": unreachable}))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
