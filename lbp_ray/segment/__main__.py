"""The region finder: train out-of-fold networks on annotated slices, mask every exam, commit the regions.

``python -m lbp_ray.segment --config configs/roi_oulu.yaml [section.key=value ...]``
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lbp_ray.config import load_config
from lbp_ray.distributed.regions import segment_store, train_networks
from lbp_ray.native import kept_dtype
from lbp_ray.roi.regions import Regions
from lbp_ray.runs import RunPaths
from lbp_ray.segment.assemble import ARTEFACT_VERSION, assemble
from lbp_ray.segment.config import SegmentConfig
from lbp_ray.segment.masks import Network, mask_shards, read_masks
from lbp_ray.segment.network import place_of
from lbp_ray.segment.page import render_console
from lbp_ray.segment.plan import fold_specs, plan_regions, read_history
from preprocess.commit import content_id
from preprocess.job import connect

if TYPE_CHECKING:
    from lbp_ray.segment.network import FoldSpec
    from lbp_ray.segment.plan import Plan


def run_regions(config: SegmentConfig) -> Regions:
    """Train what is missing of a region finder, mask what is missing, and return the regions.

    Parameters
    ----------
    config
        The region finder.

    Raises
    ------
    ValueError
        Of the room at fault, before any training where it can be known.
    """
    gpus = config.compute.gpus_per_worker
    plan = plan_regions(config)
    paths = RunPaths(config.paths.runs, config.name)
    dtype = kept_dtype(config.recipe.dtype, paths.folder, gpu=bool(gpus), option="recipe.dtype")
    config = config.model_copy(update={"recipe": config.recipe.model_copy(update={"dtype": dtype})})
    specs = fold_specs(config, plan)
    address = regions_address(specs, plan)
    folder = paths.regions(address)
    files = folder.with_suffix(".shards")
    if not folder.is_dir():
        networks = _networks(config, specs, paths)
        shards = {shard: files / f"{shard.shard_id[:16]}.parquet" for shard in mask_shards(plan)}
        with connect():
            train_networks(specs, plan.folder, paths, config.compute)
            segment_store(shards, networks, config.paths.store, gpus=gpus, progress=config.compute.verbose)
        models = {fold: network.model for fold, network in networks.items()}
        assemble(config, plan, read_masks(shards), read_history(specs, paths), models, folder=folder)
    shutil.rmtree(files, ignore_errors=True)  # also after a kill right after the commit
    return Regions.open(folder)


def regions_address(specs: list[FoldSpec], plan: Plan) -> str:
    """Return the content id of the regions that some networks give of a store."""
    return content_id(
        {
            "version": ARTEFACT_VERSION,
            "networks": [spec.fold_id for spec in specs],
            "midsagittal": plan.midsagittal_sha256,
            "nested_in": plan.nested_in,
            "statements": list(plan.statements),
        }
    )


def _networks(config: SegmentConfig, specs: list[FoldSpec], paths: RunPaths) -> dict[int, Network]:
    return {
        spec.fold: Network(
            model=place_of(spec, paths).model,
            input_px=spec.recipe.input_px,
            bfloat16=spec.recipe.dtype == "bfloat16",
            threads=spec.recipe.threads,
            device="cuda" if config.compute.gpus_per_worker else "cpu",
        )
        for spec in specs
    }


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the region finder and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lbp_ray.segment", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file, e.g. configs/roi_oulu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace single values")
    parsed = parser.parse_args(arguments)
    try:
        regions = run_regions(load_config(SegmentConfig, parsed.config, parsed.overrides))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"\n{render_console(regions)}\n\nregions: {regions.folder}\n")
    sys.stdout.write(f"page: {regions.folder / 'report.html'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
