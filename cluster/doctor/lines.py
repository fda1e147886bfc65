"""Facts as lines of a SLURM step's output, and back."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from cluster.doctor.facts import NodeFacts

if TYPE_CHECKING:
    from collections.abc import Iterator

MARK = "doctor-facts"
"""Begins every line of facts in a step's output."""

LINE_BYTES = 800
"""Bytes of facts per line: srun passes lines of several tasks on whole only while they are short."""


def lines_of(facts: NodeFacts) -> Iterator[str]:
    """Write a node's facts as short lines that may be mixed with those of others."""
    text = base64.b64encode(facts.model_dump_json().encode()).decode()
    for start in range(0, len(text), LINE_BYTES):
        yield f"{MARK} {facts.name} {text[start : start + LINE_BYTES]}"


def read_lines(output: str) -> Iterator[NodeFacts]:
    """Read the facts of all nodes from a step's output; what else stands there is left out."""
    texts: dict[str, str] = {}
    for line in output.splitlines():
        words = line.split(" ")
        if len(words) == 3 and words[0] == MARK:
            texts[words[1]] = texts.get(words[1], "") + words[2]
    for name in sorted(texts):
        try:
            yield NodeFacts.model_validate_json(base64.b64decode(texts[name]))
        except ValueError:
            continue  # a node that died while it wrote counts as silent
