"""All tests marked `gpu` and a benchmark of training and prediction on one GPU: one command, under ten minutes.

    python scripts/gpu_suite.py [--json docs/benchmarks/gpu.json]

Data are drawn at random in the sizes of typical datasets; neither image files nor readers are needed. The tables come
last. The first is of memory: what the planner estimates for a preset, what training it took, and the largest batch that
a short search found. In the second, steps are timed with the whole loop: reading patches in threads, copying,
augmentation, forward, backward, update; the column "network" is the same without data, on one batch that stays on the
GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from autoseg.core.geometry import Box, Geometry
from autoseg.core.labels import LabelSpec
from autoseg.core.runtime import autocast_dtype, n_cpus
from autoseg.inference.sliding_window import WindowConfig, predict_logits
from autoseg.networks.build import build_network
from autoseg.planning.choices import Choices
from autoseg.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint
from autoseg.planning.memory import count_feature_map_values
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.planning.planner import make_plan
from autoseg.planning.presets import find_preset
from autoseg.preprocessing.preprocess import CaseRecord
from autoseg.preprocessing.store import PreprocessedCase, write_case
from autoseg.training.augment import AugmentConfig, apply_parameters
from autoseg.training.losses import deep_supervision_loss
from autoseg.training.measure import measure_configuration
from autoseg.training.patches import PatchSampler, read_ahead

LABELS = LabelSpec(names=("first", "second"), values=(1, 2))
# Shape (z, y, x) and spacing in mm of a case, as in well-known datasets.
SIZES = {
    "hippocampus": ((36, 50, 35), (1.0, 1.0, 1.0)),
    "prostate": ((20, 320, 320), (3.6, 0.6, 0.6)),
    "liver": ((160, 400, 400), (2.5, 0.8, 0.8)),
}
WARM_UP, TIMED = 10, 50
# Each with the memory it is made for.
MEASURED_PRESETS = ("unet", "resenc-l")
MAX_SEARCH_S = 30.0


def plan_for(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], *, choices: Choices | None = None
) -> Plan:
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


def write_cases(folder: Path, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> None:
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
    for index in range(4):
        image = rng.standard_normal((1, *shape), dtype=np.float32)
        label = rng.integers(0, 3, shape, dtype=np.uint8)
        write_case(folder / str(index), image, label, key="k", record=record, n_classes=3)


def measure(name: str, folder: Path, device: torch.device) -> dict[str, Any]:
    shape, spacing_mm = SIZES[name]
    made = plan_for(shape, spacing_mm)
    configuration = made.configuration("3d_fullres")
    write_cases(folder, shape, spacing_mm)
    cases = [PreprocessedCase(path) for path in sorted(folder.iterdir())]
    torch.cuda.reset_peak_memory_stats(device)
    network = build_network(configuration.network, n_channels=1, n_classes=3).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def step(images: torch.Tensor, classes: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=autocast_dtype(device) or torch.float32):
            outputs = network(images.to(memory_format=torch.channels_last_3d))
        deep_supervision_loss(outputs, classes, batch_dice=configuration.batch_dice).backward()
        optimizer.step()

    sampler = PatchSampler(
        cases,
        patch_size=configuration.patch_size,
        batch_size=configuration.batch_size,
        foreground_fraction=1 / 3,
        seed=0,
        augmentation=AugmentConfig.for_patch(configuration.patch_size),
    )
    shape_of_batch = (configuration.batch_size, *configuration.patch_size)
    images = torch.randn(configuration.batch_size, 1, *configuration.patch_size, device=device)
    classes = torch.randint(0, 3, shape_of_batch, device=device)
    network_s = timed(lambda: step(images, classes), device)
    batches = read_ahead(sampler.batch, count(), n_threads=max(1, n_cpus() // 2), depth=8)

    def whole_step() -> None:
        batch = next(batches)
        assert batch.augmentation is not None
        step(
            *apply_parameters(
                batch.images.pin_memory().to(device, non_blocking=True),
                batch.classes.pin_memory().to(device, non_blocking=True),
                patch_size=configuration.patch_size,
                parameters=batch.augmentation,
            )
        )

    whole_s = timed(whole_step, device)
    batches.close()
    return {
        "dataset": name,
        "patch": "x".join(map(str, configuration.patch_size)),
        "batch": configuration.batch_size,
        "network_steps_per_s": round(1 / network_s, 2),
        "steps_per_s": round(1 / whole_s, 2),
        "epoch_s": round(250 * whole_s, 1),
        "predict_s": round(time_prediction(network.eval(), configuration, shape, device), 2),
        "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2),
    }


def measure_memory(preset_name: str, device: torch.device) -> dict[str, Any]:
    """Estimated and measured GiB of training one preset on scans of the largest size."""
    made = plan_for(*SIZES["liver"], choices=Choices(preset=preset_name))
    configuration = made.configuration("3d_fullres")
    values = count_feature_map_values(configuration.network, configuration.patch_size, LABELS.n_classes)
    estimated_gib = find_preset(preset_name).needed_memory_gib(
        values, batch_size=configuration.batch_size, n_axes=configuration.n_axes
    )
    measured = measure_configuration(made, configuration, device=device, max_search_s=MAX_SEARCH_S)
    return {
        "preset": preset_name,
        "patch": "x".join(map(str, configuration.patch_size)),
        "batch": configuration.batch_size,
        "estimated_gib": round(estimated_gib, 2),
        "measured_gib": round(measured.peak_memory_gib, 2),
        "step_s": round(measured.step_time_s, 3),
        "largest_batch": measured.largest_batch_size,
    }


def timed(function: Any, device: torch.device) -> float:
    """Mean seconds of a call after a warm-up."""
    for _ in range(WARM_UP):
        function()
    torch.cuda.synchronize(device)
    started = time.monotonic()
    for _ in range(TIMED):
        function()
    torch.cuda.synchronize(device)
    return (time.monotonic() - started) / TIMED


def time_prediction(
    network: torch.nn.Module, configuration: ConfigurationPlan, shape: tuple[int, int, int], device: torch.device
) -> float:
    """Seconds for one case of the dataset's size with mirroring, after one such case to warm up."""
    window = WindowConfig(patch_size=configuration.patch_size, mirror_axes=(0, 1, 2))
    image = torch.randn(1, *shape, device=device)
    seconds = 0.0
    for _ in range(2):
        started = time.monotonic()
        predict_logits(image, [network], n_classes=3, config=window)
        torch.cuda.synchronize(device)
        seconds = time.monotonic() - started
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_suite: found no CUDA device")
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu.py"],
        cwd=Path(__file__).parents[1],
        check=False,
    )
    rows = []
    for name in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, Path(folder), torch.device("cuda")))
    memory_rows = [measure_memory(preset_name, torch.device("cuda")) for preset_name in MEASURED_PRESETS]
    report = {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cpus": n_cpus(),
        "tests_passed": tests.returncode == 0,
        "rows": rows,
        "memory": memory_rows,
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{report['gpu']}, torch {report['torch']}, {report['cpus']} CPUs")
    for table in (memory_rows, rows):
        print("  ".join(f"{key:>19}" for key in table[0]))
        for row in table:
            print("  ".join(f"{value!s:>19}" for value in row.values()))
        print()
    sys.exit(tests.returncode)


if __name__ == "__main__":
    main()
