"""What a study of some size would take, before it runs: time, memory, disk and bottleneck of every stage.

``python -m lbp_ray.plan --studies 2400000 --gpus 64`` or ``python -m lbp_ray.plan --config configs/oulu_honest.yaml
[section.key=value ...]``. The machine is measured first; ``--calibration`` takes what another run saved.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Literal

import torch

from lbp_ray.config import load_config
from lbp_ray.native import for_device
from lbp_ray.plan.advice import advise
from lbp_ray.plan.calibrate import calibrate
from lbp_ray.plan.calibration import Calibration
from lbp_ray.plan.check import compare, read_finished
from lbp_ray.plan.hardware import GPUS, Wish, describe_hardware, require_gpus
from lbp_ray.plan.predict import predict
from lbp_ray.plan.render import render_check, render_plan
from lbp_ray.plan.sizes import StudySizes, oulu_config, sizes_of
from lbp_ray.plan.spans import PlanError
from lbp_ray.study import StudyConfig
from preprocess.commit import write_atomic


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m lbp_ray.plan", description=__doc__)
    parser.add_argument("--config", type=Path, help="YAML file of the study; without it, the Oulu study's recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace single values of the file")
    parser.add_argument("--studies", type=int, help="plan for so many studies instead of those in the store")
    parser.add_argument("--gpus", type=int, help="plan for so many GPUs, of all nodes")
    parser.add_argument("--gpu", choices=sorted(GPUS), help="their model (h100)")
    parser.add_argument("--cores", type=int, help="plan for so many CPU cores, of all nodes")
    parser.add_argument("--nodes", type=int, help="plan for so many nodes")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="measure nothing, take this calibration")
    parser.add_argument("--save-calibration", type=Path, metavar="FILE", help="keep the calibration for other plans")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON, too")
    parser.add_argument("--check", type=Path, metavar="RUNS/STUDY", help="compare with what a finished study took")
    return parser.parse_intermixed_args(arguments)


def run(parsed: argparse.Namespace) -> str:
    """Plan, or compare with a finished run; return what to print.

    Raises
    ------
    ValueError
        Of the part at fault, in one message.
    """
    config = (
        load_config(StudyConfig, parsed.config, parsed.overrides) if parsed.config else oulu_config(parsed.overrides)
    )
    wish = Wish(parsed.gpus, parsed.gpu, parsed.cores, parsed.nodes)
    if parsed.check:
        return _check(parsed, config)
    device = _device(config, wish)
    if not parsed.calibration:
        require_gpus(wish, device)
    config = for_device(config, gpu=bool(parsed.gpus) or device == "cuda")
    sizes = sizes_of(config, studies=parsed.studies)
    calibration = _calibration(parsed, sizes, config, device)
    plan = predict(sizes, describe_hardware(wish, calibration, sizes), calibration)
    plan = plan.model_copy(update={"advice": advise(plan, calibration)})
    if parsed.json:
        write_atomic(parsed.json, plan.model_dump_json(indent=1).encode())
    return render_plan(plan, calibration)


def _check(parsed: argparse.Namespace, config: StudyConfig) -> str:
    """Compare with a finished run, whose recipe counts and not the configuration's."""
    finished = read_finished(parsed.check)
    config = config.model_copy(update={"recipe": finished.recipe})
    box = {"height_px": finished.height_px, "width_px": finished.width_px}
    sizes = sizes_of(config, studies=max(finished.images, 2 * config.split.folds)).model_copy(update=box)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if not parsed.calibration and finished.device not in ("", gpu, torch.backends.cpu.get_cpu_capability()):
        msg = f"{parsed.check} ran on {finished.device}, which is not here: give the --calibration of such a machine"
        raise PlanError(msg)
    calibration = _calibration(parsed, sizes, config, "cuda" if finished.device == gpu else "cpu")
    return render_check(compare(finished, sizes, describe_hardware(Wish(), calibration, sizes)))


def _calibration(
    parsed: argparse.Namespace, sizes: StudySizes, config: StudyConfig, device: Literal["cpu", "cuda"]
) -> Calibration:
    if parsed.calibration:
        return Calibration.load(parsed.calibration)
    storage = config.paths.runs if parsed.config else Path(tempfile.gettempdir())
    calibration = calibrate(sizes, storage=storage, device=device)
    if parsed.save_calibration:
        calibration.save(parsed.save_calibration)
    return calibration


def _device(config: StudyConfig, wish: Wish) -> Literal["cpu", "cuda"]:
    """Return what is measured here: a GPU if there is one and the plan or the configuration is for GPUs."""
    return "cuda" if torch.cuda.is_available() and (wish.gpus or config.compute.gpus_per_trial) else "cpu"


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, plan and return the exit status."""
    parsed = parse(arguments)
    try:
        sys.stdout.write(f"{run(parsed)}\n")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
