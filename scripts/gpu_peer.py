"""nnU-Net's own trainer for the plan of a job of `gpu_suite.py`: its best case, and with its loaders.

Nothing of it is written anew here: network, loss, optimizer, precision, compiling, step, sampling and augmentation are
what its `nnUNetTrainer` does by itself. It gets a plan with our patch, batch and network, and cases as plain arrays,
which it reads without unpacking anything. What it imports and never calls in a training, for other kinds of files, need
not be there.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from gpu_clock import StepClock, Timing, emit, forget_memory, synchronize
from gpu_jobs import CONFIGURATION, count_weights, plan_size

from autoseg.core.runtime import n_cpus
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.preprocessing.store import PreprocessedCase

# For files of kinds that are not read here.
DISPENSABLE = ("SimpleITK", "nibabel", "blosc2", "cc3d")
DATASET = "Dataset001_random"
IDENTIFIER = f"nnUNetPlans_{CONFIGURATION}"
# It starts as many loading processes as there are processors, but no more than this.
MAX_WORKERS = 12
# Batches that are ready before the first step do not tell how fast it loads; about so many per loading process.
N_READY, N_READY_PER_WORKER = 12, 2


class _Absent(ModuleType):
    """A package that is not installed; whatever is asked of it is another such."""

    __path__: MutableSequence[str] = []  # noqa: RUF012 - what makes a module a package

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")


class _AbsentFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages that are not installed."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Of these packages and all their modules."""
        if fullname.split(".")[0] not in self._names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """A stand-in."""
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Has nothing to run."""


def import_from(folder: Path) -> list[str]:
    """Makes what this machine lacks importable from a folder; returns what is missing there too and dispensable."""
    # Last, so that the machine's own torch and numpy, made for its Python, come first.
    sys.path.append(str(folder))
    missing = [name for name in DISPENSABLE if importlib.util.find_spec(name) is None]
    sys.meta_path.append(_AbsentFinder(missing))
    return missing


def describe_plan(plan: Plan, configuration: ConfigurationPlan) -> dict[str, Any]:
    """Our plan in the format of nnU-Net's `nnUNetPlans.json`, as far as its trainer reads it."""
    n_axes, network = configuration.n_axes, configuration.network
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": len(network.features),
            "features_per_stage": list(network.features),
            "conv_op": f"torch.nn.modules.conv.Conv{n_axes}d",
            "kernel_sizes": [list(kernel) for kernel in network.kernel_sizes],
            "strides": [list(stride) for stride in network.strides],
            "n_conv_per_stage": list(network.encoder_blocks),
            "n_conv_per_stage_decoder": list(network.decoder_blocks),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{n_axes}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    described = {
        "data_identifier": IDENTIFIER,
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": configuration.batch_size,
        "patch_size": list(configuration.patch_size),
        "median_image_size_in_voxels": list(configuration.median_shape),
        "spacing": list(configuration.spacing_mm),
        "normalization_schemes": ["CTNormalization"] * len(plan.channels),
        "use_mask_for_norm": [False] * len(plan.channels),
        "batch_dice": configuration.batch_dice,
        "architecture": architecture,
    }
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {CONFIGURATION: described},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
        "continue_training": False,
    }


def write_dataset(folder: Path, cases: Sequence[PreprocessedCase], n_classes: int) -> None:
    """Writes cases as its trainer finds them after a preprocessing that was unpacked."""
    from batchgenerators.utilities.file_and_folder_operations import write_pickle

    target = folder / DATASET / IDENTIFIER
    target.mkdir(parents=True)
    for case in cases:
        np.save(target / f"{case.id}.npy", np.asarray(case.image, np.float32))
        np.save(target / f"{case.id}_seg.npy", np.asarray(case.label, np.int8)[None])
        # Only its name is read where the arrays lie beside it.
        np.savez(target / f"{case.id}.npz")
        places = {}
        for index in range(1, n_classes):
            found = case.foreground(index)
            places[index] = np.concatenate([np.zeros((len(found), 1), found.dtype), found], axis=1)
        write_pickle({"class_locations": places}, str(target / f"{case.id}.pkl"))
    names = [case.id for case in cases]
    splits = [{"train": names, "val": names[:1]}]
    (folder / DATASET / "splits_final.json").write_text(json.dumps(splits))


@contextmanager
def make_trainer(options: dict[str, Any], plan: Plan, configuration: ConfigurationPlan) -> Iterator[Any]:
    """Its trainer, initialised, in folders that are gone afterwards."""
    device = torch.device(options["device"])
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ |= {f"nnUNet_{kind}": str(root / kind) for kind in ("raw", "preprocessed", "results")}
        n_workers = str(min(MAX_WORKERS, n_cpus()))
        os.environ |= {"nnUNet_n_proc_DA": n_workers, "nnUNet_def_n_proc": n_workers}
        module = importlib.import_module("nnunetv2.training.nnUNetTrainer.nnUNetTrainer")
        cases = [PreprocessedCase(path) for path in sorted(Path(options["cases"]).iterdir())]
        write_dataset(root / "preprocessed", cases, plan.labels.n_classes)
        labels = {"background": 0} | {label: index + 1 for index, label in enumerate(plan.labels.names)}
        dataset = {
            "channel_names": {str(index): channel for index, channel in enumerate(plan.channels)},
            "labels": labels,
            "numTraining": len(cases),
            "file_ending": ".nii.gz",
        }
        trainer = module.nnUNetTrainer(describe_plan(plan, configuration), CONFIGURATION, 0, dataset, device)
        trainer.initialize()
        trainer.set_deep_supervision_enabled(True)
        yield trainer


def make_batch(trainer: Any, plan: Plan, configuration: ConfigurationPlan) -> dict[str, Any]:
    """A batch of noise with its labels for every output, on the device of the trainer."""
    patch_size, n_samples = configuration.patch_size, configuration.batch_size
    targets = []
    for scales in trainer._get_deep_supervision_scales():
        shape = [round(size * scale) for size, scale in zip(patch_size, scales, strict=True)]
        values = torch.randint(0, plan.labels.n_classes, (n_samples, 1, *shape), device=trainer.device)
        # The type that its loaders give.
        targets.append(values.to(torch.int16))
    return {
        "data": torch.randn(n_samples, len(plan.channels), *patch_size, device=trainer.device),
        "target": targets,
    }


def measure(options: dict[str, Any]) -> None:
    """Steps per second of its network, loss and update on one batch, and with its loaders and augmentation."""
    device, timing = torch.device(options["device"]), Timing(**options["timing"])
    # As its command line sets torch up before it makes a trainer.
    if device.type == "cuda":
        torch.set_num_threads(1)
        torch.set_num_interop_threads(1)
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark = True
    missing = import_from(Path(options["peer"]))
    plan, configuration = plan_size(options["size"])
    with make_trainer(options, plan, configuration) as trainer:
        about = {"side": "nnU-Net", "size": options["size"], "cpus": n_cpus(), "version": _find_version()}
        about |= {"mode": "compiled" if trainer._do_i_compile() else "eager", "stand_ins": missing}
        about |= {"precision": "float16" if device.type == "cuda" else "float32"}
        about |= {"weights": count_weights(trainer.network)}
        trainer.on_train_epoch_start()
        batch = make_batch(trainer, plan, configuration)
        forget_memory(device)
        started = time.monotonic()
        trainer.train_step(batch)
        synchronize(device)
        first_step_s = round(time.monotonic() - started, 1)
        clock = StepClock(timing, device)
        while True:
            trainer.train_step(batch)
            if clock.tick():
                break
        emit(what="no data", **about, first_step_s=first_step_s, **clock.figures())
        forget_memory(device)
        train, validation = trainer.get_dataloaders()
        n_workers = train.num_processes
        n_ready = min(timing.n_warm_up, 2) if options["quick"] else N_READY + N_READY_PER_WORKER * n_workers
        clock = StepClock(replace(timing, n_warm_up=n_ready), device)
        while True:
            trainer.train_step(next(train))
            if clock.tick():
                break
        emit(what="whole loop", **about, workers=n_workers, **clock.figures())
        for loader in (train, validation):
            loader._finish(timeout=2)


def _find_version() -> str | None:
    try:
        return version("nnunetv2")
    except PackageNotFoundError:
        return None
