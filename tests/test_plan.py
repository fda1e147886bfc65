"""The planner: counts of the thesis's study, what holds a stage up, calibrations and comparisons."""

from __future__ import annotations

import json
import os

import numpy as np
import pandas as pd
import pytest

from lbp_ray.native import for_device
from lbp_ray.plan.__main__ import main
from lbp_ray.plan.advice import advise
from lbp_ray.plan.calibrate import calibrate
from lbp_ray.plan.calibration import Calibration, Costs, Machine
from lbp_ray.plan.check import compare, read_finished
from lbp_ray.plan.counts import cells, count
from lbp_ray.plan.flops import PARAMETERS, image_cost
from lbp_ray.plan.hardware import Wish, describe_hardware
from lbp_ray.plan.predict import Plan, bottleneck, makespan, predict, trial_bytes
from lbp_ray.plan.render import duration, size
from lbp_ray.plan.sizes import oulu_config, sizes_of
from lbp_ray.plan.spans import PlanError, Span

STAGES = (
    "convert", "mid-sagittal", "crops", "extraction", "heads",
    "unfrozen epochs", "evaluation", "permutations", "aggregation", "report",
)  # fmt: skip


def make_sizes(studies=526, **given):
    sizes = sizes_of(for_device(oulu_config(), gpu=True), studies=studies)
    return sizes.model_validate({**sizes.model_dump(), "dtype": "bfloat16", **given})


def around(value):
    return Span(low=0.9 * value, middle=value, high=1.2 * value)


def make_calibration(*, device="cpu", **costs):
    """Costs of a quiet core, as the project's design measured them."""
    seconds = {
        "extraction_s": 0.18, "evaluation_s": 0.09, "training_s": 0.26, "optimiser_s": 0.03, "head_step_s": 0.0004,
        "permutation_step_s": 0.002, "start_s": 5.0, "convert_slice_s": 0.005, "header_s": 0.0001, "locate_s": 0.08,
        "crop_s": 0.03, "bootstrap_s": 1e-7, "gemm_float32_flop_s": 90e9, "gemm_bfloat16_flop_s": 209e9,
        "read_bytes_s": 1e9, "write_bytes_s": 5e8,
    }  # fmt: skip
    spans = {name: around(value) for name, value in {**seconds, **costs}.items()}
    gpus = int(device == "cuda")
    return Calibration(
        machine=Machine(
            device=device, name="core", cores=2, gpus=gpus, memory_bytes=24 * 10**9, gpu_memory_bytes=gpus * 80 * 10**9,
            torch="2", load=0.1,
        ),
        height_px=400, width_px=200, probe_images=32, batch_size=32, dtype="bfloat16", threads=1, permutations=200,
        workers=2, storage="/runs", took_s=40.0, costs=Costs(worker_bytes=600_000_000, store_ratio=0.54, **spans),
    )  # fmt: skip


def make_plan(sizes=None, *, calibration=None, **wish):
    sizes, calibration = sizes or make_sizes(), calibration or make_calibration()
    plan = predict(sizes, describe_hardware(Wish(**wish), calibration, sizes), calibration)
    return plan.model_copy(update={"advice": advise(plan, calibration)})


def test_the_thesis_study_counts_as_its_arithmetic_says():
    counts = count(make_sizes())
    assert (counts.frozen_passes, counts.distinct_slices) == (8_514_000, 2_630)
    assert (counts.training_images, counts.evaluation_images) == (191_565, 45_135)
    assert (counts.head_steps, counts.trials, counts.holdout) == (242_000, 150, 53)
    assert counts.naive_flop / 1e15 == pytest.approx(124.1, abs=0.05)
    assert counts.cached_flop / 1e15 == pytest.approx(8.39, abs=0.005)
    assert counts.flop_ratio == pytest.approx(14.8, abs=0.05)


def test_the_thesis_study_leaves_these_bytes():
    counts = count(make_sizes())
    assert counts.crop_bytes == 526 * 5 * 400 * 200 * 2
    assert counts.feature_bytes == 526 * 5 * 2048 * 4
    assert counts.object_store_bytes == counts.crop_bytes + counts.feature_bytes
    assert counts.model_bytes == 30 * 94_336_000


@pytest.mark.parametrize(
    ("shape", "forward", "training"),
    [((400, 200), 13.591, 40.397), ((224, 224), 8.174, 24.287), ((100, 50), 1.071, 3.189)],
)
def test_operations_of_an_image(shape, forward, training):
    cost = image_cost(*shape)
    assert cost.forward / 1e9 == pytest.approx(forward, abs=5e-4)
    assert cost.training / 1e9 == pytest.approx(training, abs=5e-4)


def test_parameters_are_those_of_the_network():
    from study_factory import random_backbone

    from lbp_ray.nets.resnet import build_head

    network = [random_backbone(), build_head(seed=0)]
    assert sum(parameter.numel() for part in network for parameter in part.parameters()) == PARAMETERS


def test_hold_out_and_folds_are_those_of_a_split():
    from lbp_ray.splits import HOLDOUT, make_split

    exams = pd.DataFrame({"study_id": [f"s{n:03d}" for n in range(97)], "label": np.arange(97) % 3 == 0})
    split = make_split(exams.assign(patient_id=exams["study_id"]), folds=5, holdout_fraction=0.07, seed=0)
    drawn = split["fold"].value_counts()
    sizes = make_sizes(97, folds=5, holdout_fraction=0.07, seeds=1, slice_counts=(1,))
    trained = sorted(cell.training_images for cell in cells(sizes))
    assert count(sizes).holdout == drawn[HOLDOUT]
    assert trained == sorted(97 - drawn[HOLDOUT] - drawn.drop(HOLDOUT))


def test_an_inner_validation_trains_on_less_and_scores_more():
    fixed, inner = count(make_sizes()), count(make_sizes(inner_fraction=0.1))
    assert 0.89 < inner.training_images / fixed.training_images < 0.91
    assert inner.evaluation_images > fixed.evaluation_images


def test_ten_times_the_studies_are_ten_times_the_work():
    small, large = make_plan(make_sizes(526)), make_plan(make_sizes(5260))
    for name in ("convert", "crops", "unfrozen epochs", "evaluation", "heads"):
        ratio = large.stage(name).compute_s.middle / small.stage(name).compute_s.middle
        assert ratio == pytest.approx(10, rel=0.04), name
    assert large.counts.training_images / small.counts.training_images == pytest.approx(10, rel=0.01)


def test_more_hardware_never_takes_longer():
    walls = [make_plan(gpus=gpus).total.middle for gpus in (1, 4, 16, 64)]
    assert walls == sorted(walls, reverse=True)
    assert make_plan(cores=64).total.high < make_plan().total.low


def test_the_unfrozen_epochs_are_nearly_all_of_a_study_on_cpus():
    plan = make_plan()
    assert plan.stage("unfrozen epochs").seconds.middle > 0.8 * plan.total.middle
    assert plan.stage("unfrozen epochs").seconds.middle == pytest.approx(191_565 * 0.26 / 2, rel=0.03)
    assert tuple(stage.name for stage in plan.stages) == STAGES


def test_an_h200_takes_minutes_as_its_assumed_rates_say():
    unfrozen = make_plan(gpus=1, gpu="h200").stage("unfrozen epochs").compute_s
    assert unfrozen.low == pytest.approx(191_565 * 40.397e9 / 168e12, rel=0.01)
    assert unfrozen.high == pytest.approx(191_565 * 40.397e9 / 59.3e12, rel=0.01)


def test_a_measured_gpu_sets_the_share_of_another():
    calibration = make_calibration(device="cuda", training_s=40.397e9 / 200e12, gemm_bfloat16_flop_s=800e12)
    rate = make_plan(calibration=calibration, gpus=2, gpu="a100").hardware.training_s.under(40.397e9)
    assert rate.middle == pytest.approx(0.25 * 312e12, rel=1e-3)


def test_adam_costs_something_where_its_share_was_not_measured():
    """A measured share is of forward and backward alone; an assumed one has the optimiser in it."""
    measured, assumed = (make_plan(calibration=make_calibration(device=device), gpus=2) for device in ("cuda", "cpu"))
    assert measured.hardware.optimiser_s == around(0.03)
    assert assumed.hardware.optimiser_s.high == 0


@pytest.mark.parametrize(("given", "device"), [(["--gpus", "1"], "cuda"), ([], "cpu")])
def test_a_plan_for_gpus_is_calibrated_on_the_gpu_that_is_here(monkeypatch, given, device):
    asked = []

    def measured(sizes, *, storage, device):
        asked.append(device)
        return make_calibration(device=device)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("lbp_ray.plan.__main__.calibrate", measured)
    assert main(["--studies", "526", *given]) == 0
    assert asked == [device]


def test_float32_on_a_gpu_is_full_float32():
    plan = make_plan(make_sizes(dtype="float32"), gpus=1)
    assert plan.stage("unfrozen epochs").compute_s.middle == pytest.approx(191_565 * 40.397e9 / 33.5e12, rel=0.01)
    calibration = make_calibration(device="cuda", training_s=40.397e9 / 35e12, gemm_float32_flop_s=50e12)
    calibration = calibration.model_copy(update={"dtype": "float32"})
    rate = make_plan(make_sizes(dtype="float32"), calibration=calibration, gpus=2).hardware.training_s.under(40.397e9)
    assert rate.middle == pytest.approx(0.7 * 67e12, rel=1e-3)


def test_costs_of_a_gpu_say_nothing_of_cores():
    with pytest.raises(PlanError, match=r"add --gpus, or set compute\.gpus_per_trial=0"):
        make_plan(calibration=make_calibration(device="cuda"), cores=64)
    assert make_plan(calibration=make_calibration(device="cuda")).hardware.gpus == 1


def test_several_gpus_of_a_trial_share_its_images_and_not_its_heads():
    one, four = (make_plan(make_sizes(gpus_per_trial=number), gpus=number) for number in (1, 4))
    assert four.stage("heads").compute_s.middle == pytest.approx(one.stage("heads").compute_s.middle)
    packed = make_plan(make_sizes(gpus_per_trial=0.25), gpus=1)
    for stage in ("heads", "unfrozen epochs"):
        assert packed.stage(stage).compute_s.middle == pytest.approx(one.stage(stage).compute_s.middle, rel=0.02)
    images = [plan.stage("unfrozen epochs").compute_s.middle for plan in (one, four)]
    assert images[0] / images[1] == pytest.approx(4 * 0.9)


def test_features_that_memory_does_not_keep_are_read_in_every_epoch():
    sizes = make_sizes(2_400_000, blocks=True)
    streamed, kept = (make_plan(sizes, gpus=8 * nodes, nodes=nodes) for nodes in (1, 8))
    assert kept.stage("heads").input_s.middle == pytest.approx(98.3e9 / 1.25e9, rel=0.01)
    heads = make_plan(sizes, gpus=1).stage("heads")
    assert heads.input_s.middle == pytest.approx(2 * 150 * 40 * 98.3, rel=0.01)  # trained on and scored, at 1 GB/s
    assert heads.bottleneck == "disk"
    assert streamed.stage("heads").input_s.middle == pytest.approx(98.3, rel=0.01)


def test_costs_of_another_crop_size_are_scaled_and_said_so():
    plan = make_plan(make_sizes(height_px=100, width_px=50))
    assert plan.hardware.training_s.middle == pytest.approx(0.26 * 3.189 / 40.397, rel=1e-3)
    assert any("scaled by operations to 100 x 50" in line for line in plan.hardware.assumptions)


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ({"compute_s": 9, "input_s": 2, "start_s": 1}, "compute"),
        ({"compute_s": 1, "input_s": 2, "start_s": 1}, "disk"),
        ({"compute_s": 1, "input_s": 2, "start_s": 1, "shared": True}, "network"),
        ({"compute_s": 1, "input_s": 2, "start_s": 4}, "start-up"),
        ({"compute_s": 9, "input_s": 2, "start_s": 1, "fits": False}, "memory"),
    ],
)
def test_what_holds_a_stage_up(parts, found):
    assert bottleneck(**{"fits": True, "shared": False, **parts}) == found


def test_trials_start_in_order_in_the_first_free_slot():
    assert makespan([1, 1, 3], slots=2) == 4
    assert makespan([3, 1, 1], slots=2) == 3
    assert makespan([5.0], slots=64) == 5


def test_more_trials_than_slots_leave_gpus_idle_at_the_end():
    even, uneven = make_plan(gpus=50), make_plan(gpus=149)
    assert uneven.stage("unfrozen epochs").compute_s.middle > even.stage("unfrozen epochs").compute_s.middle / 2.9


def test_memory_of_a_trial_is_its_activations_and_adam():
    half, single = (trial_bytes(make_sizes(dtype=dtype), 0) for dtype in ("bfloat16", "float32"))
    assert half == 32 * image_cost(400, 200).activations * 2 + 12 * PARAMETERS
    assert single - half == 32 * image_cost(400, 200).activations * 2
    assert trial_bytes(make_sizes(dtype="bfloat16", carries_norms=False), 0) == single


@pytest.mark.parametrize(
    ("studies", "given", "wish", "words"),
    [
        (2_400_000, {}, {"gpus": 64}, "recipe.shuffle: block"),
        (2_400_000, {}, {"gpus": 64}, "evaluation.permutations=0"),
        (2_400_000, {}, {"gpus": 64}, "small-sample device"),
        (2_400_000, {}, {}, "evaluation.bootstrap_resamples="),
        (2_400_000, {"gpus_per_trial": 1}, {"gpus": 512}, "compute.gpus_per_trial to 2, 4 or 8"),
        (526, {"gpus_per_trial": 0.0}, {"gpus": 1}, "asks for no GPU"),
        (5_260, {}, {}, "--gpus N"),
        (526, {"dtype": "float32"}, {"gpus": 1}, "recipe.unfrozen_dtype: auto"),
        (526, {"feature_cache": False}, {}, "recipe.feature_cache: true"),
        (526, {"images_per_pass": 512}, {}, "lower recipe.images_per_pass"),
        (526, {"images_per_pass": 1024, "gpus_per_trial": 0.25}, {"gpus": 1, "gpu": "a100"}, "share of a GPU is 20 GB"),
        (526, {"keep_models": "all", "folds": 100, "seeds": 10}, {}, "compute.keep_models"),
    ],
)
def test_advice_names_what_to_set(studies, given, wish, words):
    assert words in "\n".join(make_plan(make_sizes(studies, **given), **wish).advice)


@pytest.mark.parametrize(
    ("given", "words"),
    [({"blocks": True}, "shuffle"), ({"permutations": 0}, "permutations"), ({"seeds": 1}, "small-sample")],
)
def test_advice_that_was_followed_is_not_repeated(given, words):
    assert words not in "\n".join(make_plan(make_sizes(2_400_000, **given), gpus=64).advice)


def test_the_thesis_study_on_a_gpu_needs_no_advice():
    assert make_plan(make_sizes(gpus_per_trial=1), gpus=1).advice == ()


def test_a_cluster_s_unfrozen_epoch_waits_for_its_crops():
    plan = make_plan(make_sizes(2_400_000, gpus_per_trial=1), gpus=64)
    assert plan.stage("unfrozen epochs").bottleneck == "network"
    assert plan.stage("crops").bottleneck != "memory"


@pytest.mark.parametrize(
    ("span", "text"),
    [((0.2, 0.4), "0.2-0.4 s"), ((90, 110), "90-110 s"), ((130, 170), "2.2-2.8 min"), ((8e5, 9e5), "9.3-10 d")],
)
def test_durations_read_well(span, text):
    assert duration(Span(low=span[0], middle=sum(span) / 2, high=span[1])) == text


@pytest.mark.parametrize(("amount", "text"), [(999, "999 B"), (420_800_000, "421 MB"), (1.92e12, "1.92 TB")])
def test_sizes_read_well(amount, text):
    assert size(amount) == text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Measure for crops and a study that take no time; one real calibration serves all tests."""
    sizes = make_sizes(height_px=32, width_px=32, batch_size=4, images_per_pass=4, rows=96, columns=96, permutations=3)
    return calibrate(sizes, storage=tmp_path_factory.mktemp("runs") / "not" / "there", progress=False), sizes


def test_a_calibration_measures_everything_in_rounds(tiny):
    calibration, _ = tiny
    spans = {name: value for name, value in calibration.costs if isinstance(value, Span)}
    assert len(spans) == 16
    assert all(0 < span.low <= span.middle <= span.high for span in spans.values())
    assert 1 <= calibration.probe_images <= 4
    assert calibration.workers == len(os.sched_getaffinity(0))
    assert 0.2 < calibration.costs.store_ratio < 1.1
    assert calibration.costs.worker_bytes > 50e6


def test_more_threads_than_cores_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(PlanError, match=r"lower recipe\.threads"):
        calibrate(make_sizes(threads=4096), storage=tmp_path, progress=False)


def test_a_calibration_leaves_nothing_behind(tiny, tmp_path_factory):
    calibration, _ = tiny
    assert not list((tmp_path_factory.getbasetemp()).glob("runs*/.calibration-*"))
    assert calibration.storage.endswith("runs0")


def test_a_calibration_and_a_plan_survive_json(tiny, tmp_path):
    calibration, sizes = tiny
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == calibration
    plan = make_plan(sizes, calibration=calibration)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_the_command_prints_every_stage_and_writes_the_same_plan(tmp_path, capsys):
    make_calibration().save(tmp_path / "c.json")
    given = ["--studies", "526", "--calibration", str(tmp_path / "c.json"), "--json", str(tmp_path / "plan.json")]
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in STAGES)
    assert "8.39 PFLOP; 124.1 if every epoch ran the network (14.8 times as much)" in shown
    assert json.loads((tmp_path / "plan.json").read_text())["counts"]["head_steps"] == 242_000


def test_a_configuration_and_its_overrides_count(tmp_path, monkeypatch):
    monkeypatch.setenv("LBP_RAY_ROOT", "/nowhere")
    make_calibration().save(tmp_path / "c.json")
    given = ["--config", "configs/demo.yaml", "--studies", "1600", "--calibration", str(tmp_path / "c.json")]
    assert main([*given, "--json", str(tmp_path / "plan.json"), "seeds=[0]"]) == 0
    plan = Plan.model_validate_json((tmp_path / "plan.json").read_text())
    assert (plan.counts.trials, plan.sizes.height_px, plan.counts.distinct_slices) == (6, 100, 4800)


def test_sizes_come_from_the_store_and_its_questionnaire(tmp_path):
    from store_factory import make_record, make_store

    pixels = np.ones((9, 40, 30), np.uint16)
    make_store(tmp_path / "store.zarr", [(make_record(number, pixels), pixels) for number in range(24)])
    config = for_device(oulu_config(), gpu=True)
    config = config.model_copy(update={"paths": config.paths.model_copy(update={"store": tmp_path / "store.zarr"})})
    sizes = sizes_of(config)
    assert (sizes.exams, sizes.studies, sizes.stored_slices, sizes.rows, sizes.columns) == (24, 24, 9, 40, 30)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "how many studies"),
        (["--studies", "9"], "cannot fill 10 folds"),
        (["--studies", "526", "seeds=[0]"], "give --config"),
        (["--studies", "526", "--config", "configs/none.yaml"], "not found"),
        (["--studies", "526", "--calibration", "/nowhere/c.json"], "no calibration at /nowhere/c.json"),
        (["--studies", "526", "--calibration", "pyproject.toml"], "is no calibration of this version"),
        (["--check", "/nowhere"], "holds no committed trial"),
    ],
)
def test_errors_are_one_line(given, words, capsys):
    assert main(given) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert words in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("wish", "words"),
    [({"gpus": 0}, "--gpus 0"), ({"gpu": "h200"}, "--gpu h200 without --gpus"), ({"cores": -1}, "--cores -1")],
)
def test_hardware_that_cannot_be_is_refused(wish, words):
    with pytest.raises(PlanError, match=words):
        make_plan(**wish)


def make_finished(root, *, seconds=True):
    """A finished study of 4 trials: 2 folds of 6 and 4 studies, 1 and 3 slices, 5 sealed studies."""
    crops = root / "crops" / "a"
    crops.mkdir(parents=True)
    np.save(crops / "crops.npy", np.zeros((15, 3, 100, 50), np.uint16))
    (crops / "crops.json").write_text(json.dumps({"crops_hash": "c" * 64}))
    features = root / "features" / "b"
    features.mkdir(parents=True)
    (features / "features.json").write_text(json.dumps({"seconds": 0.5, "images": 45}))
    recipe = {"batch_size": 4, "images_per_pass": None, "unfrozen_dtype": "bfloat16", "frozen_epochs": 10}
    for num_slices in (1, 3):
        for fold, tested in enumerate((6, 4)):
            folder = root / "study" / "trials" / f"k{num_slices}-fold{fold:02d}-seed0-0"
            folder.mkdir(parents=True)
            for name, rows in (("out_of_fold", tested), ("holdout", 5)):
                pd.DataFrame({"study_id": ["s"] * rows * num_slices}).to_parquet(folder / f"{name}.parquet")
            cell = {"num_slices": num_slices, "fold": fold, "seed": 0}
            record = {"spec": {"cell": cell, "recipe": recipe, "crops_hash": "c" * 64}}
            timed = {"seconds": {"frozen": 0.1, "unfrozen": 2.0, "evaluation": 0.2}} if seconds else {}
            (folder / "trial.json").write_text(json.dumps({**record, **timed}))
    return root / "study"


def test_a_finished_run_is_counted_from_its_tables(tmp_path):
    finished = read_finished(make_finished(tmp_path))
    assert [cell.training_images for cell in finished.cells] == [4, 6, 12, 18]
    assert [cell.head_steps for cell in finished.cells] == [10, 20, 30, 50]
    assert [cell.evaluation_images for cell in finished.cells] == [11, 9, 33, 27]
    assert finished.seconds == {"frozen": pytest.approx(0.4), "unfrozen": 8.0, "evaluation": pytest.approx(0.8)}
    assert (finished.extraction_s, finished.images) == (0.5, 45)


def test_a_prediction_stands_beside_what_a_run_took(tmp_path):
    finished = read_finished(make_finished(tmp_path))
    calibration, sizes = make_calibration(), make_sizes(height_px=100, width_px=50, batch_size=4)
    found = {item.stage: item for item in compare(finished, sizes, describe_hardware(Wish(), calibration, sizes))}
    assert set(found) == {"extraction", "heads", "unfrozen epochs", "evaluation"}
    unfrozen = 40 * 0.26 * 3.189 / 40.397 + (1 + 2 + 3 + 5) * 0.03
    assert found["unfrozen epochs"].ratio == pytest.approx(unfrozen / 8.0, rel=1e-3)
    assert found["heads"].predicted.middle == pytest.approx(110 * 0.0004)


def test_the_command_compares_a_finished_run(tmp_path, capsys):
    make_calibration().save(tmp_path / "c.json")
    assert main(["--check", str(make_finished(tmp_path)), "--calibration", str(tmp_path / "c.json")]) == 0
    assert "predicted / took" in capsys.readouterr().out


def test_a_run_without_times_is_told_from_one_with(tmp_path, capsys):
    assert main(["--check", str(make_finished(tmp_path, seconds=False))]) == 2
    assert "4 trial(s) of" in capsys.readouterr().err
