"""Draw and commit a study's split before anything is trained: who is sealed, and who is tested in which fold.

``python -m lbp_ray.seal --config configs/demo.yaml [section.key=value ...]``. What helps to crop, such as a region
finder, can then be kept from the sealed patients. A split that exists is opened and described, not drawn again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lbp_ray.config import load_config
from lbp_ray.prepare import seal
from lbp_ray.splits import HOLDOUT
from lbp_ray.study import StudyConfig

if TYPE_CHECKING:
    from lbp_ray.splits import Split


def describe_split(split: Split) -> str:
    """Write folder, hash and counts of a split; of the hold-out no label is known.

    Parameters
    ----------
    split
        A committed split.
    """
    lines = []
    for fold, rows in split.table.groupby("fold", sort=True):
        sizes = f"{len(rows)} studies of {rows['patient_id'].nunique()} patients"
        if fold == HOLDOUT:
            lines.append(f"  hold-out: {sizes}, sealed by {split.holdout_commitment[:16]}")
        else:
            lines.append(f"  fold {fold}: {sizes}, {int(rows['label'].sum())} symptomatic")
    return "\n".join([f"split {split.split_hash[:16]}: {split.folder}", *lines])


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, seal the split and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lbp_ray.seal", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the study, e.g. configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace single values")
    parsed = parser.parse_args(arguments)
    try:
        sealed = seal(load_config(StudyConfig, parsed.config, parsed.overrides))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write("\n".join([describe_split(sealed.split), *sealed.statements]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
