"""``python -m cluster``: slurm, job, doctor: where a study runs, and whether it can run there."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "slurm": ("cluster.slurm.command", "run a command on a Ray cluster of its own inside a SLURM job"),
    "job": ("cluster.ray.command", "run a command as a job on a Ray cluster that runs already"),
    "doctor": ("cluster.doctor.command", "check every node before a study does"),
}
"""Module and purpose of every command; the module is imported when the command is called."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, call, report; return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    ours, command = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    top = argparse.ArgumentParser(prog="python -m cluster", description=__doc__)
    names = top.add_subparsers(dest="subcommand", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, (module, purpose) in COMMANDS.items():
        parser = names.add_parser(name, help=purpose, description=purpose)
        if ours and ours[0] == name:
            importlib.import_module(module).add_arguments(parser)
    parsed = top.parse_args(ours)
    parsed.command = command
    try:
        return int(importlib.import_module(COMMANDS[parsed.subcommand][0]).run(parsed))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
