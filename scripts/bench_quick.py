"""What a training of minutes learns of large cases at full resolution and on coarser grids.

    python scripts/bench_quick.py [--max-time 3m] [--work FOLDER]

Generates ten CTs of about 135x334x378 voxels, trains on five of them with each spacing, and last with what
`autoseg train` takes by itself; prints a table of Dice and of seconds per case, of the five others.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import autoseg
from autoseg.cli.options import parse_duration
from autoseg.core.geometry import join_numbers
from autoseg.data.phantom import write_phantom_dataset
from autoseg.inference.model import read_model
from autoseg.pipeline import Workspace, configuration_for_time, validate_fold
from autoseg.planning.choices import Choices, parse_choices
from autoseg.training.config import Budget, TrainConfig

ITSELF = "by itself"
SPACINGS = {"full": None, "3 x 1.75 x 1.75": "3,1.75,1.75", ITSELF: None}
VOXEL_SIZE = 0.2
"""As a part of that of the demo."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-time", default="3m")
    parser.add_argument("--work", type=Path, default=Path("quick-work"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    data = arguments.work / "data"
    if not data.exists():
        write_phantom_dataset(data, n_train=10, n_test=0, coarseness=VOXEL_SIZE)
    config = TrainConfig(budget=Budget(max_time_s=parse_duration(arguments.max_time)))
    rows = []
    for number, (name, spacing) in enumerate(SPACINGS.items()):
        work = arguments.work / f"work-{number}"
        choices = Choices() if spacing is None else parse_choices(spacing=spacing)
        plan = autoseg.plan(data, work, choices=choices, n_folds=2)
        workspace = Workspace(root=work)
        chosen = configuration_for_time(workspace, config).name if name == ITSELF else plan.recommended
        autoseg.train(work, folds=[0], configuration=chosen, config=config, validate=False)
        started = time.monotonic()
        scores = validate_fold(workspace, chosen, 0)
        seconds = (time.monotonic() - started) / len(scores.cases)
        trained = read_model(workspace.model(chosen)).configuration
        rows.append(
            (
                f"{name} ({chosen})",
                join_numbers(round(edge_mm, 2) for edge_mm in trained.spacing_mm),
                join_numbers(trained.patch_size),
                f"{scores.mean_dice:.3f}",
                *(f"{dice:.3f}" for dice in scores.label_dice.values()),
                f"{seconds:.1f}",
            )
        )
    header = ("grid", "mm", "patch", "mean Dice", *scores.label_dice, "s per case")
    for row in (header, ("---",) * len(header), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
