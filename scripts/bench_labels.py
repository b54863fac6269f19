"""Dice of the hippocampus with its labels as they are, as an overlapping region, and with most slices not annotated.

    python scripts/bench_labels.py [--steps 700] [--seed 0] [--shared ../shared] [--work FOLDER]

The same short training of fold 0 of Task04 three times: with both labels; with the region "whole" (either label) and
the second label; and with `IGNORED` of the slices of each case marked to be ignored. The validation cases' label maps
are scored against the full labels each time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np

import autoseg
from autoseg.core.serialize import write_json
from autoseg.pipeline.workspace import Workspace
from autoseg.planning.choices import Choices
from autoseg.training.config import Budget, TrainConfig
from autoseg.training.ladder import resize

CONFIGURATION = "3d_fullres"
IGNORED = 0.7
IGNORE_VALUE = 3
KINDS = ("full", "region", "ignore")


def write_dataset(source: Path, folder: Path, kind: str, *, seed: int) -> None:
    """The dataset with another kind of labels; images, and labels that stay, are links."""
    folder.mkdir(parents=True)
    content = json.loads((source / "dataset.json").read_text())
    (folder / "imagesTr").symlink_to(source / "imagesTr")
    if kind == "ignore":
        content["labels"] = {"background": 0, "Anterior": 1, "Posterior": 2, "ignore": IGNORE_VALUE}
        (folder / "labelsTr").mkdir()
        rng = np.random.default_rng(seed)
        for entry in content["training"]:
            file = nib.load(source / entry["label"])
            label = np.asarray(file.dataobj).astype(np.uint8)
            n_slices = label.shape[2]
            hidden = rng.choice(n_slices, round(IGNORED * n_slices), replace=False)
            label[:, :, hidden] = IGNORE_VALUE
            nib.save(nib.Nifti1Image(label, file.affine), folder / "labelsTr" / Path(entry["label"]).name)
    else:
        (folder / "labelsTr").symlink_to(source / "labelsTr")
    if kind == "region":
        content |= {"labels": {"background": 0, "whole": [1, 2], "Posterior": 2}, "regions_class_order": [1, 2]}
    (folder / "dataset.json").write_text(json.dumps(content))


def score(source: Path, folder: Path, kind: str, *, steps: int, seed: int) -> dict[str, float]:
    """Trains, and scores the validation cases against the full labels."""
    shutil.rmtree(folder, ignore_errors=True)
    write_dataset(source, folder / "data", kind, seed=seed)
    work = folder / "work"
    plan = autoseg.plan(folder / "data", work, choices=Choices(configurations=(CONFIGURATION,)), preprocess="none")
    small = resize(plan.configuration(CONFIGURATION), "half", 0.8)
    write_json(work / "plan.json", dataclasses.replace(plan, configurations={CONFIGURATION: small}))
    config = TrainConfig(budget=Budget(iterations=steps), network="planned", seed=seed)
    autoseg.train(work, folds=[0], config=config)
    maps = folder / "maps"
    maps.mkdir()
    for file in (Workspace(root=work).model(CONFIGURATION) / "fold_0" / "validation").glob("*.nii.gz"):
        shutil.copy(file, maps)
    return autoseg.evaluate(maps, source / "labelsTr", regions={"whole": (1, 2)}).label_dice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[1].parent / "shared")
    parser.add_argument("--work", type=Path, default=Path("labels-work"))
    arguments = parser.parse_args()
    source = (arguments.shared / "data" / "Task04_Hippocampus").resolve()
    print("| labels | Anterior | Posterior | whole |\n|---|---|---|---|")
    for kind in KINDS:
        dice = score(source, arguments.work / kind, kind, steps=arguments.steps, seed=arguments.seed)
        print(f"| {kind} | {' | '.join(f'{value:.4f}' for value in dice.values())} |", flush=True)


if __name__ == "__main__":
    main()
