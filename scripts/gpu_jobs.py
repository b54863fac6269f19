"""What `gpu_suite.py` measures, each in a process of its own: speed of training, memory, prediction, folds.

    python scripts/gpu_jobs.py JOB OPTIONS

where OPTIONS is JSON. Every result is a line on the standard output as soon as it is there, so that what was measured
is not lost where the process is ended later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from gpu_clock import GIB, StepClock, Timing, emit, forget_memory, peak_memory, synchronize

from autoseg.core.geometry import Box, Geometry
from autoseg.core.labels import LabelSpec
from autoseg.core.machine import processor_name
from autoseg.core.runtime import computing, n_cpus
from autoseg.core.serialize import read_json
from autoseg.evaluation.metrics import count_labels, dice
from autoseg.inference.predictor import window_config
from autoseg.inference.sliding_window import WindowConfig, predict_logits
from autoseg.networks.build import build_network, build_trainable
from autoseg.pipeline.configurations import default_configuration
from autoseg.pipeline.fit import MEMORY_BUDGET_GIB
from autoseg.pipeline.workspace import Workspace
from autoseg.planning.choices import Choices
from autoseg.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint
from autoseg.planning.memory import count_feature_map_values
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.planning.planner import make_plan
from autoseg.planning.presets import find_preset
from autoseg.preprocessing.preprocess import CaseRecord
from autoseg.preprocessing.store import PreprocessedCase, load_into_memory, write_case
from autoseg.training.adapt import choose_training
from autoseg.training.config import Budget, TrainConfig
from autoseg.training.learner import Learner
from autoseg.training.measure import measure_configuration
from autoseg.training.recipe import RECIPES
from autoseg.training.record import FoldFiles
from autoseg.training.trainer import train_fold

CONFIGURATION = "3d_fullres"
RECIPE = "fast"
LABELS = LabelSpec(names=("first", "second"), values=(1, 2))
# Shape (z, y, x) and spacing in mm of a case, as in well-known datasets; the last is for trying the script out.
SIZES = {
    "hippocampus": ((36, 50, 35), (1.0, 1.0, 1.0)),
    "prostate": ((20, 320, 320), (3.6, 0.6, 0.6)),
    "liver": ((160, 400, 400), (2.5, 0.8, 0.8)),
    "tiny": ((20, 24, 28), (1.0, 1.0, 1.0)),
}
N_CASES = 4
THIN_FEATURES = 8
# Each with the memory it is made for.
MEASURED_PRESETS = ("unet", "resenc-l")
MAX_SEARCH_S = 30.0


# -- plans and data ----------------------------------------------------------------------------------------------------


def plan_for(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], *, choices: Choices | None = None
) -> Plan:
    """The plan for a dataset of a hundred CTs of this size."""
    cases = tuple(
        CaseFingerprint(
            case=str(i), shape=shape, spacing_mm=spacing_mm, cropped_shape=shape, label_volumes_ml=(1.0, 1.0)
        )
        for i in range(100)
    )
    channel = ChannelFingerprint(
        name="CT", mean=0, std=1, minimum=-3, maximum=3, median=0, percentile_00_5=-2, percentile_99_5=2
    )
    fingerprint = Fingerprint(cases=cases, channels=(channel,), median_cropped_fraction=1.0)
    return make_plan(fingerprint, LABELS, dataset="random", n_folds=5, choices=choices)


def plan_size(size: str) -> tuple[Plan, ConfigurationPlan]:
    """The plan of one of `SIZES` and its 3D configuration; of "tiny" with two patches and few features."""
    made = plan_for(*SIZES[size])
    configuration = made.configuration(CONFIGURATION)
    if size == "tiny":
        features = tuple(min(THIN_FEATURES, width) for width in configuration.network.features)
        network = dataclasses.replace(configuration.network, features=features)
        configuration = dataclasses.replace(configuration, batch_size=2, network=network)
        made = dataclasses.replace(made, configurations=made.configurations | {CONFIGURATION: configuration})
    return made, configuration


def write_cases(folder: Path, size: str) -> None:
    """Writes preprocessed cases of noise, with a box of each label."""
    shape, spacing_mm = SIZES[size]
    rng = np.random.default_rng(0)
    affine = tuple(tuple(row) for row in np.diag([*spacing_mm[::-1], 1.0]).tolist())
    record = CaseRecord(
        geometry=Geometry(shape=shape, spacing_mm=spacing_mm, affine=affine, file_axcodes=("R", "A", "S")),
        crop=Box(start=(0, 0, 0), stop=shape),
        axis_order=(0, 1, 2),
        shape=shape,
        spacing_mm=spacing_mm,
        nearest_axis=None,
    )
    label = np.zeros(shape, np.uint8)
    for value in LABELS.values:
        label[tuple(slice(value * size // 4, (value + 1) * size // 4) for size in shape)] = value
    for index in range(N_CASES):
        image = rng.standard_normal((1, *shape), dtype=np.float32)
        write_case(folder / str(index), image, label, key="k", record=record, n_classes=3)


def open_cases(folders: Iterator[Path]) -> list[PreprocessedCase]:
    """Cases as a training opens them: in memory, up to its limit."""
    return load_into_memory([PreprocessedCase(folder) for folder in folders], budget_gib=MEMORY_BUDGET_GIB)


# -- speed of training -------------------------------------------------------------------------------------------------


class _EnoughSteps(Exception):
    """Ends a training without its last checkpoint."""


class _Warnings(logging.Handler):
    """Keeps the text of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def measure_speed(options: dict[str, Any]) -> None:
    """Steps per second without data and of the whole training loop, in each mode."""
    made, configuration = plan_size(options["size"])
    device, timing = torch.device(options["device"]), Timing(**options["timing"])
    about = {"side": "autoseg", "size": options["size"], "cpus": n_cpus(), "threads": torch.get_num_threads()}
    about |= {"patch": "x".join(map(str, configuration.patch_size)), "batch": configuration.batch_size}
    cases = open_cases(path for path in sorted(Path(options["cases"]).iterdir()))
    for mode in options["modes"]:
        forget_memory(device)
        with computing(device, deterministic=False):
            figures = time_network(made, configuration, device=device, timing=timing, compiled=mode == "compiled")
        emit(what="no data", mode=mode, **about, **figures)
        if "failure" in figures:
            continue
        forget_memory(device)
        with tempfile.TemporaryDirectory() as folder:
            clock = time_training(
                Path(folder),
                made,
                configuration,
                cases=cases,
                device=device,
                timing=timing,
                compiled=mode == "compiled",
            )
        emit(what="whole loop", mode=mode, **about, **clock.figures())


def time_network(
    plan: Plan, configuration: ConfigurationPlan, *, device: torch.device, timing: Timing, compiled: bool
) -> dict[str, Any]:
    """Steps on one batch that stays on the device; "failure" says why it could not be compiled."""
    recipe = RECIPES[RECIPE]
    learner = Learner(build_trainable(plan, configuration), configuration, recipe=recipe, device=device)
    shape = (configuration.batch_size, *configuration.patch_size)
    images = torch.randn(configuration.batch_size, len(plan.channels), *configuration.patch_size, device=device)
    classes = torch.randint(0, plan.labels.n_classes, shape, device=device)
    about: dict[str, Any] = {"precision": learner.precision_name, "weights": count_weights(learner.network)}
    if compiled:
        warnings, started = _Warnings(), time.monotonic()
        logging.getLogger("autoseg.training.learner").addHandler(warnings)
        worked = learner.compile(images, classes)
        about["compile_s"] = round(time.monotonic() - started, 1)
        if not worked:
            return about | {"failure": " ".join(warnings.texts)}
    clock = StepClock(timing, device)
    while True:
        learner.step(lambda: learner.loss(images, classes), learning_rate=recipe.learning_rate)
        if clock.tick():
            return about | clock.figures()


def count_weights(network: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


def time_training(
    folder: Path,
    plan: Plan,
    configuration: ConfigurationPlan,
    *,
    cases: list[PreprocessedCase],
    device: torch.device,
    timing: Timing,
    compiled: bool,
) -> StepClock:
    """Steps of the real training loop: reading, copying, augmentation, forward, backward, update."""
    clock = StepClock(timing, device)

    def stop() -> bool:
        if clock.tick():
            raise _EnoughSteps
        return False

    # So long that neither the schedule nor an epoch comes to its end.
    budget = Budget(iterations=1_000_000, iterations_per_epoch=1_000_000)
    config = TrainConfig(
        budget=budget, recipe=RECIPE, batch_size=configuration.batch_size, mirror=True, compile=compiled
    )
    with contextlib.suppress(_EnoughSteps):
        train_fold(
            folder / "bench",
            plan,
            choose_training(plan, configuration, config, n_cases=len(cases), device=device)[0],
            training=cases,
            validation=cases[:1],
            config=config,
            device=device,
            resume=False,
            stop=stop,
        )
    return clock


# -- memory and prediction ---------------------------------------------------------------------------------------------


def measure_memory(options: dict[str, Any]) -> None:
    """Estimated and measured GiB of training one preset on scans of the largest size."""
    preset, device = options["preset"], torch.device(options["device"])
    made = plan_for(*SIZES["liver"], choices=Choices(preset=preset))
    configuration = made.configuration(CONFIGURATION)
    values = count_feature_map_values(configuration.network, configuration.patch_size, LABELS.n_classes)
    estimated_gib = find_preset(preset).needed_memory_gib(
        values, batch_size=configuration.batch_size, n_axes=configuration.n_axes
    )
    row: dict[str, Any] = {
        "preset": preset,
        "patch": "x".join(map(str, configuration.patch_size)),
        "batch": configuration.batch_size,
        "estimated_gib": round(estimated_gib, 2),
    }
    if device.type == "cuda":
        measured = measure_configuration(made, configuration, device=device, max_search_s=MAX_SEARCH_S)
        row |= {
            "measured_gib": round(measured.peak_memory_gib, 2),
            "step_s": round(measured.step_time_s, 3),
            "largest_batch": measured.largest_batch_size,
        }
    emit(**row)


def measure_prediction(options: dict[str, Any]) -> None:
    """Seconds for one case of each size with mirroring, after one such case to warm up."""
    device = torch.device(options["device"])
    for size in options["sizes"]:
        made, configuration = plan_size(size)
        n_classes = made.labels.n_classes
        network = build_network(configuration.network, n_channels=1, n_outputs=n_classes).to(device).eval()
        window = WindowConfig(patch_size=configuration.patch_size, mirror_axes=(0, 1, 2))
        image = torch.randn(1, *SIZES[size][0], device=device)
        forget_memory(device)
        seconds = []
        for _ in range(2):
            started = time.monotonic()
            predict_logits(image, [network], n_outputs=n_classes, config=window)
            synchronize(device)
            seconds.append(round(time.monotonic() - started, 3))
        shape = "x".join(map(str, SIZES[size][0]))
        emit(size=size, shape=shape, first_s=seconds[0], predict_s=seconds[1], **peak_memory(device))


# -- folds -------------------------------------------------------------------------------------------------------------


def train_one_fold(options: dict[str, Any]) -> None:
    """Trains a fold of a planned work folder and scores its validation cases as wholes, on the network's grid."""
    workspace, device = Workspace(root=Path(options["work"])), torch.device(options["device"])
    made, fold = workspace.read_plan(), workspace.read_splits().folds[options["fold"]]
    configuration = default_configuration(made)
    grid = made.grid(configuration.name)
    validation = open_cases(workspace.preprocessed(grid, case) for case in fold.validation)
    budget = Budget(iterations=options["iterations"], max_time_s=options["time_s"])
    if options["iterations"]:
        budget = dataclasses.replace(budget, iterations_per_epoch=max(1, options["iterations"] // 2))
    with tempfile.TemporaryDirectory() as name:
        files = FoldFiles(folder=Path(name) / f"fold_{options['fold']}")
        started = time.monotonic()
        config = TrainConfig(budget=budget)
        choices, spent_s = choose_training(made, configuration, config, n_cases=len(fold.training), device=device)
        network = train_fold(
            files.folder,
            made,
            choices,
            training=open_cases(workspace.preprocessed(grid, case) for case in fold.training),
            validation=validation,
            config=config,
            device=device,
            spent_s=spent_s,
        )
        training_s = time.monotonic() - started
        about = read_json(files.training)
        last_epoch = json.loads(files.log.read_text().splitlines()[-1])
    window = window_config(made, choices.configuration, mirroring=about["mirrored"])
    started = time.monotonic()
    for case in validation:
        image = torch.from_numpy(np.asarray(case.image, np.float32)).to(device)
        logits = predict_logits(image, [network], n_outputs=made.labels.n_outputs, config=window)
        predicted = made.labels.classes_to_values(logits.argmax(dim=0).cpu().numpy())
        reference = made.labels.classes_to_values(np.asarray(case.label))
        # Dice alone: the distances of surfaces would be in the time that is measured.
        counts = count_labels(predicted, reference, made.labels.values)
        of_labels = dict(zip(made.labels.names, map(dice, counts), strict=True))
        rounded = {name: None if math.isnan(value) else round(value, 4) for name, value in of_labels.items()}
        emit(what="case", fold=options["fold"], case=case.id, dice=rounded)
    emit(
        what="fold",
        fold=options["fold"],
        dataset=made.dataset,
        configuration=configuration.name,
        steps=last_epoch["iteration"],
        training_s=round(training_s, 1),
        predict_case_s=round((time.monotonic() - started) / len(validation), 3),
        step_s=round(last_epoch["step_s"], 4),
        data_wait_fraction=round(last_epoch["data_wait_fraction"], 3),
        **{key: about[key] for key in ("precision", "recipe", "batch_size", "mirrored")},
        **peak_memory(device),
    )


# -- the process -------------------------------------------------------------------------------------------------------


def describe_machine(options: dict[str, Any]) -> None:
    """What it was measured on."""
    device = torch.device(options["device"])
    on_gpu = device.type == "cuda"
    emit(
        gpu=torch.cuda.get_device_name() if on_gpu else None,
        gpu_gib=round(torch.cuda.get_device_properties(device).total_memory / GIB, 1) if on_gpu else None,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if on_gpu else None,
        python=platform.python_version(),
        cpu=processor_name(),
        cpus=n_cpus(),
    )


def measure_peer(options: dict[str, Any]) -> None:
    """The other one: imported here only, because its modules want folders in the environment."""
    from gpu_peer import measure

    measure(options)


JOBS: dict[str, Callable[[dict[str, Any]], None]] = {
    "machine": describe_machine,
    "speed": measure_speed,
    "peer": measure_peer,
    "memory": measure_memory,
    "prediction": measure_prediction,
    "fold": train_one_fold,
}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    os.environ.pop("SLURM_CPUS_PER_TASK", None)
    JOBS[sys.argv[1]](json.loads(sys.argv[2]))
