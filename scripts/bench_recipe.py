"""Dice over training time: recipes and single levers of them, on several datasets.

    python scripts/bench_recipe.py run DATASET BUDGET VARIANT [--seed 0] [--fold 0] [--shared ../shared] [--work FOLDER]
    python scripts/bench_recipe.py table

DATASET is task04, brain16, lesion5 or demo; BUDGET a training time such as 5m; VARIANT a name in `VARIANTS`. A run
plans the dataset (once for each network that variants ask for, in the work folder), trains the fold for the budget, and
scores the whole volumes of its validation cases. Its result is added as one line to `docs/recipe.jsonl`, so that hours
of computing survive whatever comes; `table` prints all lines. The processors that other programs kept busy meanwhile
are in each line: compare only undisturbed ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench_training import MAX_OTHERS_BUSY, busy_s

import autoseg
from autoseg.cli import parse_duration
from autoseg.core.runtime import n_cpus
from autoseg.core.serialize import read_json, to_plain, write_json
from autoseg.data.phantom import write_phantom_dataset
from autoseg.evaluation.scores import Evaluation
from autoseg.inference.model import fold_folder
from autoseg.pipeline.workspace import Workspace, default_configuration
from autoseg.planning.choices import Choices
from autoseg.reporting.text import format_table
from autoseg.training.config import Budget, TrainConfig
from autoseg.training.recipe import RECIPES
from autoseg.training.record import FoldFiles, TrainingRecord, read_log

RESULTS = Path(__file__).parents[1] / "docs" / "recipe.jsonl"
CONFIGURATION = "3d_fullres"
SHARED_DATASETS = {"task04": "Task04_Hippocampus", "brain16": "Brain16_iso2", "lesion5": "BrainLesion_5mm"}
DEMO = "demo"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What differs from the default.

    Attributes:
        train: fields of `TrainConfig`.
        recipe: fields of the recipe that `train` names, or else of "fast".
        patch_size: of the 3D configuration, (Z, Y, X).
        first_features: of the network's first stage; the others follow in proportion.
    """

    train: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    patch_size: tuple[int, int, int] | None = None
    first_features: int | None = None

    @property
    def network(self) -> str:
        """A name for the plan that it needs."""
        patch = "x".join(map(str, self.patch_size)) if self.patch_size else "planned"
        return f"{patch}-{self.first_features or 'planned'}"


BALANCED: Mapping[str, Any] = {"sampling": "balanced", "foreground_fraction": 2 / 3}

VARIANTS: dict[str, Variant] = {
    "default": Variant(),
    "published": Variant(train={"recipe": "published"}),
    "balanced": Variant(train=BALANCED),
    "foreground 2/3": Variant(train={"foreground_fraction": 2 / 3}),
    "balanced, third": Variant(train={"sampling": "balanced"}),
    "balanced, 48x64x48": Variant(train=BALANCED, patch_size=(48, 64, 48)),
    "balanced, 48x64x48, 24 features": Variant(train=BALANCED, patch_size=(48, 64, 48), first_features=24),
    "balanced, 64x96x64": Variant(train=BALANCED, patch_size=(64, 96, 64)),
    "rate 1e-3": Variant(recipe={"learning_rate": 1e-3}),
    "rate 2e-3": Variant(recipe={"learning_rate": 2e-3}),
    "no augmentation": Variant(train={"augment": "none"}),
    "mirrored": Variant(train={"mirror": True}),
    "batch 1": Variant(train={"batch_size": 1}),
    "batch 4": Variant(train={"batch_size": 4}),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of the file.

    Attributes:
        dataset, variant, fold, seed: what was run.
        budget_s: training time that was allowed.
        n_steps, batch_size: that were done.
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
    folder = work / f"{dataset}-{variant.network}"
    if (folder / "plan.json").exists():
        return folder
    if dataset == DEMO:
        source = work / "demo-data"
        if not source.exists():
            write_phantom_dataset(source, n_train=20, n_test=1)
    else:
        source = shared / "data" / SHARED_DATASETS[dataset]
    sizes = {CONFIGURATION: variant.patch_size} if variant.patch_size else {}
    choices = Choices(configurations=(CONFIGURATION,), patch_sizes=sizes)
    plan = autoseg.plan(source, folder, choices=choices)
    if variant.first_features is not None:
        planned = plan.configuration(CONFIGURATION)
        ratio = variant.first_features / planned.network.features[0]
        features = tuple(round(width * ratio) for width in planned.network.features)
        network = dataclasses.replace(planned.network, features=features)
        changed = {**plan.configurations, CONFIGURATION: dataclasses.replace(planned, network=network)}
        write_json(folder / "plan.json", dataclasses.replace(plan, configurations=changed))
    return folder


def run(arguments: argparse.Namespace) -> Result:
    """Trains, scores, and keeps the result."""
    variant, budget_s = VARIANTS[arguments.variant], parse_duration(arguments.budget)
    work = prepare(arguments.dataset, variant, shared=arguments.shared, work=arguments.work)
    train = {"recipe": "fast", "seed": arguments.seed, **variant.train}
    if variant.recipe:
        RECIPES["variant"] = dataclasses.replace(RECIPES[train["recipe"]], **variant.recipe)
        train["recipe"] = "variant"
    workspace = Workspace(root=work)
    chosen = default_configuration(workspace.read_plan(), CONFIGURATION)
    folder = fold_folder(workspace.model(chosen.name), arguments.fold)
    config = TrainConfig(budget=Budget.make(max_time_s=budget_s) or Budget(iterations=1), **train)
    started, (all_before, own_before) = time.monotonic(), busy_s()
    options: dict[str, Any] = {"folds": [arguments.fold], "configuration": chosen.name, "device": "auto"}
    autoseg.train(work, **options, config=config, resume=False, validate=False)
    took_s, (all_after, own_after) = time.monotonic() - started, busy_s()
    evaluation = autoseg.train(work, **options, config=config)[arguments.fold]
    assert isinstance(evaluation, Evaluation)
    record = read_json(FoldFiles(folder=folder).training, TrainingRecord)
    return Result(
        dataset=arguments.dataset,
        variant=arguments.variant,
        fold=arguments.fold,
        seed=arguments.seed,
        budget_s=budget_s,
        n_steps=read_log(FoldFiles(folder=folder).log)[-1].iteration,
        batch_size=record.batch_size,
        mean_dice=round(evaluation.mean_dice, 4),
        label_dice={label: round(value, 4) for label, value in evaluation.label_dice.items()},
        lesion_f1={known.label: round(known.metrics["lesion_f1"].mean, 4) for known in evaluation.labels},
        others_busy=round(max(0.0, (all_after - all_before) - (own_after - own_before)) / took_s, 2),
        autoseg=autoseg.__version__,
        torch=torch.__version__,
        machine=torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {n_cpus()} CPUs",
        date=date.today().isoformat(),
    )


def show(results: Path) -> str:
    """All lines: for each dataset, variant and budget the mean over folds and seeds."""
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["dataset"], line["variant"], line["budget_s"]), []).append(line)
    rows = []
    for (dataset, variant, budget_s), known in sorted(groups.items()):
        dice = [line["mean_dice"] for line in known]
        spread = f"{min(dice):.4f}..{max(dice):.4f}" if len(dice) > 1 else ""
        disturbed = sum(line["others_busy"] > MAX_OTHERS_BUSY for line in known)
        rows.append(
            (
                f"{dataset}, {variant}",
                f"{budget_s / 60:g}",
                f"{statistics.mean(dice):.4f}",
                spread,
                str(min(line["n_steps"] for line in known)),
                str(len(known)),
                str(disturbed),
            )
        )
    header = ("dataset, variant", "minutes", "mean Dice", "range", "steps", "runs", "disturbed")
    return format_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    runner = parts.add_parser("run")
    runner.add_argument("dataset", choices=[*SHARED_DATASETS, DEMO])
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
    result = run(arguments)
    with arguments.results.open("a") as file:
        file.write(json.dumps(to_plain(result)) + "\n")
    print(f"{result.dataset}, {result.variant}, {arguments.budget}: mean Dice {result.mean_dice:.4f}", file=sys.stderr)


if __name__ == "__main__":
    main()
