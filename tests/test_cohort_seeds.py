"""The demo on twenty other cohorts: not one lucky seed."""

from __future__ import annotations

import pytest
from river import expect, prepare_cohort, result_folder

from lbp_ray.result import StudyResult

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SEEDS = range(3001, 3021)
NEEDED = 16


@pytest.mark.timeout(5400)
def test_interval_excludes_chance_on_most_cohorts(tmp_path):
    """Whole river with the demo's recipe and one model seed; T1, localizers and permutations are left out for time."""
    above = {1: 0, 3: 0}
    for seed in SEEDS:
        root = tmp_path / str(seed)
        prepare_cohort(root, "phantom_demo", f"seed={seed}", "tree.t1=false", "tree.localizer=false")
        expect(root, "lbp_ray.tune", "--config", "configs/demo.yaml", "seeds=[0]", "evaluation.permutations=0")
        result = StudyResult.load(result_folder(root, "demo") / "result.json")
        for item in result.slice_counts:
            interval = next(metric.interval for metric in item.metrics if metric.name == "roc_auc")
            above[item.num_slices] += interval.low > 0.5
            bayes = result.bayes.realised_auc if result.bayes else float("nan")
            print(
                f"seed {seed} k{item.num_slices}: AUC {interval.estimate:.3f} "
                f"[{interval.low:.3f}, {interval.high:.3f}], Bayes {bayes:.3f}",
                flush=True,
            )
    assert min(above.values()) >= NEEDED, above
