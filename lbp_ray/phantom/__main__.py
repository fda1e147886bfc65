"""Write a synthetic cohort: ``python -m lbp_ray.phantom --config configs/phantom_demo.yaml [key=value ...]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lbp_ray.config import ConfigError, load_config
from lbp_ray.phantom.config import PhantomConfig
from lbp_ray.phantom.write import write_cohort


def main(arguments: list[str] | None = None) -> int:
    """Parse, write, say what was written."""
    parser = argparse.ArgumentParser(prog="python -m lbp_ray.phantom", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file; see configs/phantom_*.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. seed=7 out=/data/phantom")
    options = parser.parse_args(arguments)
    try:
        config = load_config(PhantomConfig, options.config, options.overrides)
        summary = write_cohort(config, progress=True)
    except (ConfigError, FileExistsError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{summary.exams} exams, {summary.dicom_files} DICOM files in {summary.out}")
    print(f"Bayes AUC: {summary.expected_auc:.3f} expected, {summary.realised_auc:.3f} realised by this cohort")
    return 0


if __name__ == "__main__":
    sys.exit(main())
