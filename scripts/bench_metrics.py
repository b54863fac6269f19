"""Scoring a large case side by side with MedPy on whole volumes: seconds per label.

    python scripts/bench_metrics.py [--labels 20] [--medpy-labels 2] [--json FILE]

The case has 300 x 512 x 512 voxels of 1.5 x 0.8 x 0.8 mm and as many ellipsoids as there are labels, from the size of
a liver to that of a lesion. In the prediction each is a little shifted and smaller.

autoseg computes every metric that `autoseg evaluate` has. MedPy computes Dice, Jaccard, precision, recall, HD95 and
ASSD, of masks of the whole volume, and once more of masks that are cut to the box around the label. The former takes
minutes for each label, so it is done for a few of them only, from the largest to the smallest, and nothing is
extrapolated to the others. autoseg's time for one label includes finding it in the volume; the box is given to MedPy.
What both compute must be equal.

Seconds are of the wall clock. Where the processor seconds of the process are less, it waited for other programs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from medpy.metric import binary
from numpy.typing import NDArray

from autoseg.core.geometry import bounding_box
from autoseg.core.runtime import n_cpus, peak_memory_gib
from autoseg.evaluation.evaluate import score_case
from autoseg.evaluation.scores import CaseScore, Target

SHAPE = (300, 512, 512)
SPACING_MM = (1.5, 0.8, 0.8)
LARGEST_MM, SMALLEST_MM = 85.0, 4.0
SHIFT_MM, SHRINKING = 2.5, 0.95
TOLERANCE = 1e-9

T = TypeVar("T")


def make_case(n_labels: int, *, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A prediction and a reference, (Z, Y, X), with the labels 1 ... n, largest first."""
    rng = np.random.default_rng(seed)
    size_mm = np.array(SHAPE) * SPACING_MM
    prediction, reference = np.zeros((2, *SHAPE), np.uint8)
    for value, radius_mm in enumerate(np.geomspace(LARGEST_MM, SMALLEST_MM, n_labels), start=1):
        radii_mm = radius_mm * rng.uniform(0.7, 1.3, 3)
        centre_mm = rng.uniform(0.2, 0.8, 3) * size_mm
        draw_ellipsoid(reference, value, centre_mm, radii_mm)
        draw_ellipsoid(prediction, value, centre_mm + rng.uniform(-SHIFT_MM, SHIFT_MM, 3), radii_mm * SHRINKING)
    return prediction, reference


def draw_ellipsoid(label: NDArray[np.uint8], value: int, centre_mm: NDArray, radii_mm: NDArray) -> None:
    """Writes a value into the voxels (Z, Y, X) of an ellipsoid."""
    lower = np.maximum(0, np.floor((centre_mm - radii_mm) / SPACING_MM).astype(int))
    upper = np.minimum(SHAPE, np.ceil((centre_mm + radii_mm) / SPACING_MM).astype(int) + 1)
    box = tuple(slice(start, stop) for start, stop in zip(lower, upper, strict=True))
    axes = zip(np.ogrid[box], SPACING_MM, centre_mm, radii_mm, strict=True)
    squares = [((indices * spacing - centre) / radius) ** 2 for indices, spacing, centre, radius in axes]
    label[box][sum(squares[1:], squares[0]) <= 1] = value


def medpy_scores(found: NDArray[np.bool_], wanted: NDArray[np.bool_]) -> dict[str, float]:
    """What MedPy has of our metrics, by our names."""
    return {
        "dice": binary.dc(found, wanted),
        "iou": binary.jc(found, wanted),
        "precision": binary.precision(found, wanted),
        "recall": binary.recall(found, wanted),
        "hd95_mm": binary.hd95(found, wanted, SPACING_MM),
        "assd_mm": binary.assd(found, wanted, SPACING_MM),
    }


def timed(function: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """The result, and seconds of the wall clock and of the processor."""
    started, started_cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, {"s": time.perf_counter() - started, "cpu_s": time.process_time() - started_cpu}


def check_equal(value: int, ours: CaseScore, theirs: dict[str, float]) -> None:
    """Raises SystemExit: a metric differs."""
    for name, expected in theirs.items():
        found = getattr(ours.labels[0], name)
        if not np.isclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
            raise SystemExit(f"label {value}: autoseg's {name} is {found}, MedPy's is {expected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=20, help="of the case")
    parser.add_argument("--medpy-labels", type=int, default=2, help="of these, how many MedPy scores, too")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    if not 1 <= arguments.labels <= 255 or not 0 <= arguments.medpy_labels <= arguments.labels:
        parser.error("expected 1 to 255 labels, and not more of them for MedPy")
    prediction, reference = make_case(arguments.labels)
    targets = [Target(name=str(value), values=(value,)) for value in range(1, arguments.labels + 1)]

    def score(chosen: list[Target], n_threads: int) -> CaseScore:
        return score_case("case", prediction, reference, chosen, spacing_mm=SPACING_MM, n_threads=n_threads)

    report: dict[str, Any] = {"labels": arguments.labels, "cpus": n_cpus(), "load": os.getloadavg()[0], "all": {}}
    print(f"{n_cpus()} processors, load {os.getloadavg()[0]:.1f} before the start\n")
    print(f"{'autoseg, all metrics':<44}{'seconds':>9}{'CPU s':>9}")
    for n_threads in sorted({1, n_cpus()}):
        _, seconds = timed(lambda n=n_threads: score(targets, n))  # type: ignore[misc]
        report["all"][n_threads] = seconds
        name = f"{arguments.labels} labels, {n_threads} thread{'s' if n_threads > 1 else ''}"
        print(f"{name:<44}{seconds['s']:>9.1f}{seconds['cpu_s']:>9.1f}", flush=True)
    report["peak_gib"] = peak_memory_gib()
    print(f"peak memory of the process: {report['peak_gib']:.2f} GiB, of which the label maps are 0.15\n")
    header = ("one label", "voxels", "autoseg", "MedPy", "times", "MedPy in a box", "times")
    print("{:<12}{:>10}{:>10}{:>10}{:>8}{:>16}{:>8}".format(*header))
    report["each"] = []
    for value in np.linspace(1, arguments.labels, arguments.medpy_labels).round().astype(int).tolist():
        ours, seconds = timed(lambda v=value: score([targets[v - 1]], 1))  # type: ignore[misc]
        found, wanted = prediction == value, reference == value
        theirs, whole = timed(lambda a=found, b=wanted: medpy_scores(a, b))  # type: ignore[misc]
        check_equal(value, ours, theirs)
        box = bounding_box(found | wanted).slices
        theirs, boxed = timed(lambda a=found[box], b=wanted[box]: medpy_scores(a, b))  # type: ignore[misc]
        check_equal(value, ours, theirs)
        n_voxels = int(wanted.sum())
        report["each"].append({"voxels": n_voxels, "autoseg": seconds, "medpy": whole, "medpy in a box": boxed})
        ratios = [known["s"] / seconds["s"] for known in (whole, boxed)]
        print(
            f"{f'label {value}':<12}{n_voxels:>10,}{seconds['s']:>10.2f}{whole['s']:>10.1f}{ratios[0]:>8.0f}"
            f"{boxed['s']:>16.2f}{ratios[1]:>8.1f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
