"""Nodes and findings as text."""

from __future__ import annotations

import itertools
import textwrap
from typing import TYPE_CHECKING

from cluster.doctor.findings import Finding, gigabytes, named

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from cluster.doctor.facts import NodeFacts, Survey

WIDTH = 120
"""Characters of a line."""


def render(survey: Survey, findings: Sequence[Finding], *, checks: int) -> str:
    """Write a table of nodes, then what is wrong, each with its cause and what to do.

    Parameters
    ----------
    survey
        What was found out.
    findings
        What is wrong, in the order of the text.
    checks
        How many checks were made.
    """
    lines = [*_table(survey.nodes), ""]
    for finding, nodes in _merged(findings):
        lines += [*_paragraph(finding, nodes), ""]
    blockers = sum(finding.level == "blocker" for finding in findings)
    verdict = f"{blockers} blocker(s), {len(findings) - blockers} warning(s)" if findings else "nothing found"
    return "\n".join([*lines, f"{len(survey.nodes)} node(s), {checks} checks: {verdict}", ""])


def _table(nodes: Sequence[NodeFacts]) -> list[str]:
    header = ("node", "CPUs", "GPUs", "memory", "/dev/shm", "temp", "storage free")
    rows = [header, *(_row(node) for node in nodes)]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [texts[0], "  ".join("-" * width for width in widths), *texts[1:]]


def _row(node: NodeFacts) -> tuple[str, ...]:
    machine, offer = node.machine, node.offer
    cpus = min(machine.cpus_allowed, machine.cpu_quota or machine.cpus_allowed)
    return (
        node.name,
        f"{cpus:g}" + (f" ({offer.source}: {offer.cpus:g})" if offer else ""),
        f"{node.gpus.usable or 0}" + (f" ({offer.source}: {offer.gpus:g})" if offer else ""),
        gigabytes(min(machine.memory_bytes, machine.memory_limit or machine.memory_bytes)),
        gigabytes(machine.shm_bytes),
        str(node.temp.path),
        gigabytes(min(folder.free_bytes for folder in node.storage)) if node.storage else "not asked",
    )


def _merged(findings: Iterable[Finding]) -> Iterator[tuple[Finding, tuple[str, ...]]]:
    """Join neighbouring findings that differ in their nodes alone."""
    for _, same in itertools.groupby(findings, key=lambda finding: finding._replace(nodes=())):
        group = list(same)
        yield group[0], tuple(dict.fromkeys(node for finding in group for node in finding.nodes))


def _paragraph(finding: Finding, nodes: tuple[str, ...]) -> list[str]:
    where = f" on {named(nodes)}" if nodes else ""
    parts = {
        f"{finding.level.upper()}  {finding.check}{where}: ": finding.found,
        "  cause: ": finding.cause,
        "  fix:   ": finding.fix,
    }
    return [line for start, text in parts.items() for line in _wrapped(start, text)]


def _wrapped(start: str, text: str) -> list[str]:
    # Long words are left whole: paths and commands are copied from here.
    return textwrap.wrap(start + text, WIDTH, subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False)
