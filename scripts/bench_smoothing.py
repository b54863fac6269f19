"""Does it help to smooth images before they are resampled to larger voxels?

    python scripts/bench_smoothing.py DATASET --spacing 3.5 [--steps 400] [--seeds 4] [--work bench-smoothing]

Trains fold 0 on a coarse grid with and without, from the same seeds, and prints the mean Dice of the validation cases
on the grid of their scans.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from dataclasses import replace
from pathlib import Path

import autoseg
from autoseg.core.serialize import write_json
from autoseg.pipeline.workspace import Workspace
from autoseg.planning.choices import Choices
from autoseg.training.config import Budget, TrainConfig

NAME = "3d_fullres"


def plan(dataset: Path, work: Path, *, spacing_mm: float, smoothed: bool) -> None:
    """Plans a dataset on an isotropic grid."""
    choices = Choices(spacing_mm=(spacing_mm,) * 3, configurations=(NAME,))
    made = autoseg.plan(dataset, work, choices=choices, preprocess="none")
    changed = replace(made.configuration(NAME), smoothed=smoothed)
    write_json(Workspace(root=work).plan_file, replace(made, configurations={NAME: changed}).signed())


def train(work: Path, *, n_steps: int, seed: int) -> float:
    """Mean Dice of fold 0."""
    config = TrainConfig(budget=Budget(iterations=n_steps), seed=seed, network="planned", batch_size=2)
    scores = autoseg.train(work, folds=[0], configuration=NAME, config=config, device="cpu", resume=False)[0]
    assert scores is not None
    return scores.mean_dice


def main() -> None:
    """Runs both ways side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--spacing", type=float, required=True, help="of all axes, in mm")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--work", type=Path, default=Path("bench-smoothing"))
    asked = parser.parse_args()
    logging.disable(logging.INFO)
    ways = {"as it is": False, "smoothed": True}
    for way, smoothed in ways.items():
        plan(asked.dataset, asked.work / way.replace(" ", "-"), spacing_mm=asked.spacing, smoothed=smoothed)
    dice: dict[str, list[float]] = {way: [] for way in ways}
    for seed in range(asked.seeds):
        for way in ways:
            dice[way].append(train(asked.work / way.replace(" ", "-"), n_steps=asked.steps, seed=seed))
    for way, found in dice.items():
        print(f"{way:<9} {statistics.mean(found):.4f}  ({', '.join(f'{value:.4f}' for value in found)})")


if __name__ == "__main__":
    main()
