"""Training side by side with nnU-Net on the CPU: seconds of a step, memory, and augmentation by itself.

    python scripts/bench_training.py --peer PYTHON [--data ../shared/data/Task04_Hippocampus] [--json FILE]

`--peer` names the Python of an environment with nnU-Net in it. Both plan and preprocess the same dataset (layout of the
Medical Segmentation Decathlon) into a temporary folder and train the first fold of its 3D configuration. It is refused
where patch or batch of the two plans differ. Every measurement is a process of its own, and the two alternate, so that
a busy machine hurts both; the figures are medians over all rounds. What is compared:

- A training step with reading and augmentation. Ours is `train_fold` with the published recipe, the time between two
  steps; theirs is their trainer with its own loaders, the time of taking a batch and of `train_step`. Neither
  validates. Each in the precision that it chooses for this processor, which is printed.
- Forward, loss, backward and update on one batch that stays in memory, in the same way. Their network has one more
  segmentation layer, on the lowest output, which their loss gives no weight.
- Augmentation in one process, of samples cut from larger ones in memory, with one thread of torch and with all. Theirs
  is what their trainer builds from batchgeneratorsv2, without the labels for deep supervision, and the classic pipeline
  of batchgenerators with the same probabilities and ranges. It interpolates images linearly, as the other two do; the
  original took cubic splines, which take longer. Where they train, each of their loading processes has one thread.
- The largest sum of the memory of a training process and of its children (proportional set size, so only on Linux).

The processors that other programs kept busy meanwhile are printed: two sides that were disturbed unequally can't be
compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from math import ceil, hypot
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoseg import __version__
from autoseg.core.runtime import n_cpus
from autoseg.networks.build import build_trainable
from autoseg.pipeline.workspace import Workspace
from autoseg.preprocessing.store import PreprocessedCase
from autoseg.training.adapt import choose_training
from autoseg.training.augment import AugmentConfig, apply_parameters, draw_parameters, read_size
from autoseg.training.config import Budget, TrainConfig
from autoseg.training.learner import Learner
from autoseg.training.patches import read_region
from autoseg.training.recipe import RECIPES
from autoseg.training.trainer import train_fold

CONFIGURATION = "3d_fullres"
RECIPE = "published"
FOLD = 0
RESULT = "RESULT "
MEMORY_INTERVAL_S = 0.2
# Processors, on average over a measurement; above, it counts as disturbed.
MAX_OTHERS_BUSY = 0.1
N_AUGMENT_WARM_UP = 5
# nnU-Net starts as many loading processes as there are processors, but no more than this.
MAX_PEER_WORKERS = 12

PEER_START = """
import json, os, sys, time
options = json.loads(sys.argv[1])
import numpy, torch
from importlib.metadata import version

def report(**content):
    about = {"torch": torch.__version__, "version": version("nnunetv2"), "threads": torch.get_num_threads()}
    print("\\n" + options["mark"] + json.dumps({"about": about | content.pop("about", {}), **content}), flush=True)

def make_trainer():
    from nnunetv2.run.run_training import get_trainer_from_args
    torch.set_num_threads(options["n_cpus"])
    trainer = get_trainer_from_args("1", options["configuration"], options["fold"], device=torch.device("cpu"))
    return trainer

def crop(array, size):
    starts = [(have - want) // 2 for have, want in zip(array.shape[2:], size)]
    return array[(..., *(slice(start, start + int(want)) for start, want in zip(starts, size)))]
"""

PEER_PREPARE = """
if __name__ == "__main__":
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    extract_fingerprints([1], num_processes=options["n_cpus"])
    identifier = plan_experiments([1])
    preprocess([1], identifier, (options["configuration"],), (options["n_cpus"],))
    trainer = make_trainer()
    made = trainer.configuration_manager
    report(about={"patch": [int(size) for size in made.patch_size], "batch": int(made.batch_size)})
"""

PEER_TRAIN = """
if __name__ == "__main__":
    trainer = make_trainer()
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    seconds = []
    for _ in range(options["n_warm_up"] + options["n_steps"]):
        started = time.monotonic()
        trainer.train_step(next(trainer.dataloader_train))
        seconds.append(time.monotonic() - started)
    report(values={"step": seconds[options["n_warm_up"]:]}, about={"workers": trainer.dataloader_train.num_processes})
"""

PEER_NETWORK = """
if __name__ == "__main__":
    trainer = make_trainer()
    trainer.initialize()
    trainer.on_train_epoch_start()
    size = trainer.configuration_manager.patch_size
    images = torch.from_numpy(crop(numpy.load(options["images"]), size).copy())
    labels = torch.from_numpy(crop(numpy.load(options["labels"]), size).copy())
    transform = trainer.get_validation_transforms(trainer._get_deep_supervision_scales())
    samples = [transform(image=image, segmentation=label)["segmentation"] for image, label in zip(images, labels)]
    batch = {"data": images, "target": [torch.stack(level) for level in zip(*samples)]}
    seconds = []
    for _ in range(options["n_warm_up"] + options["n_steps"]):
        started = time.monotonic()
        trainer.train_step(batch)
        seconds.append(time.monotonic() - started)
    weights = sum(weight.numel() for weight in trainer.network.parameters())
    report(values={"step": seconds[options["n_warm_up"]:]}, about={"weights": weights, "precision": "float32"})
"""

PEER_AUGMENT = """
from threadpoolctl import threadpool_limits

def build_v2(trainer):
    rotation, dummy_2d, _, mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    transform = trainer.get_training_transforms(
        trainer.configuration_manager.patch_size, rotation, None, mirror_axes, dummy_2d,
        use_mask_for_norm=trainer.configuration_manager.use_mask_for_norm,
        foreground_labels=trainer.label_manager.foreground_labels,
    )

    def augment(images, labels):
        for image, label in zip(images, labels):
            transform(image=torch.from_numpy(image.copy()), segmentation=torch.from_numpy(label.copy()))

    return augment

def build_classic(trainer):
    from batchgenerators.transforms.abstract_transforms import Compose
    from batchgenerators.transforms import color_transforms as color, noise_transforms as noise
    from batchgenerators.transforms import spatial_transforms as spatial
    from batchgenerators.transforms.resample_transforms import SimulateLowResolutionTransform
    from batchgenerators.transforms.utility_transforms import NumpyToTensor, RemoveLabelTransform
    rotation, dummy_2d, _, mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    if dummy_2d:
        raise SystemExit("the classic pipeline is written down for isotropic patches only")
    transform = Compose([
        spatial.SpatialTransform(
            tuple(trainer.configuration_manager.patch_size), patch_center_dist_from_border=None, random_crop=False,
            do_elastic_deform=False, p_el_per_sample=0, p_rot_per_sample=0.2, p_scale_per_sample=0.2,
            angle_x=rotation, angle_y=rotation, angle_z=rotation, scale=(0.7, 1.4),
            border_mode_data="constant", order_data=1, border_mode_seg="constant", border_cval_seg=-1, order_seg=1,
        ),
        noise.GaussianNoiseTransform(noise_variance=(0, 0.1), p_per_sample=0.1),
        noise.GaussianBlurTransform(blur_sigma=(0.5, 1.0), p_per_sample=0.2, p_per_channel=0.5),
        color.BrightnessMultiplicativeTransform(multiplier_range=(0.75, 1.25), p_per_sample=0.15),
        color.ContrastAugmentationTransform(contrast_range=(0.75, 1.25), p_per_sample=0.15),
        SimulateLowResolutionTransform(
            zoom_range=(0.5, 1), per_channel=True, p_per_channel=0.5, order_downsample=0, order_upsample=3,
            p_per_sample=0.25,
        ),
        color.GammaTransform((0.7, 1.5), invert_image=True, per_channel=True, retain_stats=True, p_per_sample=0.1),
        color.GammaTransform((0.7, 1.5), invert_image=False, per_channel=True, retain_stats=True, p_per_sample=0.3),
        spatial.MirrorTransform(mirror_axes),
        RemoveLabelTransform(-1, 0),
        NumpyToTensor(),
    ])
    return lambda images, labels: transform(data=images.copy(), seg=labels.copy())

if __name__ == "__main__":
    trainer = make_trainer()
    size = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[2]
    images, labels = (crop(numpy.load(options[name]), size) for name in ("images", "labels"))
    augment = {"v2": build_v2, "classic": build_classic}[options["pipeline"]](trainer)
    values = {}
    for threads in sorted({1, options["n_cpus"]}):
        torch.set_num_threads(threads)
        n_samples, n_warm_up = 0, options["n_augment_warm_up"]
        with threadpool_limits(threads):
            for _ in range(n_warm_up):
                augment(images, labels)
            started = time.monotonic()
            while time.monotonic() - started < options["augment_s"]:
                augment(images, labels)
                n_samples += len(images)
            values[str(threads)] = [n_samples / (time.monotonic() - started)]
    report(values=values, about={"reads": [int(length) for length in size]})
"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one process reported.

    Attributes:
        program: "train", "network" or "augment".
        side: "autoseg", or whose code was measured.
        values: name to seconds of each step, or to samples per second.
        about: versions, threads, precision.
        peak_mib: largest sum of the memory of the process and of its children.
        seconds: wall time of the process.
        others_busy: processors that other programs kept busy meanwhile, on average.
    """

    program: str
    side: str
    values: dict[str, list[float]]
    about: dict[str, Any]
    peak_mib: float
    seconds: float
    others_busy: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: what was measured.
        unit: of both values.
        ours: median.
        peer: median.
        peer_name: whose.
        ratio: how many times ours is better: faster, or smaller.
    """

    name: str
    unit: str
    ours: float
    peer: float
    peer_name: str
    ratio: float


class _EnoughSteps(Exception):
    """Ends a training without its last checkpoint."""


# -- ours, each in a process of its own --------------------------------------------------------------------------------


def measure_training(options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of training steps with all that belongs to them, from the real training loop."""
    workspace = Workspace(root=Path(options["work"]))
    plan, fold = workspace.read_plan(), workspace.read_splits().folds[FOLD]
    configuration = plan.configuration(CONFIGURATION)
    grid = plan.grid(CONFIGURATION)
    ends: list[float] = []

    def count_step() -> bool:
        ends.append(time.monotonic())
        if len(ends) >= options["n_warm_up"] + options["n_steps"]:
            raise _EnoughSteps
        return False

    # So long that neither the schedule nor an epoch comes to its end.
    budget = Budget(iterations=1_000_000, iterations_per_epoch=1_000_000)
    config, device = TrainConfig(budget=budget, recipe=RECIPE, batch_size=configuration.batch_size), torch.device("cpu")
    with contextlib.suppress(_EnoughSteps):
        train_fold(
            Path(options["work"]) / "bench",
            plan,
            choose_training(plan, configuration, config, n_cases=len(fold.training), device=device)[0],
            training=[PreprocessedCase(workspace.preprocessed(grid, case)) for case in fold.training],
            validation=[PreprocessedCase(workspace.preprocessed(grid, case)) for case in fold.validation],
            config=config,
            device=device,
            resume=False,
            stop=count_step,
        )
    seconds = np.diff(ends)[options["n_warm_up"] - 1 :].tolist()
    return {"values": {"step": seconds}, "about": {}}


def measure_network(options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of forward, loss, backward and update on one batch in memory."""
    plan = Workspace(root=Path(options["work"])).read_plan()
    configuration = plan.configuration(CONFIGURATION)
    recipe = RECIPES[RECIPE]
    learner = Learner(build_trainable(plan, configuration), configuration, recipe=recipe, device=torch.device("cpu"))
    images = _crop(torch.from_numpy(np.load(options["images"])), configuration.patch_size)
    classes = _crop(torch.from_numpy(np.load(options["labels"]))[:, 0].long(), configuration.patch_size)
    seconds = []
    for _ in range(options["n_warm_up"] + options["n_steps"]):
        started = time.monotonic()
        learner.step(lambda: learner.loss(images, classes), learning_rate=recipe.learning_rate)
        seconds.append(time.monotonic() - started)
    n_weights = sum(weight.numel() for weight in learner.network.parameters())
    precision = learner.precision_name
    return {
        "values": {"step": seconds[options["n_warm_up"] :]},
        "about": {"weights": n_weights, "precision": precision},
    }


def measure_augmentation(options: dict[str, Any]) -> dict[str, Any]:
    """Augmented samples per second, by the number of torch's threads."""
    configuration = Workspace(root=Path(options["work"])).read_plan().configuration(CONFIGURATION)
    images = torch.from_numpy(np.load(options["images"]))
    classes = torch.from_numpy(np.load(options["labels"]))[:, 0].long()
    config = AugmentConfig.for_patch(configuration.patch_size)
    generator = torch.Generator().manual_seed(0)

    def augment() -> None:
        parameters = draw_parameters(
            n_samples=len(images),
            n_channels=images.shape[1],
            n_axes=configuration.n_axes,
            config=config,
            generator=generator,
        )
        size = read_size(configuration.patch_size, parameters)
        patch_size = configuration.patch_size
        apply_parameters(_crop(images, size), _crop(classes, size), patch_size=patch_size, parameters=parameters)

    values = {}
    for n_threads in sorted({1, options["n_cpus"]}):
        torch.set_num_threads(n_threads)
        for _ in range(N_AUGMENT_WARM_UP):
            augment()
        n_samples, started = 0, time.monotonic()
        while time.monotonic() - started < options["augment_s"]:
            augment()
            n_samples += len(images)
        values[str(n_threads)] = [n_samples / (time.monotonic() - started)]
    return {"values": values, "about": {}}


def _crop(array: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """The centre of the last axes, in memory of its own, as if it had been read."""
    for axis, length in enumerate(size, start=array.ndim - len(size)):
        array = array.narrow(axis, (array.shape[axis] - length) // 2, length)
    return array.contiguous()


OURS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "train": measure_training,
    "network": measure_network,
    "augment": measure_augmentation,
}
PEER_PROGRAMS = {"prepare": PEER_PREPARE, "train": PEER_TRAIN, "network": PEER_NETWORK, "augment": PEER_AUGMENT}


# -- data --------------------------------------------------------------------------------------------------------------


def write_raw_dataset(source: Path, target: Path) -> None:
    """Links a dataset of the Medical Segmentation Decathlon with one channel into nnU-Net's raw layout."""
    content = json.loads((source / "dataset.json").read_text())
    channels = content.get("modality") or content["channel_names"]
    if len(channels) != 1:
        raise SystemExit(f"{source}: has {len(channels)} channels, this benchmark takes datasets of one")
    for name in ("imagesTr", "labelsTr"):
        (target / name).mkdir(parents=True)
    for label in sorted((source / "labelsTr").glob("*.nii.gz")):
        case = label.name.removesuffix(".nii.gz")
        (target / "imagesTr" / f"{case}_0000.nii.gz").symlink_to((source / "imagesTr" / label.name).resolve())
        (target / "labelsTr" / label.name).symlink_to(label.resolve())
    description = {
        "channel_names": channels,
        "labels": {name: int(value) for value, name in content["labels"].items()},
        "numTraining": len(list((target / "labelsTr").iterdir())),
        "file_ending": ".nii.gz",
    }
    (target / "dataset.json").write_text(json.dumps(description))


def write_samples(work: Path, images_file: Path, labels_file: Path) -> None:
    """Writes one batch of preprocessed cases, each amid enough around it for every rotation and scale.

    Images are (N, C, Z, Y, X) float32, labels (N, 1, Z, Y, X) int16.
    """
    workspace = Workspace(root=work)
    plan = workspace.read_plan()
    configuration, grid = plan.configuration(CONFIGURATION), plan.grid(CONFIGURATION)
    largest_scale = AugmentConfig.for_patch(configuration.patch_size).scaling_range[1]
    size = (ceil(hypot(*configuration.patch_size) * largest_scale) + 2,) * 3
    images, labels = [], []
    for name in workspace.read_splits().folds[FOLD].training[: configuration.batch_size]:
        case = PreprocessedCase(workspace.preprocessed(grid, name))
        start = [(have - want) // 2 for have, want in zip(case.label.shape, size, strict=True)]
        images.append(read_region(case.image, start, size).astype(np.float32))
        labels.append(read_region(case.label, start, size).astype(np.int16)[None])
    np.save(images_file, np.stack(images))
    np.save(labels_file, np.stack(labels))


# -- running and watching ----------------------------------------------------------------------------------------------


def family_mib(root: int) -> float:
    """Proportional set size of a process and of all that descend from it, from /proc."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    family, grown = {root}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in family} - family
        family |= more
        grown = bool(more)
    total_kib = 0
    for pid in family:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total_kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total_kib / 1024


def busy_s() -> tuple[float, float]:
    """Processor seconds since the start: of the whole machine, and of this process and its ended children."""
    ticks = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def run(program: str, side: str, command: list[str], environment: dict[str, str]) -> Measured:
    """Runs a process, watches its memory, and reads what it reports.

    Raises:
        SystemExit: it failed.
    """
    started, (all_before, own_before) = time.monotonic(), busy_s()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=os.environ | environment)
        peak_mib = [0.0]

        def watch() -> None:
            while process.poll() is None:
                peak_mib[0] = max(peak_mib[0], family_mib(process.pid))
                time.sleep(MEMORY_INTERVAL_S)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            process.wait()
        finally:
            process.kill()
            watcher.join()
        output.seek(0)
        errors.seek(0)
        found = [line for line in output.read().splitlines() if line.startswith(RESULT)]
        if process.returncode or not found:
            raise SystemExit(f"{program} of {side} failed:\n{errors.read()[-3000:]}")
    content = json.loads(found[-1].removeprefix(RESULT))
    seconds, (all_after, own_after) = time.monotonic() - started, busy_s()
    others_s = (all_after - all_before) - (own_after - own_before)
    print(
        f"{program} of {side}: {seconds:.0f} s, others kept busy {others_s / seconds:.1f} processors", file=sys.stderr
    )
    return Measured(
        program=program,
        side=side,
        values=content.get("values", {}),
        about=content["about"],
        peak_mib=round(peak_mib[0], 1),
        seconds=round(seconds, 1),
        others_busy=round(max(0.0, others_s / seconds), 2),
    )


class Bench:
    """The two sides on one dataset, in a scratch folder."""

    def __init__(self, data: Path, scratch: Path, *, peer: Path, options: dict[str, Any]) -> None:
        """Plans and preprocesses the dataset on both sides.

        Args:
            data: the dataset.
            scratch: an empty folder for everything that is written.
            peer: Python of an environment with nnU-Net.
            options: numbers of steps and the like, for the measured programs.

        Raises:
            SystemExit: the two plans differ in patch or batch.
        """
        self._peer = peer
        raw, work = scratch / "raw", scratch / "work"
        files = {"images": str(scratch / "images.npy"), "labels": str(scratch / "labels.npy"), "work": str(work)}
        fixed = {"configuration": CONFIGURATION, "fold": FOLD, "mark": RESULT, "n_augment_warm_up": N_AUGMENT_WARM_UP}
        self._options = options | files | fixed
        self._environment = {
            "nnUNet_raw": str(raw),
            "nnUNet_preprocessed": str(scratch / "preprocessed"),
            "nnUNet_results": str(scratch / "results"),
            "nnUNet_n_proc_DA": str(min(MAX_PEER_WORKERS, options["n_cpus"])),
            "nnUNet_def_n_proc": str(options["n_cpus"]),
        }
        command = [sys.executable, "-m", "autoseg", "-q", "plan", str(data), "-w", str(work), "-c", CONFIGURATION]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        write_samples(work, Path(files["images"]), Path(files["labels"]))
        write_raw_dataset(data, raw / "Dataset001_Bench")
        configuration = Workspace(root=work).read_plan().configuration(CONFIGURATION)
        self.patch_size, self.batch_size = configuration.patch_size, configuration.batch_size
        theirs = self.run_peer("prepare", "nnU-Net").about
        if (tuple(theirs["patch"]), theirs["batch"]) != (self.patch_size, self.batch_size):
            raise SystemExit(
                f"the plans differ: patch {self.patch_size} and batch {self.batch_size} here, "
                f"{theirs['patch']} and {theirs['batch']} in nnU-Net"
            )

    def run_ours(self, program: str) -> Measured:
        """One measurement of autoseg."""
        command = [sys.executable, __file__, "--measure", program, "--options", json.dumps(self._options)]
        return run(program, "autoseg", command, {})

    def run_peer(self, program: str, side: str, **options: str) -> Measured:
        """One measurement in the peer's environment."""
        text = PEER_START + PEER_PROGRAMS[program]
        command = [str(self._peer), "-c", text, json.dumps(self._options | options)]
        return run(program, side, command, self._environment)


# -- the table ---------------------------------------------------------------------------------------------------------


def make_rows(runs: list[Measured]) -> list[Row]:
    """Medians over all rounds, and how many times ours is better."""

    def median(program: str, side: str, name: str) -> float:
        chosen = [known for known in runs if (known.program, known.side) == (program, side)]
        if name == "peak":
            return statistics.median(known.peak_mib for known in chosen)
        return statistics.median(value for known in chosen for value in known.values[name])

    def row(name: str, unit: str, program: str, key: str, peer_name: str) -> Row:
        ours, peer = median(program, "autoseg", key), median(program, peer_name, key)
        ratio = ours / peer if unit == "samples/s" else peer / ours
        return Row(name=name, unit=unit, ours=ours, peer=peer, peer_name=peer_name, ratio=ratio)

    rows = [
        row("training step, data and augmentation", "s", "train", "step", "nnU-Net"),
        row("training step, network and loss alone", "s", "network", "step", "nnU-Net"),
    ]
    threads = next(known for known in runs if known.program == "augment").values
    for n_threads in threads:
        for side in ("batchgenerators", "batchgeneratorsv2"):
            name = f"augmentation alone, torch threads: {n_threads}"
            rows.append(row(name, "samples/s", "augment", n_threads, side))
    rows.append(row("memory of training, all processes", "MiB", "train", "peak", "nnU-Net"))
    rows.append(row("memory of network and loss alone", "MiB", "network", "peak", "nnU-Net"))
    return rows


def format_rows(rows: list[Row]) -> str:
    """The table, ratios last."""
    lines = [f"{'':<40}{'unit':<11}{'autoseg':>9}{'peer':>9}  {'peer is':<19}{'times better':>12}"]
    for row in rows:
        digits = 2 if row.unit == "s" else 0 if row.unit == "MiB" else 1
        values = f"{row.ours:>9.{digits}f}{row.peer:>9.{digits}f}"
        lines.append(f"{row.name:<40}{row.unit:<11}{values}  {row.peer_name:<19}{row.ratio:>12.2f}")
    return "\n".join(lines)


def describe_sides(runs: list[Measured]) -> dict[str, dict[str, Any]]:
    """Versions, threads, precision and weights of both."""
    sides: dict[str, dict[str, Any]] = {"autoseg": {}, "nnU-Net": {}}
    for known in runs:
        if known.side in sides and known.program != "augment":
            sides[known.side] |= known.about
    return sides


def report_measurement(program: str, options: dict[str, Any]) -> None:
    """Prints what one of our measurements gives, for the process that started this one."""
    content = OURS[program](options)
    about = {"torch": torch.__version__, "version": __version__, "threads": torch.get_num_threads()}
    print("\n" + RESULT + json.dumps(content | {"about": about | content["about"]}))


def measure_all(bench: Bench, n_rounds: int) -> list[Measured]:
    """Every measurement, the two sides in turns."""
    runs = []
    for program in ("train", "network"):
        for _ in range(n_rounds):
            runs += [bench.run_ours(program), bench.run_peer(program, "nnU-Net")]
    for _ in range(n_rounds):
        runs.append(bench.run_ours("augment"))
        runs.append(bench.run_peer("augment", "batchgenerators", pipeline="classic"))
        runs.append(bench.run_peer("augment", "batchgeneratorsv2", pipeline="v2"))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[1].parent / "shared" / "data" / "Task04_Hippocampus"
    parser.add_argument("--peer", type=Path, help="Python of an environment with nnU-Net; needed")
    parser.add_argument("--data", type=Path, default=default, help="dataset in the layout of the Decathlon")
    parser.add_argument("--steps", type=int, default=6, help="timed steps per process")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before those, at least 1")
    parser.add_argument("--rounds", type=int, default=2, help="how often the two take turns")
    parser.add_argument("--augment-s", type=float, default=6.0, help="seconds of augmentation per number of threads")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--measure", choices=sorted(OURS), help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        report_measurement(arguments.measure, arguments.options)
        return
    if arguments.peer is None:
        parser.error("--peer is needed: the Python of an environment with nnU-Net")
    if min(arguments.steps, arguments.warm_up, arguments.rounds) < 1:
        parser.error("--steps, --warm-up and --rounds must be at least 1")
    # So that neither a measured process nor the scratch folder outlives this one.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    started = time.monotonic()
    numbers = {"n_steps": arguments.steps, "n_warm_up": arguments.warm_up, "augment_s": arguments.augment_s}
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(arguments.data, Path(name), peer=arguments.peer, options=numbers | {"n_cpus": n_cpus()})
        runs = measure_all(bench, arguments.rounds)
    rows, sides = make_rows(runs), describe_sides(runs)
    others = statistics.mean(known.others_busy for known in runs)
    patch = "x".join(map(str, bench.patch_size))
    print(f"{arguments.data.name}, {CONFIGURATION}: patch {patch}, batch {bench.batch_size}")
    for side, about in sides.items():
        print(f"{side}: " + ", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"rounds: {arguments.rounds}, steps in each: {arguments.steps}; took {time.monotonic() - started:.0f} s")
    print(f"processors that others kept busy: {others:.2f} of {os.cpu_count()}")
    disturbed = sum(known.others_busy > MAX_OTHERS_BUSY for known in runs)
    print(
        f"{disturbed} of {len(runs)} measurements were disturbed, so the figures are not final\n" if disturbed else ""
    )
    print(format_rows(rows))
    if arguments.json:
        report = {
            "date": date.today().isoformat(),
            "cpus": n_cpus(),
            "others_busy": round(others, 2),
            "options": numbers | {"rounds": arguments.rounds},
            "patch": bench.patch_size,
            "batch": bench.batch_size,
            "sides": sides,
            "rows": [asdict(row) for row in rows],
            "runs": [asdict(known) for known in runs],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
