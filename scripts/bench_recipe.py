"""Dice over training time: recipes and single levers of them, on several datasets.

    python scripts/bench_recipe.py run DATASET BUDGET VARIANT [--seed 0] [--fold 0] [--shared ../shared] [--work FOLDER]
    python scripts/bench_recipe.py table

DATASET is task04, brain16, lesion5, demo, few, fine or spots; BUDGET a training time such as 5m; VARIANT a name in
`VARIANTS`. A run plans the dataset (once for each network that variants ask for, in the work folder), trains the fold
for the budget, and scores the whole volumes of its validation cases; a training that mirrored is scored once more,
without mirrored copies of them. Each result is added as one line to `docs/recipe.jsonl`, so that hours of computing
survive whatever comes; `table` prints all lines. The processors that other programs kept busy meanwhile are in each
line: compare only undisturbed ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import operator
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_training import MAX_OTHERS_BUSY, busy_s
from numpy.typing import NDArray
from recipe_levers import LEVERS, mirrored_along, predicted_as_is, voxels_drawn_evenly
from scipy import ndimage

import autoseg
from autoseg.cli import parse_duration
from autoseg.core.machine import processor_name
from autoseg.core.runtime import derive_seed, n_cpus
from autoseg.core.serialize import atomic_path, read_json, to_plain, write_json
from autoseg.data.io import case_name, read_image, read_label, write_volume
from autoseg.data.phantom import LABELS, write_phantom_dataset
from autoseg.data.splits import SplitChoices
from autoseg.evaluation.scores import Evaluation
from autoseg.inference.model import read_model
from autoseg.pipeline.configurations import default_configuration
from autoseg.pipeline.fold_validation import validate_fold, validation_folder
from autoseg.pipeline.workspace import Workspace
from autoseg.planning.choices import Choices
from autoseg.training.config import Budget, TrainConfig
from autoseg.training.folds import fold_folder
from autoseg.training.ladder import WIDTHS, resize
from autoseg.training.recipe import RECIPES
from autoseg.training.record import FoldFiles, TrainingRecord, read_log


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A generated dataset.

    Attributes:
        n_train: cases with labels.
        coarseness: of their voxels, as a part of the demo's.
        n_validating: the last of them, which validate in the only fold; 0 for five folds.
        n_spots: small lesions that the liver of each case gets, beside a large one.
    """

    n_train: int
    coarseness: float = 1.0
    n_validating: int = 0
    n_spots: int = 0


RESULTS = Path(__file__).parents[1] / "docs" / "recipe.jsonl"
CONFIGURATION = "3d_fullres"
SHARED_DATASETS = {"task04": "Task04_Hippocampus", "brain16": "Brain16_iso2", "lesion5": "BrainLesion_5mm"}
GENERATED = {
    "demo": Generated(n_train=20),
    "few": Generated(n_train=50, coarseness=1.3, n_validating=40),
    "fine": Generated(n_train=72, coarseness=0.35, n_validating=8),
    "spots": Generated(n_train=20, n_spots=5),
}
SPOT_RADIUS_MM, SPOT_VOXELS, SPOT_HU_DROP = (4.5, 6.0), (5, 40), (35.0, 70.0)
COLUMNS = ("minutes", "variant", "mean Dice", "F1 of the last label", "patch", "features", "steps", "fold/seed", "on")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What differs from the default.

    Attributes:
        train: fields of `TrainConfig`.
        recipe: fields of the recipe that `train` names, or else of "fast".
        width: of the network, a name in `autoseg.training.ladder.WIDTHS`; None for what the recipe chooses.
        patch_scale: edges of the patch as a part of the planned ones; counts where a width is given.
        decoder_blocks: convolutions of each stage of the decoder; None as planned.
        lever: what is changed in the code while it runs, as in `LEVERS`.
        kind: of a work folder of its own, where the lever changes what is preprocessed.
    """

    train: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    width: str | None = None
    patch_scale: float = 1.0
    decoder_blocks: int | None = None
    lever: Callable[[], AbstractContextManager[None]] = nullcontext
    kind: str = ""


VARIANTS: dict[str, Variant] = {
    "default": Variant(),
    "published": Variant(train={"recipe": "published"}),
    # The network and its patches.
    **{
        f"{width}, patch x{scale:g}": Variant(width=width, patch_scale=scale)
        for width in WIDTHS
        for scale in (0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
    },
    "one convolution per stage of the decoder": Variant(decoder_blocks=1),
    # Optimization.
    "AdamW 3e-3": Variant(recipe={"optimizer": "adamw", "learning_rate": 3e-3}),
    "AdamW 1e-3": Variant(recipe={"optimizer": "adamw", "learning_rate": 1e-3}),
    "SGD 1e-2, one cycle": Variant(recipe={"optimizer": "sgd", "learning_rate": 1e-2}),
    "half the rate": Variant(recipe={"learning_rate": 6e-3}),
    "twice the rate": Variant(recipe={"learning_rate": 24e-3}),
    "a quarter of the rate": Variant(recipe={"learning_rate": 3e-3}),
    "no warm-up": Variant(recipe={"warmup_fraction": 0.0}),
    "longer warm-up": Variant(recipe={"warmup_fraction": 0.15}),
    "polynomial schedule": Variant(recipe={"schedule": "poly"}),
    "linear schedule": Variant(recipe={"schedule": "linear"}),
    "no weight decay": Variant(recipe={"weight_decay": 0.0}),
    "ten times the weight decay": Variant(recipe={"weight_decay": 0.1}),
    "gradients clipped at 1": Variant(recipe={"max_gradient_norm": 1.0}),
    "gradients not clipped": Variant(recipe={"max_gradient_norm": 1e9}),
    "batch 1": Variant(train={"batch_size": 1}),
    "batch 4": Variant(train={"batch_size": 4}),
    # What is seen.
    # A batch of two, as on a CPU, has one centred patch at a third as at two thirds.
    "published sampling": Variant(train={"sampling": "published"}),
    "no centred patches": Variant(train={"foreground_fraction": 0.0}),
    "centred patches only": Variant(train={"foreground_fraction": 1.0}),
    "voxels evenly": Variant(lever=voxels_drawn_evenly, kind="evenly"),
    "no augmentation": Variant(train={"augment": "none"}),
    "mirrored": Variant(train={"mirror": True}, recipe={"mirrored_rate": 1.0}),
    "mirrored, half the rate": Variant(train={"mirror": True}),
    "not mirrored": Variant(train={"mirror": False}),
    "left and right mirrored": Variant(
        train={"mirror": True}, recipe={"mirrored_rate": 1.0}, lever=partial(mirrored_along, operator.eq)
    ),
    "mirrored but for left and right": Variant(
        train={"mirror": True}, recipe={"mirrored_rate": 1.0}, lever=partial(mirrored_along, operator.ne)
    ),
    # The loss, the weights that are kept, and the table of augmentation.
    **{name: Variant(lever=lever) for name, lever in LEVERS.items()},
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of the file.

    Attributes:
        dataset, variant, fold, seed: what was run.
        budget_s: training time that was allowed.
        n_steps, batch_size: that were done.
        patch_size, features, mirrored: how, (Z, Y, X).
        mean_dice: over labels of their mean over cases, on whole volumes.
        label_dice: per label.
        lesion_f1: per label, of connected components.
        others_busy: processors that other programs kept busy during the training, on average.
        autoseg, torch, machine, date: where and when.
    """

    dataset: str
    variant: str
    fold: int
    seed: int
    budget_s: float
    n_steps: int
    batch_size: int
    patch_size: tuple[int, ...]
    features: tuple[int, ...]
    mirrored: bool
    mean_dice: float
    label_dice: dict[str, float]
    lesion_f1: dict[str, float]
    others_busy: float
    autoseg: str
    torch: str
    machine: str
    date: str


def prepare(dataset: str, variant: Variant, *, shared: Path, work: Path) -> Path:
    """The work folder of a dataset, planned for the network of a variant."""
    kind = f"-{variant.width}-{variant.patch_scale:g}" if variant.width else ""
    kind += f"-{variant.decoder_blocks} in decoder" if variant.decoder_blocks else ""
    kind += f"-{variant.kind}" if variant.kind else ""
    folder = work / f"{dataset}{kind}"
    if (folder / "plan.json").exists():
        return folder
    splits = None
    if dataset in GENERATED:
        made, source = GENERATED[dataset], work / f"{dataset}-data"
        if not source.exists():
            with atomic_path(source) as temporary:
                write_phantom_dataset(temporary, n_train=made.n_train, n_test=1, coarseness=made.coarseness)
                if made.n_spots:
                    add_spots(temporary, made.n_spots)
        if made.n_validating:
            held_out = work / f"{dataset}-validating.txt"
            cases = sorted(path.name.removesuffix(".nii.gz") for path in (source / "labelsTr").iterdir())
            held_out.write_text("\n".join(cases[-made.n_validating :]) + "\n")
            splits = SplitChoices(validation=held_out)
    else:
        source = shared / "data" / SHARED_DATASETS[dataset]
    choices = Choices(configurations=(CONFIGURATION,))
    plan = autoseg.plan(source, folder, choices=choices, splits=splits, preprocess="none")
    changed = plan.configuration(CONFIGURATION)
    if variant.width is not None:
        changed = resize(changed, variant.width, variant.patch_scale)
    if variant.decoder_blocks is not None:
        blocks = (variant.decoder_blocks,) * len(changed.network.decoder_blocks)
        changed = dataclasses.replace(changed, network=dataclasses.replace(changed.network, decoder_blocks=blocks))
    # Signed, so that it counts as planned: what a person has edited does not adapt.
    write_json(folder / "plan.json", dataclasses.replace(plan, configurations={CONFIGURATION: changed}).signed())
    return folder


def add_spots(folder: Path, n_spots: int) -> None:
    """Paints lesions into the liver of each case with labels, the same for the same name of the case."""
    for label_file in sorted((folder / "labelsTr").iterdir()):
        case = case_name(label_file)
        image_file = folder / "imagesTr" / f"{case}_0000.nii.gz"
        (image,), geometry = read_image(image_file)
        label, _ = read_label(label_file)
        paint_spots(image, label, geometry.spacing_mm, n_spots, np.random.default_rng(derive_seed("spots", case)))
        write_volume(image_file, np.round(image).astype(np.int16), geometry)
        write_volume(label_file, label, geometry)


def paint_spots(
    image: NDArray, label: NDArray, spacing_mm: Sequence[float], n_spots: int, rng: np.random.Generator
) -> None:
    """Lesions that are as much darker than the liver as the phantom's is: a large one in its middle, and small balls.

    Args:
        image: (Z, Y, X), painted into.
        label: (Z, Y, X), painted into.
        spacing_mm: of both.
        n_spots: how many small ones.
        rng: draws places, sizes and intensities.

    Raises:
        ValueError: there is not enough liver for so many.
    """
    depth_mm = ndimage.distance_transform_edt(label == LABELS["liver"], sampling=spacing_mm)
    middle = np.unravel_index(np.argmax(depth_mm), label.shape)
    _paint_lesion(
        image, label, _level_of_ball(label.shape, [int(at) for at in middle], spacing_mm, 0.9 * depth_mm.max()), rng
    )
    liver = label == LABELS["liver"]
    usual_hu = np.median(image[liver])
    is_free = ndimage.binary_erosion(liver, np.ones((3, 3, 3)))
    for centre in rng.permutation(np.argwhere(is_free)):
        if not n_spots:
            return
        level = _level_of_ball(label.shape, centre, spacing_mm, rng.uniform(*SPOT_RADIUS_MM))
        spot = level < 0
        # A vessel of the liver is brighter.
        is_usual = abs(np.median(image[spot]) - usual_hu) < 15
        if is_usual and SPOT_VOXELS[0] <= spot.sum() <= SPOT_VOXELS[1] and is_free[spot].all():
            _paint_lesion(image, label, level, rng)
            is_free &= ~ndimage.binary_dilation(spot, np.ones((3, 3, 3)), 2)
            n_spots -= 1
    if n_spots:
        raise ValueError(f"{n_spots} spots found no place in the liver")


def _level_of_ball(
    shape: tuple[int, ...], centre: Sequence[int], spacing_mm: Sequence[float], radius_mm: float
) -> NDArray:
    """How far outside of a ball each voxel is."""
    away_mm = [(np.arange(n) - at) * step for n, at, step in zip(shape, centre, spacing_mm, strict=True)]
    return np.sqrt(sum(away**2 for away in np.meshgrid(*away_mm, indexing="ij"))) - radius_mm


def _paint_lesion(image: NDArray, label: NDArray, level: NDArray, rng: np.random.Generator) -> None:
    # As the phantom does: a voxel that the surface cuts is mixed.
    change = 1e-3 + sum(np.abs(slope) for slope in np.gradient(level))
    image -= np.clip(0.5 - level / change, 0, 1) * rng.uniform(*SPOT_HU_DROP)
    label[level < 0] = LABELS["lesion"]


def run(arguments: argparse.Namespace) -> list[Result]:
    """Trains and scores; twice where patches were mirrored, with mirrored copies of the cases and without."""
    variant, budget_s = VARIANTS[arguments.variant], parse_duration(arguments.budget)
    work = prepare(arguments.dataset, variant, shared=arguments.shared, work=arguments.work)
    network = "planned" if variant.width else "auto"
    train = {"recipe": "fast", "network": network, "seed": arguments.seed, **variant.train}
    if variant.recipe:
        RECIPES["variant"] = dataclasses.replace(RECIPES[train["recipe"]], **variant.recipe)
        train["recipe"] = "variant"
    workspace = Workspace(root=work)
    chosen = default_configuration(workspace.read_plan(), CONFIGURATION)
    folder = fold_folder(workspace.model(chosen.name), arguments.fold)
    # Folds share a network, which must not be that of another variant.
    shutil.rmtree(workspace.model(chosen.name), ignore_errors=True)
    config = TrainConfig(budget=Budget.make(max_time_s=budget_s), **train)
    started, (all_before, own_before) = time.monotonic(), busy_s()
    options: dict[str, Any] = {"folds": [arguments.fold], "configuration": chosen.name, "device": "auto"}
    with variant.lever():
        autoseg.train(work, **options, config=config, resume=False, validate=False)
        took_s, (all_after, own_after) = time.monotonic() - started, busy_s()
        evaluation = autoseg.train(work, **options, config=config)[arguments.fold]
    assert isinstance(evaluation, Evaluation)
    record = read_json(FoldFiles(folder=folder).training, TrainingRecord)
    trained = read_model(workspace.model(chosen.name)).configuration
    result = Result(
        dataset=arguments.dataset,
        variant=arguments.variant,
        fold=arguments.fold,
        seed=arguments.seed,
        budget_s=budget_s,
        n_steps=read_log(FoldFiles(folder=folder).log)[-1].iteration,
        batch_size=record.batch_size,
        patch_size=trained.patch_size,
        features=trained.network.features,
        mirrored=record.mirrored,
        **scores_of(evaluation),
        others_busy=round(max(0.0, (all_after - all_before) - (own_after - own_before)) / took_s, 2),
        autoseg=autoseg.__version__,
        torch=torch.__version__,
        machine=torch.cuda.get_device_name() if torch.cuda.is_available() else f"{processor_name()}, {n_cpus()} CPUs",
        date=date.today().isoformat(),
    )
    if not record.mirrored:
        return [result]
    shutil.rmtree(validation_folder(workspace, chosen.name, arguments.fold))
    with predicted_as_is():
        evaluation = validate_fold(workspace, chosen.name, arguments.fold)
    as_is = dataclasses.replace(result, variant=f"{result.variant}, predicted as it is", **scores_of(evaluation))
    return [result, as_is]


def scores_of(evaluation: Evaluation) -> dict[str, Any]:
    """Those of its fields that a result has."""
    return {
        "mean_dice": round(evaluation.mean_dice, 4),
        "label_dice": {label: round(value, 4) for label, value in evaluation.label_dice.items()},
        "lesion_f1": {known.label: round(known.metrics["lesion_f1"].mean, 4) for known in evaluation.labels},
    }


def show(results: Path) -> str:
    """All lines as Markdown: for each dataset, budget and variant the mean over folds, of each over its runs."""
    groups: dict[str, dict[tuple[float, str], list[dict[str, Any]]]] = {}
    for text in results.read_text().splitlines():
        line = json.loads(text)
        groups.setdefault(line["dataset"], {}).setdefault((line["budget_s"], line["variant"]), []).append(line)
    parts = []
    for dataset, by_run in sorted(groups.items()):
        parts += [f"### {dataset}", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        # What is compared stands together, the default first.
        ordered = sorted(by_run.items(), key=lambda item: (item[0][0], item[0][1] != "default", item[0][1]))
        parts += [f"| {' | '.join(_cells(budget_s, variant, known))} |" for (budget_s, variant), known in ordered]
        parts.append("")
    return "\n".join(parts)


def _mean_over_folds(known: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]) -> float:
    """Each fold counts once, however many runs of it there are."""
    by_fold: dict[int, list[float]] = {}
    for line in known:
        by_fold.setdefault(line["fold"], []).append(value(line))
    return statistics.mean(statistics.mean(values) for values in by_fold.values())


def _cells(budget_s: float, variant: str, known: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    dice = [line["mean_dice"] for line in known]
    spread = f" ({min(dice):.4f} to {max(dice):.4f})" if len(dice) > 1 else ""
    runs = ", ".join(f"{line['fold']}/{line['seed']}" for line in known)
    disturbed = any(line["others_busy"] > MAX_OTHERS_BUSY for line in known)
    return (
        f"{budget_s / 60:g}",
        variant,
        f"{_mean_over_folds(known, lambda line: line['mean_dice']):.4f}{spread}",
        f"{_mean_over_folds(known, lambda line: list(line['lesion_f1'].values())[-1]):.2f}",
        "x".join(map(str, known[-1]["patch_size"])),
        ", ".join(map(str, known[-1]["features"])),
        str(min(line["n_steps"] for line in known)),
        f"{runs}{' (disturbed)' if disturbed else ''}",
        ", ".join(sorted({line["machine"] for line in known})),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    runner = parts.add_parser("run")
    runner.add_argument("dataset", choices=[*SHARED_DATASETS, *GENERATED])
    runner.add_argument("budget")
    runner.add_argument("variant", choices=VARIANTS)
    runner.add_argument("--seed", type=int, default=0)
    runner.add_argument("--fold", type=int, default=0)
    runner.add_argument("--shared", type=Path, default=Path(__file__).parents[1].parent / "shared")
    runner.add_argument("--work", type=Path, default=Path("recipe-work"))
    for part in (runner, parts.add_parser("table")):
        part.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.part == "table":
        print(show(arguments.results))
        return
    for result in run(arguments):
        with arguments.results.open("a") as file:
            file.write(json.dumps(to_plain(result)) + "\n")
        about = f"{result.dataset}, {result.variant}, {arguments.budget}"
        print(f"{about}: mean Dice {result.mean_dice:.4f}", file=sys.stderr)


if __name__ == "__main__":
    main()
