"""Time and result of planning from a fingerprint, for every reference dataset and preset, as a table in Markdown.

    python scripts/bench_planner.py [--reference ../shared/reference/nnunet_plans] [--json FILE]

Each time is the median of several plans in one process, without its start-up. Where `--peer` names the Python of an
environment with nnU-Net in it, its planners are timed on the same fingerprints in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autoseg.planning.choices import Choices
from autoseg.planning.exchange import read_fingerprint
from autoseg.planning.plan import Plan
from autoseg.planning.planner import make_plan
from autoseg.planning.presets import PRESETS

PEER_PLANNERS = {
    "unet": "nnunetv2.experiment_planning.experiment_planners.default_experiment_planner.ExperimentPlanner",
    "resenc-m": "nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners"
    ".nnUNetPlannerResEncM",
    "resenc-l": "nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners"
    ".nnUNetPlannerResEncL",
    "resenc-xl": "nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners"
    ".nnUNetPlannerResEncXL",
}
N_REPEATS = 7


@dataclass(frozen=True, kw_only=True)
class Row:
    """One dataset with one preset.

    Attributes:
        dataset: name of the reference.
        preset: name.
        time_ms: to plan it.
        peer_time_s: of nnU-Net's planner; None where it was not asked for.
        recommended: configuration.
        configurations: name to "patch, batch".
    """

    dataset: str
    preset: str
    time_ms: float
    peer_time_s: float | None
    recommended: str
    configurations: dict[str, str]


def describe(plan: Plan) -> dict[str, str]:
    """Patch and batch of every configuration."""
    return {
        name: f"{'x'.join(map(str, known.patch_size))}, {known.batch_size}"
        for name, known in plan.configurations.items()
    }


def time_plan(fingerprint_file: Path, dataset_file: Path, preset: str) -> tuple[float, Plan]:
    """Median time of a plan in ms, and the plan."""
    fingerprint, labels, name = read_fingerprint(fingerprint_file, dataset_file)
    times = []
    for _ in range(N_REPEATS):
        started = time.perf_counter()
        plan = make_plan(fingerprint, labels, dataset=name, n_folds=5, choices=Choices(preset=preset))
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000, plan


def time_peer(python: Path, folder: Path, preset: str) -> float:
    """Seconds that nnU-Net's planner takes in a process of its own, start-up and import aside.

    It asks for a folder of images to find its reader; it gets one small image.
    """
    module, _, name = PEER_PLANNERS[preset].rpartition(".")
    program = f"""
import json, os, sys, time
folder = sys.argv[1]
raw, preprocessed = os.path.join(folder, "raw", "Dataset001_x"), os.path.join(folder, "preprocessed", "Dataset001_x")
os.environ.update(nnUNet_raw=os.path.dirname(raw), nnUNet_preprocessed=os.path.dirname(preprocessed),
                  nnUNet_results=os.path.join(folder, "results"))
import numpy, SimpleITK
description = json.load(open(os.path.join(folder, "dataset.json")))
for path in (os.path.join(raw, "imagesTr"), os.path.join(raw, "labelsTr"), preprocessed):
    os.makedirs(path, exist_ok=True)
image = SimpleITK.GetImageFromArray(numpy.zeros((4, 4, 4), numpy.float32))
for channel in description["channel_names"]:
    SimpleITK.WriteImage(image, os.path.join(raw, "imagesTr", f"a_{{int(channel):04d}}.nii.gz"))
SimpleITK.WriteImage(SimpleITK.Cast(image, SimpleITK.sitkUInt8), os.path.join(raw, "labelsTr", "a.nii.gz"))
json.dump(dict(description, file_ending=".nii.gz"), open(os.path.join(raw, "dataset.json"), "w"))
fingerprint = json.load(open(os.path.join(folder, "dataset_fingerprint.json")))
json.dump(fingerprint, open(os.path.join(preprocessed, "dataset_fingerprint.json"), "w"))
from {module} import {name} as Planner
planner = Planner("Dataset001_x")
started = time.perf_counter()
planner.plan_experiment()
print("seconds", time.perf_counter() - started)
"""
    done = subprocess.run([python, "-c", program, folder], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the peer failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.rpartition("seconds ")[2])


def format_rows(rows: list[Row]) -> str:
    """The table in Markdown."""
    has_peer = any(row.peer_time_s is not None for row in rows)
    peer_head = ("nnU-Net s",) if has_peer else ()
    head = ("dataset", "preset", "ms", *peer_head, "recommended", "2d", "3d_fullres", "3d_lowres")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        peer = (f"{row.peer_time_s:.2f}",) if row.peer_time_s is not None else peer_head and ("",)
        shown = [row.configurations.get(name, "") for name in ("2d", "3d_fullres", "3d_lowres")]
        cells = [row.dataset, row.preset, f"{row.time_ms:.1f}", *peer, row.recommended, *shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[1].parent / "shared" / "reference" / "nnunet_plans"
    parser.add_argument("--reference", type=Path, default=default, help="files with a dataset and a fingerprint")
    parser.add_argument("--peer", type=Path, help="Python of an environment with nnU-Net")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    files = sorted(arguments.reference.glob("*.json"))
    if not files:
        sys.exit(f"{arguments.reference}: no reference files there")
    rows = []
    for file in files:
        content: dict[str, Any] = json.loads(file.read_text())
        for preset in PRESETS:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                (folder / "dataset_fingerprint.json").write_text(json.dumps(content["fingerprint"]))
                (folder / "dataset.json").write_text(json.dumps(content["dataset"]))
                time_ms, plan = time_plan(folder / "dataset_fingerprint.json", folder / "dataset.json", preset)
                peer_time_s = time_peer(arguments.peer, folder, preset) if arguments.peer else None
            rows.append(
                Row(
                    dataset=file.stem,
                    preset=preset,
                    time_ms=round(time_ms, 2),
                    peer_time_s=peer_time_s,
                    recommended=plan.recommended,
                    configurations=describe(plan),
                )
            )
    print(format_rows(rows))
    print(f"\nslowest: {max(row.time_ms for row in rows):.1f} ms")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
