"""Judges of what a node reaches: shared storage, inputs, weights, ports, other nodes."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from cluster.doctor.findings import Finding, camps, gigabytes, named
from cluster.doctor.gather import IMAGENET_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.doctor.facts import Survey

FREE_BLOCKER_BYTES, FREE_WARNING_BYTES = 10**9, 5 * 10**9
"""Room for results: a kept network takes 94 MB, and the study of 10 folds and 3 slice counts keeps 30."""

FREE_FILES = 10_000
"""Files that may still be made: a trial leaves about ten."""


FETCH_WEIGHTS = (
    "where there is a network: TORCH_HOME=/shared/torch python -c 'from torchvision.models import ResNet50_Weights as "
    "w; w.IMAGENET1K_V1.get_state_dict(check_hash=True)'; export the same TORCH_HOME for the run"
)
"""What brings ImageNet weights to nodes without a network."""


def storage(survey: Survey) -> Iterator[Finding]:
    """Find folders that are not shared, or in which a node cannot commit a file."""
    for path in survey.ask.absent:
        yield Finding(
            "blocker",
            "storage",
            (),
            f"neither {path} nor the folder above it is there",
            "the shared file system is not mounted on this machine, or LBP_RAY_ROOT or paths.runs is wrong",
            f"findmnt shows what is mounted; mkdir -p {shlex.quote(path)} if the place is right",
        )
    for path, error in survey.storage_errors.items():
        yield _unwritable((), path, error)
    for node in survey.nodes:
        for folder in node.storage:
            if str(folder.path) in survey.storage_errors:
                continue
            if not folder.token_seen:
                yield Finding(
                    "blocker",
                    "shared storage",
                    (node.name,),
                    f"{folder.path} does not show the file that this machine has just written there"
                    + (f" ({folder.error})" if folder.error else ""),
                    "the path is a local disk, or the shared one is not mounted there",
                    f"findmnt --target {folder.path} on both shows the file systems; set paths.runs to a shared one",
                )
            elif folder.error:
                yield _unwritable((node.name,), str(folder.path), folder.error)


def _unwritable(nodes: tuple[str, ...], path: str, error: str) -> Finding:
    return Finding(
        "blocker",
        "storage",
        nodes,
        f"{path}: a file could not be written, flushed and renamed: {error}",
        "the storage is mounted read-only, belongs to somebody else, is full, or the quota is used up",
        f"findmnt -o TARGET,OPTIONS --target {path}; ls -ld {path}; df -h {path}; quota -s",
    )


def echoes(survey: Survey) -> Iterator[Finding]:
    """Find nodes that wrote a file which this machine does not find."""
    for index, folder in enumerate(survey.ask.storage):
        here = survey.echoes.get(str(folder), ())
        wrote = (node for node in survey.nodes if node.storage[index].token_seen and not node.storage[index].error)
        lost = tuple(node.name for node in wrote if node.name not in here)
        if lost:
            yield Finding(
                "blocker",
                "shared storage",
                lost,
                f"files that they wrote to {folder} are not seen on this machine",
                "the storage caches folder listings (NFS actimeo), or each node writes to a copy of its own",
                f"findmnt --target {folder} shows the options; NFS: mount with lookupcache=positive or actimeo=1",
            )


def space(survey: Survey) -> Iterator[Finding]:
    """Find shared storage that is nearly full."""
    for index, folder in enumerate(survey.ask.storage):
        told = [facts for node in survey.nodes if not (facts := node.storage[index]).error and facts.token_seen]
        if not told:
            continue
        free = min(facts.free_bytes for facts in told)
        files = min((facts.free_files for facts in told if facts.free_files is not None), default=FREE_FILES)
        if free < FREE_WARNING_BYTES or files < FREE_FILES:
            yield Finding(
                "blocker" if free < FREE_BLOCKER_BYTES or not files else "warning",
                "space",
                (),
                f"{folder} has {gigabytes(free)}" + (f" and {files} files" if files < FREE_FILES else "") + " left",
                "the file system is nearly full; a trial that cannot commit fails after all retries",
                f"df -h {folder}; df -i {folder}; delete old runs, or set compute.keep_models=none",
            )


def inputs(survey: Survey) -> Iterator[Finding]:
    """Find inputs of the study that a node cannot read; those of the same nodes and reason in one finding."""
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for path in map(str, survey.ask.inputs):
        errors = {node.name: node.unreadable[path] for node in survey.nodes if path in node.unreadable}
        if errors:
            alike.setdefault((", ".join(sorted(set(errors.values()))), tuple(errors)), []).append(path)
    for (error, nodes), paths in alike.items():
        yield Finding(
            "blocker",
            "inputs",
            nodes,
            f"{', '.join(paths)}: {error}",
            "they lie on one machine only, a name or LBP_RAY_ROOT is wrong, or they may not be read",
            f"ls -l {shlex.join(paths)} on the node; put inputs on shared storage and name them so under paths",
        )


def weights(survey: Survey) -> Iterator[Finding]:
    """Find pretrained weights that are absent, damaged or not the same everywhere."""
    facts = {node.name: node.weights for node in survey.nodes if node.weights}
    absent = tuple(name for name, file in facts.items() if file.error)
    if absent:
        file = facts[absent[0]]
        yield Finding(
            "blocker",
            "weights",
            absent,
            f"{file.path}: {file.error}",
            "compute nodes have no network to download weights from, and nothing falls back to random ones",
            FETCH_WEIGHTS
            if survey.ask.weights == "imagenet"
            else "put the file on shared storage; set recipe.weights to it",
        )
    digits = IMAGENET_FILE.partition("-")[2].removesuffix(".pth")
    wrong = tuple(name for name, file in facts.items() if file.sha256 and not file.sha256.startswith(digits))
    if wrong and survey.ask.weights == "imagenet":
        yield Finding(
            "blocker",
            "weights",
            wrong,
            f"{facts[wrong[0]].path} is damaged: its SHA-256 does not begin with {digits}",
            "the download or copy stopped half-way",
            f"rm {facts[wrong[0]].path}; then, {FETCH_WEIGHTS}",
        )
    found = camps({name: file.sha256 for name, file in facts.items() if file.sha256})
    for _, nodes in found[1:]:
        yield Finding(
            "blocker",
            "weights",
            nodes,
            f"{facts[nodes[0]].path} is another file than on {named(found[0][1])}",
            "each node has a copy of its own; trials would start from different networks",
            "put one copy on shared storage (TORCH_HOME, or recipe.weights)",
        )


def ports(survey: Survey) -> Iterator[Finding]:
    """Find ports that somebody holds."""
    for port in survey.ask.ports:
        errors = {node.name: node.busy_ports[port] for node in survey.nodes if port in node.busy_ports}
        if errors:
            yield Finding(
                "blocker",
                "ports",
                tuple(errors),
                f"port {port}: {', '.join(sorted(set(errors.values())))}",
                "another Ray head, of somebody else or left over, or another service holds it",
                f"ss -ltnp 'sport = :{port}' shows your own; take another: ray start --port, --dashboard-port "
                "(python -m cluster slurm derives its ports from the job's number)",
            )


def network(survey: Survey) -> Iterator[Finding]:
    """Find nodes that cannot connect to each other."""
    for node in survey.nodes:
        if node.unreachable:
            yield Finding(
                "blocker",
                "network",
                (node.name,),
                "no connection to " + "; ".join(f"{other}: {why}" for other, why in node.unreachable.items()),
                "a firewall between compute nodes, or a name that resolves to another network",
                "an administrator must let compute nodes reach each other on TCP ports above 1024",
            )


def names(survey: Survey) -> Iterator[Finding]:
    """Find names that resolve to loopback, where other nodes must find them."""
    loopback = tuple(node.name for node in survey.nodes if node.address.startswith("127."))
    if survey.ask.mode == "slurm" and loopback and len(survey.nodes) > 1:
        yield Finding(
            "warning",
            "names",
            loopback,
            "the node's own name resolves to a loopback address",
            "/etc/hosts maps it to 127.0.1.1 (Debian does so); a head that gives this address is found by nobody",
            "getent hosts $(hostname); an administrator: map the name to the address of the cluster's network",
        )


JUDGES = (storage, echoes, space, inputs, weights, ports, network, names)
