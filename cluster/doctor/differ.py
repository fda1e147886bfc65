"""Judges of what must be alike on all nodes: versions, code, decoders, GPUs, clocks; and of nodes that say nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.doctor.findings import Finding, camps, named

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.doctor.facts import Survey

SKEW_WARNING_S = 1.0
"""Difference between two nodes' clocks from which logs and file times mislead."""

SKEW_BLOCKER_S = 60.0
"""Difference from which credentials that carry a time (MUNGE: five minutes) are soon refused."""


def silence(survey: Survey) -> Iterator[Finding]:
    """Find nodes that gave no facts, and those that have left the cluster."""
    if survey.departed:
        yield Finding(
            "warning",
            "answer",
            survey.departed,
            "Ray lists the node as dead",
            "it was stopped or scaled down on purpose, or lost: memory, network, hardware",
            "ray list nodes --filter state=DEAD --detail tells why; ray start there brings it back",
        )
    for node, reason in survey.silent.items():
        yield Finding(
            "blocker",
            "answer",
            (node,),
            f"no facts came: {reason}",
            "the node is down or drained, cannot be reached, or cannot run this project's Python",
            "sinfo -R (SLURM) or ray list nodes (Ray) tells its state; on the node, in the clone and its virtual "
            "environment, python -m cluster doctor --on here tells what else is wrong",
        )


def versions(survey: Survey) -> Iterator[Finding]:
    """Find packages whose version depends on the node."""
    for package in survey.nodes[0].versions if survey.nodes else ():
        found = camps({node.name: version for node in survey.nodes if (version := node.versions.get(package))})
        if len(found) > 1:
            odd = tuple(node for _, nodes in found[1:] for node in nodes)
            yield Finding(
                "blocker",
                "versions",
                odd,
                f"{package} " + "; ".join(f"{version} on {named(nodes)}" for version, nodes in found),
                "the nodes run different installations: numbers would depend on where a trial ran, and Ray refuses "
                "other versions of Python or of itself",
                "install once on shared storage, or alike on each node: pip install -c constraints.txt -e '.[codecs]'",
            )


def packages(survey: Survey) -> Iterator[Finding]:
    """Find packages that are not installed."""
    for node in survey.nodes:
        absent = [package for package, version in node.versions.items() if version is None]
        if absent:
            yield Finding(
                "blocker",
                "packages",
                (node.name,),
                f"not installed: {', '.join(absent)}",
                "another Python than the project's comes first in PATH, or the installation stopped half-way",
                "there, in the clone: . .venv/bin/activate && pip install -c constraints.txt -e '.[codecs]'",
            )


def code(survey: Survey) -> Iterator[Finding]:
    """Find nodes with other source files of this project."""
    found = camps({node.name: node.code for node in survey.nodes})
    for _, nodes in found[1:]:
        yield Finding(
            "blocker",
            "code",
            nodes,
            f"other source files of this project than on {named(found[0][1])}",
            "the nodes import different copies: an older installation, or a clone at another commit",
            "python -c 'import lbp_ray; print(lbp_ray.__path__)' on each shows which; bring them to one commit, or "
            "install from one clone on shared storage",
        )


def decoders(survey: Survey) -> Iterator[Finding]:
    """Find compressed DICOM that no decoder, or not every node, can read."""
    for syntax in survey.nodes[0].codecs if survey.nodes else ():
        without = tuple(node.name for node in survey.nodes if not node.codecs.get(syntax))
        if without:
            everywhere = len(without) == len(survey.nodes)
            yield Finding(
                "warning" if everywhere else "blocker",
                "codecs",
                without,
                f"no decoder of {syntax}",
                "files of this encoding would be rejected (transfer_syntax)"
                + ("" if everywhere else " or not, depending on the node that meets them"),
                "pip install -c constraints.txt -e '.[codecs]'",
            )
    other = camps({node.name: tuple(sorted(node.codecs.items())) for node in survey.nodes if all(node.codecs.values())})
    for _, nodes in other[1:]:
        yield Finding(
            "warning",
            "codecs",
            nodes,
            f"other decoders than on {named(other[0][1])}",
            "two decoders of lossy images may differ in the last bit",
            "pip install -c constraints.txt -e '.[codecs]' on all nodes",
        )


def gpu_models(survey: Survey) -> Iterator[Finding]:
    """Find GPUs of several models."""
    models = {node.name: tuple(sorted(set(node.gpus.driver))) for node in survey.nodes if node.gpus.driver}
    found = camps(models)
    if len({model for _, nodes in found for node in nodes for model in models[node]}) > 1:
        yield Finding(
            "warning",
            "GPU models",
            tuple(models),
            "; ".join(f"{', '.join(models[nodes[0]])} on {named(nodes)}" for _, nodes in found),
            "numbers of two models of GPU differ in the last digits; their trials are not put into one table",
            "choose one model (SLURM: --constraint or --gres=gpu:MODEL:N), or set "
            "evaluation.allow_mixed_environments=true",
        )


def vectors(survey: Survey) -> Iterator[Finding]:
    """Find CPUs with several kinds of vector instructions, where trials may run on CPUs."""
    known = {node.name: node.machine.vectors for node in survey.nodes if node.machine.vectors}
    found = camps(known)
    if len(found) > 1 and not survey.ask.trial_gpus:
        yield Finding(
            "warning",
            "CPU vectors",
            tuple(known),
            "; ".join(f"{name} on {named(nodes)}" for name, nodes in found),
            "numbers of CPUs with other vector instructions differ in the last digits; their trials are not put into "
            "one table",
            "choose one kind of node (SLURM: --constraint), or set evaluation.allow_mixed_environments=true",
        )


def clocks(survey: Survey) -> Iterator[Finding]:
    """Find clocks that differ, each held against the times of the same storage."""
    for index, folder in enumerate(survey.ask.storage):
        offsets = {node.name: node.storage[index].clock_offset_s for node in survey.nodes}
        known = {name: offset for name, offset in offsets.items() if offset is not None}
        first, last = (choose(known, key=known.__getitem__, default="") for choose in (min, max))
        skew_s = known[last] - known[first] if known else 0.0
        if skew_s >= SKEW_WARNING_S:
            yield Finding(
                "blocker" if skew_s >= SKEW_BLOCKER_S else "warning",
                "clocks",
                (first, last),
                f"{last} is {skew_s:.1f} s ahead of {first} (by the times of new files in {folder})",
                "no time service runs on one of them; logs cannot be put in order, and SLURM refuses credentials of "
                "the wrong time",
                "chronyc tracking, or timedatectl status, on both; an administrator: systemctl enable --now chronyd",
            )
            return


def clock_service(survey: Survey) -> Iterator[Finding]:
    """Find nodes of several whose kernel says that nothing keeps its clock right."""
    free = tuple(node.name for node in survey.nodes if node.clock_synchronised is False)
    if free and len(survey.nodes) > 1:
        yield Finding(
            "warning",
            "time service",
            free,
            "the clock is not synchronised",
            "no time service runs there (or a hypervisor keeps the clock, which the kernel does not know)",
            "chronyc tracking, or timedatectl status; an administrator: systemctl enable --now chronyd",
        )


JUDGES = (silence, versions, packages, code, decoders, gpu_models, vectors, clocks, clock_service)
