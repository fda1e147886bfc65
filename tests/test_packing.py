"""How trials are placed on GPUs, and what runs there, as far as a CPU can tell."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import tempfile
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from study_factory import make_data, make_spec, random_backbone, with_features

from lbp_ray.cell import Shared, TrialError
from lbp_ray.distributed import worker
from lbp_ray.distributed.waiter import SEE_ALL_GPUS, on_given_gpu, options
from lbp_ray.gpu import CropsOnGpu, RecordedStep, why_not_held
from lbp_ray.nets.resnet import standardise
from lbp_ray.nets.weights import load_backbone_weights, weights_sha256
from lbp_ray.packing import CONTEXT_BYTES, MOST_PER_GPU, Peak, gpus_for, measure_peak
from lbp_ray.resident import Resident
from lbp_ray.runs import RunError
from lbp_ray.samples import SamplesOnGpu
from lbp_ray.steps import adam, training_step
from lbp_ray.study import ComputeConfig
from lbp_ray.training import Training

GIB = 2**30


@pytest.mark.parametrize(
    ("taken", "total", "trials"),
    [(6, 141, 8), (20, 80, 3), (24, 80, 3), (25, 80, 2), (40, 80, 1), (79, 80, 1), (0, 80, 8)],
)
def test_as_many_trials_share_a_gpu_as_fit(taken, total, trials):
    share = gpus_for(Peak(taken * GIB, total * GIB))
    assert int(1 / share) == trials <= MOST_PER_GPU
    assert trials == 1 or trials * taken <= 0.9 * total


@pytest.mark.parametrize("trials", range(1, MOST_PER_GPU + 1))
def test_a_share_is_one_that_ray_can_count(trials):
    """Rounded up to a ten-thousandth, six shares of a sixth would be more than a GPU, and five would run."""
    share = gpus_for(Peak(900, 1000 * trials))
    assert round(share * 10_000) * trials <= 10_000
    assert share * 10_000 == pytest.approx(round(share * 10_000))


@pytest.mark.parametrize(
    ("given", "workers", "gpus"),
    [
        ({}, 1, 0.0),
        ({"gpus_per_trial": 0.25}, 1, 0.25),
        ({"gpus_per_trial": 1}, 1, 1.0),
        ({"gpus_per_trial": 4}, 4, 1.0),
        ({"gpus_per_trial": "auto"}, 1, 1.0),
        ({"workers_per_trial": 2}, 2, 0.0),
    ],
    ids=str,
)
def test_workers_of_a_trial(given, workers, gpus):
    compute = ComputeConfig(**given)
    assert (compute.workers, compute.gpus_per_worker) == (workers, gpus)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpus_per_trial": 1.5}, "several GPUs per trial must be a whole number"),
        ({"gpus_per_trial": -1}, "greater than or equal to 0"),
        ({"gpus_per_trial": "all"}, "'auto'"),
        ({"gpus_per_trial": 2, "workers_per_trial": 2}, "set one of the two"),
        ({"gpus_per_trial": "auto", "workers_per_trial": 2}, "set one of the two"),
    ],
    ids=str,
)
def test_what_no_trial_can_run_on_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ComputeConfig(**given)


def test_packing_does_not_change_what_a_trial_is():
    from lbp_ray.config import load_config
    from lbp_ray.study import StudyConfig
    from lbp_ray.tune import plan_trials

    hashes = {"crops_hash": "c", "split_hash": "s", "weights_hash": "w"}
    path = Path(__file__).parents[1] / "configs" / "demo.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBP_RAY_ROOT", "/data")
        planned = [
            plan_trials(load_config(StudyConfig, path, [f"compute.gpus_per_trial={gpus}"]), **hashes)
            for gpus in ("0.25", "1", "auto", "4")
        ]
    first, *others = ([spec.trial_id for spec in specs] for specs in planned)
    assert [first == other for other in others] == [True, True, False]


NODES = """
import ray
from ray.cluster_utils import Cluster
from lbp_ray.distributed import waiter
head = {"num_cpus": 2, "num_gpus": 2, "resources": {"a": 1}, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
cluster.add_node(num_cpus=1, num_gpus=1, resources={"b": 1})
cluster.add_node(num_cpus=0, num_gpus=1)
ray.init(address=cluster.address, log_to_driver=False)
@ray.remote
def measured_share(shared, small):
    if small == "both":
        raise ValueError("does not fit")
    here = ray.get_runtime_context().get_node_id()
    (found,) = [node["Resources"] for node in ray.nodes() if node["NodeID"] == here]
    return (1.0, "one") if small in found else (0.125, "eight")
waiter.measured_share = measured_share
for small in ("a", "b", "both"):
    try:
        print(waiter.largest_share(None, small, {"CPU": 1.0, "GPU": 1.0}))
    except ValueError as error:
        print(type(error).__name__, error)
ray.shutdown()
cluster.shutdown()
"""
"""Three nodes with GPUs, those of one smaller; the third has no CPU for a trial."""


@pytest.mark.ray
def test_the_smallest_gpu_of_the_cluster_decides_how_many_trials_share_one():
    """Eight trials that fit on one node's GPU would run out of memory on the other's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # else every ray.init() of this machine finds the cluster
        done = subprocess.run(
            [sys.executable, "-c", NODES],
            check=True,
            timeout=300,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"RAY_TMPDIR": folder},
        )
    least = "(1.0, 'one (fewest of the GPUs of 2 nodes)')"
    assert done.stdout.splitlines() == [least, least, "ValueError does not fit"]


def test_a_gpu_that_holds_no_trial_is_named_before_any_starts(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Training, "rehearse", full)
    data = with_features(make_data([0, 0, *[1] * 4]), random_backbone())
    with pytest.raises(RunError, match=r"does not fit on a GPU of node .*Tried to allocate 2 GiB.*--num-gpus"):
        measure_peak(make_spec(), data, Resident(random_backbone()))


@pytest.mark.parametrize("gpus", [1, 8])
def test_a_trial_takes_room_for_the_contexts_of_visitors(monkeypatch, gpus):
    """Processes go from GPU to GPU and leave a context on each: one of every other GPU for each trial that runs."""
    monkeypatch.setattr(Training, "rehearse", lambda *_: None)
    read = {
        "mem_get_info": (75 * GIB, 80 * GIB),
        "memory_reserved": 4 * GIB,
        "max_memory_reserved": 6 * GIB,
        "device_count": gpus,
    }
    for name, value in read.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    data = with_features(make_data([0, 0, *[1] * 4]), random_backbone())
    peak = measure_peak(make_spec(unfrozen_epochs=0), data, Resident(random_backbone()))
    assert peak == (GIB + 6 * GIB + (gpus - 1) * CONTEXT_BYTES, 80 * GIB)


def test_a_process_that_is_given_another_gpu_lets_the_first_go(monkeypatch):
    """Whoever runs there now was packed without what this process held."""
    paths = dict.fromkeys(("crops", "split", "features"))
    weights_hash = weights_sha256(load_backbone_weights("random"))
    places = [
        Shared(**paths, weights="random", weights_seed=0, weights_hash=weights_hash, device=device)
        for device in ("cpu", "cpu:0")
    ]
    worker.folded(places[0])
    held = [weakref.ref(value) for value in (worker.resident(places[0]), worker.folded(places[0]))]
    left = []
    build = worker.build_backbone
    monkeypatch.setattr(worker, "build_backbone", lambda state: left.extend(ref() for ref in held) or build(state))
    worker.resident(places[1])
    worker.resident.cache_clear()
    assert left == [None, None]


# --- which GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "visible", "device"),
    [([], "", "cuda"), ([1], "", "cuda:1"), (["3"], "2,3", "cuda:1"), (["GPU-b"], "GPU-a,GPU-b", "cuda:1")],
)
def test_a_used_process_takes_the_gpu_that_it_was_given(monkeypatch, given, visible, device):
    monkeypatch.setattr("ray.get_gpu_ids", lambda: given)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    paths = dict.fromkeys(("crops", "split", "features"))
    shared = Shared(**paths, weights="random", weights_seed=0, weights_hash="w", device="cuda")
    assert on_given_gpu(shared).device == device


@pytest.mark.ray
def test_ray_lets_a_process_see_all_gpus_and_uses_it_again():
    code = f"""
import os, ray
@ray.remote
def call():
    return os.getpid(), [str(number) for number in ray.get_gpu_ids()], os.environ.get("CUDA_VISIBLE_DEVICES")
ray.init(address="local", num_cpus=1, num_gpus=2, include_dashboard=False, log_to_driver=False)
seen = [ray.get(call.options(**{options("x", {"CPU": 1.0, "GPU": 0.5})!r}).remote()) for _ in range(3)]
assert len({{pid for pid, _, _ in seen}}) == 1, seen
assert all(len(given) == 1 and not visible for _, given, visible in seen), seen
"""
    assert "SEE_ALL_GPUS" not in code
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert "runtime_env" not in options("x", {"CPU": 1.0, "GPU": 0.0})
    assert options("x", {"CPU": 1.0, "GPU": 1.0})["runtime_env"] == SEE_ALL_GPUS


# --- what runs there -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "value"), [(np.uint16, 65535), (np.int16, -32768)])  # beyond the other type
def test_crops_on_a_device_are_standardised_as_elsewhere(dtype, value):
    crops_NKHW = make_data([0, 0, 1, 1]).crops_NKHW.astype(dtype)
    crops_NKHW[0, 0, 0, 0] = value
    assert not why_not_held(crops_NKHW, 4)
    held = CropsOnGpu(crops_NKHW, np.array([3, 0, 2]), "cpu")
    images = held.images(torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1]))
    expected = standardise(torch.from_numpy(crops_NKHW[[3, 0, 0], [2, 0, 1]]))
    torch.testing.assert_close(images, expected, rtol=1e-6, atol=1e-6)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_blank_crop_is_refused_before_training():
    data = make_data([0, 0, 1, 1])
    data.crops_NKHW[2, 1] = 7
    with pytest.raises(TrialError, match="crop 1 of study 2 is constant"):
        CropsOnGpu(data.crops_NKHW, np.arange(4), "cpu")


@pytest.mark.parametrize(
    ("dtype", "held_bytes", "reason"),
    [(np.int32, 10**9, "their type is int32, neither uint16 nor int16"), (np.int16, 9, "49,152 bytes, at most 9 are")],
)
def test_crops_that_do_not_stay_on_a_gpu_are_told_of_once(monkeypatch, caplog, dtype, held_bytes, reason):
    monkeypatch.setattr("lbp_ray.gpu.HELD_BYTES", held_bytes)
    data = make_data([0, 0, 1, 1])
    data = replace(data, crops_NKHW=data.crops_NKHW.astype(dtype))
    resident = Resident(torch.nn.Identity(), device="cuda")
    assert [resident.crops(data), resident.crops(data)] == [None, None]
    (told,) = caplog.messages
    assert "the crops do not stay on cuda" in told
    assert reason in told


def test_convolutions_on_a_gpu_neither_round_nor_vary(monkeypatch):
    flags = torch.backends.cudnn
    for name, before in (("allow_tf32", True), ("deterministic", False)):
        monkeypatch.setattr(flags, name, before)
    Resident(torch.nn.Identity(), device="cpu")
    assert (flags.allow_tf32, flags.deterministic) == (True, False)
    Resident(torch.nn.Identity(), device="cuda")
    assert (flags.allow_tf32, flags.deterministic) == (False, True)


def test_a_step_that_cannot_be_recorded_runs_as_it_is(caplog):
    """Without a GPU every recording fails; the head must come out as if none had been tried."""
    heads, (plain, step), optimisers = make_heads(torch.randn(12, 3))
    recorded = RecordedStep(step, optimisers[1], batch_size=2)
    for rows in torch.arange(12).split(2):
        batch = SamplesOnGpu(rows, rows)
        assert torch.equal(plain(batch), recorded(batch))
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert [record.message.partition(" as a CUDA")[0] for record in caplog.records] == [
        "the training step could not be recorded"
    ]


class FakeCuda:
    """CUDA's graphs and streams, by name: what is recorded runs when the graph is replayed, and not before."""

    def __init__(self, monkeypatch, fault=None):
        self.fault, self.current, self.recording, self.replays = fault, "default", False, 0
        self.recorded = None
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "capture")
        for name in ("stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, _, *, stream):
        self.current, self.recording = stream, True
        try:
            yield
        finally:
            self.recording = False
            if self.fault:  # as PyTorch's: the end of a broken capture raises and leaves its stream
                raise RuntimeError("operation failed due to a previous error during capture")
        self.current = "default"

    def replay(self):
        self.replays += 1
        self.recorded._loss.copy_(self.recorded._step(self.recorded._batch))

    def step(self, step):
        def run(batch):
            if self.recording:
                if self.fault:
                    raise self.fault
                return torch.zeros(())
            return step(batch)

        return run


def make_heads(features):
    """Two equal heads, the step that trains each on `features`, and their optimisers."""
    heads = [torch.nn.Linear(features.shape[1], 1) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    targets = torch.arange(len(features))[:, None] % 2 * 1.0
    optimisers = [adam(list(head.parameters()), make_spec().recipe) for head in heads]
    steps = [
        training_step(lambda batch, head=head: head(features[batch.study_M]), optimiser, targets)
        for head, optimiser in zip(heads, optimisers, strict=True)
    ]
    return heads, steps, optimisers


def test_replayed_steps_train_as_those_that_run_as_they_are(monkeypatch):
    """Three full batches warm up; later ones are replayed, but smaller ones are not, whenever they come."""
    cuda = FakeCuda(monkeypatch)
    heads, (plain, step), optimisers = make_heads(torch.randn(15, 3))
    eager = []
    recorded = cuda.recorded = RecordedStep(
        cuda.step(lambda batch: eager.append(batch.size) or step(batch)), optimisers[1], batch_size=2
    )
    batches = [SamplesOnGpu(rows, rows) for rows in torch.arange(15).split([2, 2, 2, 2, 2, 1, 2, 2])]
    replays, losses = [], []
    for batch in batches:
        losses.append((plain(batch), recorded(batch)))
        replays.append(cuda.replays)
    assert replays == [0, 0, 0, 1, 2, 2, 3, 4]
    assert eager == [2] * 5 + [1] + [2] * 2  # the fake graph runs the step, too
    assert all(torch.equal(first, second) for first, second in losses)
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_a_recording_that_fails_leaves_the_stream_as_it_was(monkeypatch, caplog):
    cuda = FakeCuda(monkeypatch, RuntimeError("asked the device"))
    heads, (plain, step), optimisers = make_heads(torch.randn(12, 3))
    recorded = RecordedStep(cuda.step(step), optimisers[1], batch_size=2)
    for rows in torch.arange(12).split(2):
        assert torch.equal(plain(SamplesOnGpu(rows, rows)), recorded(SamplesOnGpu(rows, rows)))
        assert cuda.current == "default"
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert "asked the device" in caplog.text


def test_a_recording_that_runs_out_of_memory_ends_the_trial(monkeypatch):
    cuda = FakeCuda(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    _, (_, step), optimisers = make_heads(torch.randn(8, 3))
    recorded = RecordedStep(cuda.step(step), optimisers[1], batch_size=2)
    batches = [SamplesOnGpu(rows, rows) for rows in torch.arange(8).split(2)]
    for batch in batches[:-1]:
        recorded(batch)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        recorded(batches[-1])


@pytest.mark.parametrize("ended", [True, False], ids=["to the end", "left"])
def test_recorded_steps_go_with_their_trial(tmp_path, ended):
    """They hold a GPU's memory and, by what they call, the trial: nothing may be left to a later collection."""
    data = with_features(make_data([0, 0, *[1] * 4]), random_backbone())
    training = Training(make_spec(frozen_epochs=2, unfrozen_epochs=0), data, Resident(random_backbone()))
    step = training_step(training.frozen_logits, training.optimiser, training.targets_N1)
    training._steps["frozen", 1e-3] = RecordedStep(step, training.optimiser, batch_size=2)
    alive = weakref.ref(training)
    gc.collect()
    gc.disable()
    try:
        epochs = training.epochs(tmp_path / "none.pt")
        for _ in epochs if ended else zip(range(1), epochs, strict=False):
            pass
        del training, step, epochs, _
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_second_gpu_of_a_process_trains_as_the_first(tmp_path):
    """Trials of one process on one GPU after the other; the graph of each is recorded where its data are."""
    data = with_features(make_data([0, 0, *[1] * 40]), random_backbone())
    curves = []
    for number in (0, 1, 0):
        training = Training(make_spec(frozen_epochs=3), data, Resident(random_backbone(), device=f"cuda:{number}"))
        curves.append([record.train_loss for record in training.epochs(tmp_path / f"{len(curves)}.pt")])
    np.testing.assert_allclose(curves[1:], [curves[0]] * 2, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_recording_that_fails_on_a_gpu_leaves_its_stream():
    head, before = torch.nn.Linear(1, 1).to("cuda"), torch.cuda.current_stream()
    recorded = RecordedStep(
        lambda batch: torch.tensor(batch.study_M.sum().item()),
        adam(list(head.parameters()), make_spec().recipe),
        batch_size=2,
    )
    rows = torch.arange(2, device="cuda")
    assert [recorded(SamplesOnGpu(rows, rows)).item() for _ in range(5)] == [1] * 5
    assert torch.cuda.current_stream() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_trial_leaves_no_memory_on_a_gpu(tmp_path):
    data = with_features(make_data([0, 0, *[1] * 40]), random_backbone())
    resident, left = Resident(random_backbone(), device="cuda"), []
    for trial in range(3):
        list(Training(make_spec(frozen_epochs=2), data, resident).epochs(tmp_path / f"{trial}.pt"))
        left.append(torch.cuda.memory_allocated())
    assert left[2] == left[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_trains_what_a_cpu_trains(monkeypatch):
    data = with_features(make_data([0, 0, *[1] * 40]), random_backbone())
    spec, curves = make_spec(frozen_epochs=2), []
    for device, warm_up in (("cpu", 3), ("cuda", 10**9), ("cuda", 3)):
        monkeypatch.setattr("lbp_ray.gpu.WARM_UP_STEPS", warm_up)
        training = Training(spec, data, Resident(copy.deepcopy(random_backbone()), device=device))
        curves.append([training._epoch(epoch, "frozen").train_loss for epoch in (1, 2)])
        training.unfreeze()
        curves[-1].append(training._epoch(3, "unfrozen").train_loss)
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-2)
    np.testing.assert_allclose(curves[2], curves[1], rtol=1e-3)
    peak = measure_peak(spec, data, Resident(random_backbone(), device="cuda"))
    assert 0 < peak.taken < peak.total
