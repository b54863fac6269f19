"""The whole line on generated data: what a newcomer runs first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.core.errors import AutosegError
from autoseg.core.serialize import holds_json, write_json
from autoseg.data.io import read_image, read_label
from autoseg.data.phantom import write_phantom_dataset
from autoseg.pipeline.fit import train
from autoseg.pipeline.prepare import plan
from autoseg.pipeline.score import evaluate
from autoseg.pipeline.segment import predict
from autoseg.training.config import Budget, TrainConfig

if TYPE_CHECKING:
    from autoseg.evaluation.scores import Evaluation

N_CASES_SHOWN = 3
# Voxels a little larger than the phantom's usual ones: twice as many training steps in the same time.
COARSENESS = 1.3


def run_demo(folder: Path, *, max_time_s: float, device: str = "auto", seed: int = 0) -> tuple[Evaluation, Path]:
    """Generates CT-like scans, plans, trains one fold, segments the test cases, scores and draws them.

    Args:
        folder: gets `dataset`, `work`, `segmentations` and `demo.png`; what an earlier demo of the same seed left there
            is used again.
        max_time_s: of training.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        seed: of the data and the training.

    Returns:
        The scores of the test cases and the picture.

    Raises:
        AutosegError: the folder holds the demo of another seed.
    """
    from autoseg.reporting.figures import OverlayRow, draw_overlays

    dataset, work, output = folder / "dataset", folder / "work", folder / "segmentations"
    made_with = folder / "demo.json"
    if not dataset.exists():
        write_json(made_with, {"seed": seed})
        write_phantom_dataset(dataset, seed=seed, coarseness=COARSENESS)
    elif made_with.exists() and not holds_json(made_with, {"seed": seed}):
        raise AutosegError(f"{folder}: holds the demo of another seed; name another folder")
    plan(dataset, work)
    budget = Budget(max_time_s=max_time_s)
    train(work, folds=[0], config=TrainConfig(budget=budget, seed=seed), device=device, validate=False)
    files = predict(dataset / "imagesTs", output, work, device=device)
    evaluation = evaluate(output, dataset / "labelsTs")
    rows = []
    for file in files[:N_CASES_SHOWN]:
        case = file.name.removesuffix(".nii.gz")
        image, geometry = read_image(dataset / "imagesTs" / f"{case}_0000.nii.gz")
        rows.append(
            OverlayRow(
                title=case,
                image=image[0],
                spacing_mm=geometry.spacing_mm,
                reference=read_label(dataset / "labelsTs" / file.name)[0],
                prediction=read_label(file)[0],
            )
        )
    return evaluation, draw_overlays(folder / "demo.png", rows)
