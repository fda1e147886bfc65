"""The benchmarks' own arithmetic, and that they run: their figures are of no interest here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks import __main__ as command
from benchmarks import gpu_study, heads, peers, scaled_study, summary
from benchmarks.arithmetic import Costs, count_lines, oulu_sizes
from benchmarks.naive import NaiveLoop
from benchmarks.synthetic import make_specs, make_study
from benchmarks.timing import interleave, spread
from lbp_ray.nets.weights import load_backbone_weights
from lbp_ray.plan.counts import count
from lbp_ray.splits import HOLDOUT
from lbp_ray.study import Recipe
from tests.study_factory import random_backbone, with_features

ROOT = Path(__file__).parents[1]
TINY = [
    "--studies",
    "14",
    "--crop",
    "32",
    "32",
    "--folds",
    "2",
    "--seeds",
    "1",
    "--slices",
    "1",
    "--frozen-epochs",
    "1",
]


def test_counts_of_the_thesis_study():
    counts = count(oulu_sizes())
    assert (counts.trials, counts.frozen_passes, counts.distinct_slices) == (150, 8_514_000, 2_630)
    assert (counts.training_images, counts.evaluation_images, counts.head_steps) == (191_565, 45_135, 242_000)
    assert counts.naive_flop / 1e15 == pytest.approx(124.1, abs=0.05)
    assert counts.cached_flop / 1e15 == pytest.approx(8.39, abs=0.005)
    assert counts.flop_ratio == pytest.approx(14.8, abs=0.05)


def test_every_count_is_printed_with_its_arithmetic():
    lines = count_lines(oulu_sizes())
    assert lines["frozen_passes"].endswith("x 473 studies x (1+3+5) slices = 8,514,000")
    assert lines["training_images"] == "50 x 425.7 x 9 = 191,565"
    assert lines["flop_network_in_the_loop"].endswith("= 124.1 PFLOP")
    assert lines["flop_cached"].endswith("= 8.388 PFLOP")


def test_costs_in_proportion_to_operations_give_the_bound():
    counts = count(oulu_sizes())
    costs = Costs(forward_s=13.591, training_s=40.397, extraction_s=13.591, adam_s=0.0, heads_s=0.0)
    ratio = costs.study_s(counts, cached=False) / costs.study_s(counts, cached=True)
    assert ratio == pytest.approx(counts.flop_ratio, rel=1e-4)
    assert costs.frozen_s(counts, cached=False) / costs.frozen_s(counts, cached=True) == pytest.approx(3237.3, abs=0.1)


def test_costs_of_the_busy_machine_give_its_core_hours():
    # The float32 NCHW row of the design notes: 224 and 596 ms, and 97 s of heads.
    counts = count(oulu_sizes())
    costs = Costs(forward_s=0.224, training_s=0.596, extraction_s=0.224, adam_s=0.0, heads_s=97.0)
    assert costs.study_s(counts, cached=False) / 3600 == pytest.approx(564, abs=1)
    assert costs.study_s(counts, cached=True) / 3600 == pytest.approx(34.7, abs=0.1)
    assert costs.line(counts, cached=False).endswith(f"= {costs.study_s(counts, cached=False):,.0f} s")


def test_the_first_round_is_not_counted():
    clock = iter([0.0, 100.0, 101.0, 101.0, 103.0])
    assert interleave({"case": lambda: None}, rounds=2, clock=lambda: next(clock))["case"].tolist() == [1.0, 2.0]
    assert spread([1.0, 2.0, 4.0]) == {"min": 1.0, "median": 2.0, "max": 4.0}


def test_every_benchmark_is_named_and_described():
    files = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def measure(" in path.read_text()}
    assert files - {"gpu_study"} == set(command.BENCHMARKS)
    assert all(f"``{name}``" in (benchmarks.__doc__ or "") for name in files)
    assert set(command.QUICK) <= set(command.BENCHMARKS)


@pytest.mark.parametrize(("arguments", "named"), [(["no_such"], "no_such"), (["--quick", "intervals"], "intervals")])
def test_unknown_names_are_refused(arguments, named, capsys):
    assert command.main(arguments) == 2
    assert f"benchmark {named}; there are study_cost" in capsys.readouterr().err


def test_run_prints_lines_and_writes_table_and_picture(tmp_path, monkeypatch, capsys):
    figure = {"figure": "slow / fast", "min": 3.0, "median": 4.0, "max": 5.0, "at_least": 3.5, "bound": 6}
    monkeypatch.setitem(command.BENCHMARKS, "heads", lambda: iter([figure, {"figure": "costs", "ms": 1}]))
    assert command.main(["heads", "--out", str(tmp_path / "out")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "figures.jsonl").read_text().splitlines()]
    assert lines[0]["cpus"] >= 1
    assert lines[1] == {"benchmark": "heads", **figure}
    assert "met by the median" in (tmp_path / "out" / "table.txt").read_text()
    assert (tmp_path / "out" / "ratios.png").stat().st_size > 5000
    assert "slow / fast" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        ({"min": 3.0, "median": 4.0, "max": 5.0, "at_least": 3}, "met"),
        ({"min": 3.0, "median": 4.0, "max": 5.0, "at_least": 4.5}, "not met"),
        ({"ratio": 0.04, "at_most": 0.05}, "met"),
        ({"total_s": 301.0, "at_most": 300}, "not met"),
        ({"ratio": 2.0}, ""),
    ],
)
def test_verdict(figure, said):
    assert summary.verdict(figure) == said


def test_every_goal_is_one_that_is_judged():
    """A goal of another name would be printed, and met whatever was measured."""
    texts = {path.name: path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    assert {key for text in texts.values() for key in re.findall(r'"(\w*at_(?:most|least))"', text)} == {
        "at_least",
        "at_most",
    }


def test_batched_heads_equal_single_ones():
    data = make_study(62, (1, 1), folds=3)
    features = torch.randn(62, 5, 2048, generator=torch.Generator().manual_seed(1)).abs()
    data = type(data)(**{**vars(data), "features_NKF": features})
    # 36 or 37 training studies in batches of 36: heads have different numbers of steps.
    recipe = Recipe(weights="random", frozen_epochs=2, unfrozen_epochs=0, batch_size=36)
    specs = make_specs(recipe, folds=3, seeds=[0, 1], slice_counts=[1, 3])
    alone, together = heads.train_one_by_one(data, specs), heads.train_batched(data, specs)
    assert (alone - together).abs().max() <= 1e-6
    assert (alone - heads._start(specs)).abs().max() > 1e-4


@pytest.mark.slow
def test_scaled_study_scores_agree():
    data = with_features(make_study(14, (40, 20), folds=2, positive_share=0.5), random_backbone())
    recipe = Recipe(weights="random", frozen_epochs=1, batch_size=8)
    (cell,) = scaled_study.run_both_ways(data, make_specs(recipe, folds=1, seeds=[0], slice_counts=[1]), processes=1)
    assert cell.frozen_difference <= 1e-5
    assert cell.logit_difference <= 1e-5
    assert min(cell.naive_s, cell.project_s) > 0


def test_naive_loop_touches_every_image_every_epoch():
    data = make_study(14, (32, 32), folds=2, positive_share=0.5)
    (spec,) = make_specs(Recipe(weights="random", frozen_epochs=3), folds=1, seeds=[0], slice_counts=[1])
    loop = NaiveLoop(data, load_backbone_weights("random"), spec)
    seen = []
    loop.backbone.register_forward_hook(lambda _module, images, _output: seen.append(len(images[0])))
    result = loop.run()
    inside, sealed = (data.folds_N != HOLDOUT).sum(), (data.folds_N == HOLDOUT).sum()
    assert sum(seen) == 4 * inside + sealed
    assert len(result.logits_M) == (data.folds_N == 0).sum()


@pytest.mark.slow
def test_frozen_backbone_drifts_only_where_a_trainer_calls_train():
    backbone = random_backbone()
    network = torch.nn.Sequential(backbone, torch.nn.Identity())
    image, before = torch.randn(4, 3, 32, 32), load_backbone_weights("random")
    torch.nn.Sequential(peers.StaysInEval(backbone)).train()(image)
    assert peers._drift(backbone, before) == 0
    network.train()(image)
    assert peers._drift(backbone, before) > 0


@pytest.mark.slow
def test_gpu_study_runs_on_a_cpu(capsys):
    assert gpu_study.main([*TINY, "--device", "cpu", "--naive-steps", "1"]) == 0
    counts, whole, unfrozen, extraction, ratio = map(json.loads, capsys.readouterr().out.splitlines())
    assert counts["training_images"] == "2 x 6.0 x 1 = 12"
    assert whole["trials"] == 2
    assert whole["total_s"] > whole["trials_s"] > whole["unfrozen_s"] > 0
    assert 0 < unfrozen["share_of_matmul_peak"] < 1
    assert "at_least" not in ratio  # goals are for the whole study on a GPU
    assert min(extraction["img_s"], ratio["ratio"]) > 0


@pytest.mark.slow
def test_gpu_study_with_processes_trains_the_same_cells(tmp_path):
    options = gpu_study.parse([*TINY, "--device", "cpu", "--processes", "2"])
    data = gpu_study._write_crops(options, tmp_path)
    worker = gpu_study.Worker(data, "cpu", tmp_path)
    gpu_study._extract(worker, tmp_path)
    specs = make_specs(options.recipe, folds=2, seeds=[0], slice_counts=[1])
    assert len(gpu_study._run_cells(worker, specs, data, options)) == 2
    assert sorted(path.name for path in tmp_path.glob("k1-*/out_of_fold.parquet")) == ["out_of_fold.parquet"] * 2
    assert torch.isfinite(worker.data.features_NKF).all()


@pytest.mark.slow
def test_gpu_study_needs_no_ray():
    code = "import sys; sys.modules['ray'] = None; import benchmarks.gpu_study"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
