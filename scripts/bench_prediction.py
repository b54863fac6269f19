"""Parts of prediction side by side with nnU-Net on the CPU: seconds, and memory beyond what goes in.

    python scripts/bench_prediction.py restore|folder|memory|batch [--peer PYTHON] [--shared ../shared] [--json FILE]

`--peer` names the Python of an environment with nnU-Net in it; without it only autoseg is measured. Every measurement
is a process of its own, the sides take turns, and the table has the least seconds and the largest memory of all rounds.
The processors that other programs kept busy meanwhile are printed.

`restore` goes from logits of 118 classes on a grid of 112x101x122 voxels of 3 mm, float32 in host memory, to the label
map at 1.5 mm (224x202x244) and at 1 mm (336x303x366).

- Two kinds of logits. Random ones are normally distributed, each by itself. Realistic ones come from the label map in
  `data/whole_body_ct` of the shared folder: its 30 slices, repeated mirrored until there are 112; the mask of each
  class, blurred by a Gaussian of one voxel and times 10; and normally distributed noise of 0.5 on all classes.
- autoseg gets the logits with the classes first in memory, and with the classes last.
- nnU-Net resamples as its plans have it (`resample_data_or_seg_to_shape`, order 1), and with
  `resample_torch_fornnunet`, which plans may name instead; then its label manager decides. At 1 mm its logits alone
  would take 17.6 GB, so there it is left out.
- Memory is the peak of the process' resident memory minus what it was before, with the logits in memory and every
  package loaded. (Linux only.)
- All label maps of a case must agree. Where two differ, both classes' logits are interpolated in float64, and they must
  be equal to 1e-5 of the largest logit at the corners: a tie that rounding decides.

`folder` predicts a folder of images, `memory` one large volume, `batch` times planned networks with 1 to 32 tiles at a
time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_training import MAX_OTHERS_BUSY, PEER_PREPARE, PEER_START, RESULT, Measured, run, write_raw_dataset
from gpu_clock import synchronize
from gpu_jobs import plan_for
from numpy.typing import NDArray

from autoseg import __version__
from autoseg.core.labels import LabelSpec
from autoseg.core.runtime import autocast_dtype, n_cpus
from autoseg.core.serialize import write_json
from autoseg.networks.build import build_network, build_trainable, channels_last
from autoseg.planning.choices import parse_choices
from autoseg.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint
from autoseg.planning.planner import make_plan
from autoseg.training.checkpoint import save_weights
from autoseg.training.record import FoldFiles, TrainingRecord

# -- restore: from logits on the network's grid to the label map on the scan's -----------------------------------------

N_CLASSES = 118
GRID = (112, 101, 122)
GRID_MM = 3.0
TARGETS_MM = (1.5, 1.0)
PEER_TARGET_MM = 1.5
BLUR_VOXELS = 1.0
LOGIT_SCALE = 10.0
LOGIT_NOISE = 0.5
# Of the largest logit at the corners; two classes that are closer are at a tie.
TIE_FRACTION = 1e-5
MAX_DIFFERING_FRACTION = 1e-4

# Runs in both environments. `restore` takes logits as `prepare` has made them, a shape, the spacing before and after.
RESTORE_START = """
import json, sys, time
import numpy, torch
options = json.loads(sys.argv[1])
torch.set_num_threads(options["n_cpus"])

def memory_mib(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024

def measure(restore, prepare):
    # So that packages are loaded and threads started.
    restore(prepare(numpy.zeros((options["n_classes"], 8, 8, 8), "float32")), (16, 16, 16), 2.0, 1.0)
    logits = prepare(numpy.load(options["logits"]))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before_mib, started = memory_mib("VmRSS:"), time.perf_counter()
    labels = restore(logits, options["shape"], options["grid_mm"], options["target_mm"])
    seconds, peak_mib = time.perf_counter() - started, memory_mib("VmHWM:") - before_mib
    numpy.save(options["labels"], numpy.asarray(labels))
    print("\\n" + options["mark"] + json.dumps({"values": {"seconds": [seconds], "peak_mib": [peak_mib]}, "about": {}}))
"""

RESTORE_OURS = """
from autoseg.inference.restore import interpolated_argmax

def restore(logits, shape, grid_mm, target_mm):
    return interpolated_argmax(logits, shape, nearest_axis=None)

def prepare(logits):
    if not options["classes_last"]:
        return torch.from_numpy(logits)
    return torch.from_numpy(numpy.ascontiguousarray(logits.transpose(1, 2, 3, 0))).permute(3, 0, 1, 2)

measure(restore, prepare)
"""

RESTORE_PEER = """
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet
from nnunetv2.utilities.label_handling.label_handling import LabelManager
manager = LabelManager({"background": 0} | {str(value): value for value in range(1, options["n_classes"])}, None)

def restore(logits, shape, grid_mm, target_mm):
    spacings = [grid_mm] * 3, [target_mm] * 3
    if options["with_torch"]:
        resampled = resample_torch_fornnunet(
            logits, shape, *spacings, is_seg=False, num_threads=options["n_cpus"], force_separate_z=None
        )
    else:
        resampled = resample_data_or_seg_to_shape(
            logits, shape, *spacings, is_seg=False, order=1, order_z=0, force_separate_z=None
        )
    return manager.convert_logits_to_segmentation(resampled)

measure(restore, torch.from_numpy)
"""

RESTORE_SIDES: dict[str, tuple[str, dict[str, bool]]] = {
    "autoseg, classes last": (RESTORE_OURS, {"classes_last": True}),
    "autoseg, classes first": (RESTORE_OURS, {"classes_last": False}),
    "nnU-Net": (RESTORE_PEER, {"with_torch": False}),
    "nnU-Net with torch": (RESTORE_PEER, {"with_torch": True}),
}
RESTORE_BASELINE = "nnU-Net"


def write_random_logits(file: Path) -> None:
    """Logits (K, Z, Y, X) of which every one is drawn by itself."""
    np.save(file, np.random.default_rng(0).standard_normal((N_CLASSES, *GRID), np.float32))


def write_realistic_logits(file: Path, label_file: Path) -> None:
    """Logits (K, Z, Y, X) as a trained network has them, from a label map on the same grid with fewer slices."""
    import nibabel as nib
    from scipy import ndimage

    # The file is (X, Y, Z).
    labels = np.asarray(nib.load(label_file).dataobj).T
    n_copies = -(-GRID[0] // len(labels))
    labels = np.concatenate([labels[:: (-1) ** number] for number in range(n_copies)])[: GRID[0]]
    if labels.shape != GRID or labels.max() >= N_CLASSES:
        raise SystemExit(f"{label_file}: found another label map than the one that this benchmark is made for")
    logits = np.random.default_rng(0).standard_normal((N_CLASSES, *GRID), np.float32)
    logits *= LOGIT_NOISE
    for value in np.unique(labels):
        mask = (labels == value).astype(np.float32)
        logits[value] += LOGIT_SCALE * ndimage.gaussian_filter(mask, BLUR_VOXELS)
    np.save(file, logits)


def check_ties(logits: NDArray, first: NDArray, second: NDArray) -> int:
    """At how many voxels two label maps differ.

    Args:
        logits: (K, Z, Y, X) that both were made from.
        first: (Z', Y', X').
        second: as the first.

    Raises:
        SystemExit: they differ in more than ties.
    """
    places = np.nonzero(first != second)
    n_differing = len(places[0])
    if n_differing > MAX_DIFFERING_FRACTION * first.size:
        raise SystemExit(f"two label maps differ in {n_differing} of {first.size} voxels")
    lower, upper_weight = [], []
    for place, n_in, n_out in zip(places, logits.shape[1:], first.shape, strict=True):
        position = np.clip((place + 0.5) * n_in / n_out - 0.5, 0, n_in - 1)
        lower.append(np.minimum(position.astype(np.int64), n_in - 2))
        upper_weight.append(position - lower[-1])
    means, largest = np.zeros((2, n_differing)), np.zeros(n_differing)
    for corner in np.ndindex(2, 2, 2):
        z, y, x = (index + side for index, side in zip(lower, corner, strict=True))
        sides = zip(upper_weight, corner, strict=True)
        weight = np.prod([upper if side else 1 - upper for upper, side in sides], axis=0)
        for mean, classes in zip(means, (first, second), strict=True):
            values = logits[classes[places].astype(np.int64), z, y, x].astype(np.float64)
            mean += weight * values
            largest = np.maximum(largest, abs(values))
    wrong = abs(means[0] - means[1]) > TIE_FRACTION * largest
    if wrong.any():
        raise SystemExit(f"two label maps differ in {int(wrong.sum())} voxels that are no ties")
    return n_differing


def measure_restore(arguments: argparse.Namespace, scratch: Path) -> tuple[list[Measured], dict[str, int]]:
    """All cases by all sides, and at how many ties the label maps of a case differ.

    Raises:
        SystemExit: they differ in more than ties.
    """
    label_file = arguments.shared / "data" / "whole_body_ct" / "example_seg.nii.gz"
    makers: dict[str, Callable[[Path], None]] = {"random": write_random_logits}
    if label_file.is_file():
        makers["realistic"] = lambda file: write_realistic_logits(file, label_file)
    else:
        print(f"{label_file}: found no file, so the realistic logits are left out", file=sys.stderr)
    runs, n_ties = [], {}
    logits_file, labels_file = scratch / "logits.npy", scratch / "labels.npy"
    for kind, write_logits in makers.items():
        write_logits(logits_file)
        for target_mm in TARGETS_MM:
            case = f"{kind}, {GRID_MM:g} to {target_mm:g} mm"
            options = {"mark": RESULT, "n_cpus": n_cpus(), "n_classes": N_CLASSES, "grid_mm": GRID_MM}
            options |= {"target_mm": target_mm, "shape": [round(size * GRID_MM / target_mm) for size in GRID]}
            options |= {"logits": str(logits_file), "labels": str(labels_file)}
            expected: NDArray | None = None
            n_ties[case] = 0
            for _ in range(arguments.rounds):
                for side, (program, choices) in RESTORE_SIDES.items():
                    is_peer = program is RESTORE_PEER
                    if is_peer and (arguments.peer is None or target_mm < PEER_TARGET_MM):
                        continue
                    python = str(arguments.peer) if is_peer else sys.executable
                    command = [python, "-c", RESTORE_START + program, json.dumps(options | choices)]
                    runs.append(run(case, side, command, {}))
                    labels = np.load(labels_file)
                    expected = labels if expected is None else expected
                    differing = check_ties(np.load(logits_file, mmap_mode="r"), expected, labels)
                    n_ties[case] = max(n_ties[case], differing)
    return runs, n_ties


def format_restore(runs: list[Measured], n_ties: dict[str, int]) -> str:
    """The table: least seconds and largest memory of each side, and how many times faster than nnU-Net."""
    lines = [f"{'logits':<28}{'':<24}{'seconds':>9}{'MiB':>8}{'times faster':>14}{'ties':>7}"]
    for case, differing in n_ties.items():
        of_case = [known for known in runs if known.program == case]
        seconds = {
            side: min((known.values["seconds"][0] for known in of_case if known.side == side), default=None)
            for side in RESTORE_SIDES
        }
        for side, least in seconds.items():
            if least is None:
                continue
            peak_mib = max(known.values["peak_mib"][0] for known in of_case if known.side == side)
            baseline = seconds[RESTORE_BASELINE]
            ratio = f"{baseline / least:.1f}" if baseline else "-"
            lines.append(f"{case:<28}{side:<24}{least:>9.2f}{peak_mib:>8.0f}{ratio:>14}{differing:>7}")
    return "\n".join(lines)


def restore(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measures, prints the table, and returns what goes into the JSON file."""
    runs, n_ties = measure_restore(arguments, scratch)
    print_disturbance(runs)
    print(format_restore(runs, n_ties))
    return {"runs": [asdict(known) for known in runs], "ties": n_ties}


# -- folder: images in, label maps out ---------------------------------------------------------------------------------

FOLDER_OURS = """
import json, sys, time
options = json.loads(sys.argv[1])
from autoseg.pipeline import predict
started = time.perf_counter()
predict(options["images"], options["output"], options["work"], device="cpu", mirroring=True)
seconds = time.perf_counter() - started
print("\\n" + options["mark"] + json.dumps({"values": {"seconds": [seconds]}, "about": {}}))
"""

FOLDER_PEER = """
if __name__ == "__main__":
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    trainer = make_trainer()
    trainer.initialize()
    trainer.set_deep_supervision_enabled(False)
    # Training decides it when it makes its loaders.
    mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3]
    predictor = nnUNetPredictor(
        tile_step_size=0.5, use_gaussian=True, use_mirroring=True, perform_everything_on_device=False,
        device=torch.device("cpu"), verbose=False, allow_tqdm=False,
    )
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, [trainer.network.state_dict()],
        trainer.dataset_json, "nnUNetTrainer", mirror_axes,
    )
    started = time.perf_counter()
    predictor.predict_from_files(
        options["images"], options["output"], save_probabilities=False, overwrite=True,
        num_processes_preprocessing=options["n_cpus"], num_processes_segmentation_export=options["n_cpus"],
    )
    report(values={"seconds": [time.perf_counter() - started]}, about={"mirror axes": list(mirror_axes)})
"""


def folder(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measures, prints the table, and returns what goes into the JSON file.

    Raises:
        SystemExit: the dataset is not there.
    """
    data = arguments.shared / "data" / "Task04_Hippocampus"
    if not data.is_dir():
        raise SystemExit(f"{data}: found no dataset")
    raw, work = scratch / "raw" / "Dataset001_Bench", scratch / "work"
    autoseg = [sys.executable, "-m", "autoseg", "-q"]
    subprocess.run(
        [*autoseg, "plan", str(data), "-w", str(work), "-c", "3d_fullres"], check=True, stdout=subprocess.DEVNULL
    )
    options = ["--fold", "0", "--iterations", "2", "--no-validate", "--device", "cpu"]
    subprocess.run([*autoseg, "train", "-w", str(work), *options], check=True, stdout=subprocess.DEVNULL)
    write_raw_dataset(data, raw)
    environment = {
        "nnUNet_raw": str(raw.parent),
        "nnUNet_preprocessed": str(scratch / "preprocessed"),
        "nnUNet_results": str(scratch / "results"),
        "nnUNet_def_n_proc": str(n_cpus()),
    }
    fixed = {"mark": RESULT, "n_cpus": n_cpus(), "configuration": "3d_fullres", "fold": 0, "work": str(work)}
    fixed |= {"images": str(raw / "imagesTr")}
    if arguments.peer is not None:
        command = [str(arguments.peer), "-c", PEER_START + PEER_PREPARE, json.dumps(fixed)]
        run("prepare", "nnU-Net", command, environment)
    images = sorted((raw / "imagesTr").iterdir())
    for file in images[arguments.images :]:
        file.unlink()
    runs = []
    for number in range(arguments.rounds):
        ours = fixed | {"output": str(scratch / f"ours_{number}")}
        runs.append(run("folder", "autoseg", [sys.executable, "-c", FOLDER_OURS, json.dumps(ours)], {}))
        if arguments.peer is not None:
            peer = fixed | {"output": str(scratch / f"peer_{number}")}
            command = [str(arguments.peer), "-c", PEER_START + FOLDER_PEER, json.dumps(peer)]
            runs.append(run("folder", "nnU-Net", command, environment))
    n_images = len(list((raw / "imagesTr").iterdir()))
    print_disturbance(runs)
    print(f"{n_images} images, one fold, mirrored\n{'':<12}{'seconds':>9}{'images/s':>10}{'MiB, all processes':>20}")
    for side in ("autoseg", "nnU-Net"):
        chosen = [known for known in runs if known.side == side]
        if chosen:
            seconds = min(known.values["seconds"][0] for known in chosen)
            peak_mib = max(known.peak_mib for known in chosen)
            print(f"{side:<12}{seconds:>9.1f}{n_images / seconds:>10.2f}{peak_mib:>20.0f}")
    return {"images": n_images, "runs": [asdict(known) for known in runs]}


# -- memory: one large volume with many classes ------------------------------------------------------------------------

LARGE_SHAPE, LARGE_SPACING_MM = (600, 512, 512), (1.0, 0.75, 0.75)
LARGE_GRID_MM = 1.5

MEMORY_OURS = """
import json, resource, sys, time
options = json.loads(sys.argv[1])
import numpy
import autoseg
from autoseg.pipeline.segment import SPEEDS
speed = SPEEDS["fast"]
predictor = autoseg.Predictor(
    options["model"], device="cpu", folds=[0], mirroring=speed.mirroring, step_fraction=speed.step_fraction
)
image = numpy.random.default_rng(0).standard_normal([size // 8 for size in options["shape"]]).astype("float32")
image = numpy.kron(300 * image, numpy.ones((8, 8, 8), "float32"))
started = time.perf_counter()
label = predictor.predict(image, spacing_mm=options["spacing_mm"])
seconds = time.perf_counter() - started
about = {"labels": int(numpy.unique(label).size), "patch": list(predictor.configuration.patch_size)}
about["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print("\\n" + options["mark"] + json.dumps({"values": {"seconds": [seconds]}, "about": about}))
"""


def write_large_model(model: Path) -> None:
    """A fold of random weights for 118 classes at 1.5 mm: the planned patch, an eighth of the planned features."""
    case = CaseFingerprint(
        case="0",
        shape=LARGE_SHAPE,
        spacing_mm=LARGE_SPACING_MM,
        cropped_shape=LARGE_SHAPE,
        label_volumes_ml=(10.0,) * (N_CLASSES - 1),
    )
    channel = ChannelFingerprint(
        name="CT", mean=0, std=300, minimum=-1000, maximum=2000, median=0, percentile_00_5=-900, percentile_99_5=900
    )
    cases = tuple(replace(case, case=str(number)) for number in range(50))
    labels = LabelSpec(
        names=tuple(f"label {value}" for value in range(1, N_CLASSES)), values=tuple(range(1, N_CLASSES))
    )
    plan = make_plan(
        Fingerprint(cases=cases, channels=(channel,), median_cropped_fraction=1.0),
        labels,
        dataset="large",
        n_folds=5,
        choices=parse_choices(spacing=str(LARGE_GRID_MM)),
    )
    planned = plan.configuration("3d_fullres")
    network = replace(planned.network, features=tuple(n // 8 for n in planned.network.features))
    plan = replace(
        plan, configurations={"3d_fullres": replace(planned, network=network)}, recommended="3d_fullres"
    ).signed()
    write_json(model / "plan.json", plan)
    record = TrainingRecord(
        autoseg=__version__,
        torch="",
        device="cpu",
        precision="float32",
        recipe="fast",
        seed=0,
        batch_size=2,
        mirrored=False,
        training_cases=(),
        validation_cases=(),
    )
    files = FoldFiles.of(model, 0)
    write_json(files.training, record)
    save_weights(files.weights, build_trainable(plan, plan.configuration("3d_fullres")))


def memory(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measures, prints the figures, and returns what goes into the JSON file."""
    del arguments
    model = scratch / "model"
    write_large_model(model)
    options = {"mark": RESULT, "model": str(model), "shape": LARGE_SHAPE, "spacing_mm": LARGE_SPACING_MM}
    known = run("memory", "autoseg", [sys.executable, "-c", MEMORY_OURS, json.dumps(options)], {})
    volume, patch = ("x".join(map(str, shape)) for shape in (LARGE_SHAPE, known.about["patch"]))
    print(
        f"{volume} voxels, {N_CLASSES} classes at {LARGE_GRID_MM} mm, patch {patch}, --speed fast: "
        f"{known.about['peak_mib'] / 1024:.2f} GiB, {known.values['seconds'][0]:.0f} s; "
        f"{known.about['labels']} labels in the result"
    )
    return {"runs": [asdict(known)]}


# -- batch: how many tiles at a time are quickest ----------------------------------------------------------------------

BATCH_GRIDS = (((36, 50, 35), (1.0, 1.0, 1.0)), ((100, 256, 256), (1.0, 1.0, 1.0)), ((20, 320, 320), (3.6, 0.6, 0.6)))
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
MAX_BATCH_S = 15.0


def batch(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measures, prints the table, and returns what goes into the JSON file."""
    del scratch
    device, rows = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []
    precision = autocast_dtype(device)
    print(f"{'configuration':<16}{'patch':<14}{'tiles':>6}{'voxels':>9}{'ms per tile':>13}")
    for shape, spacing_mm in BATCH_GRIDS:
        for name, planned in plan_for(shape, spacing_mm).configurations.items():
            network = build_network(planned.network, n_channels=1, n_outputs=3).eval().to(device)
            for n_tiles in BATCH_SIZES:
                tiles = torch.randn(n_tiles, 1, *planned.patch_size, device=device)
                tiles = tiles.contiguous(memory_format=channels_last(len(planned.patch_size)))
                seconds = []
                with torch.no_grad(), torch.autocast(device.type, dtype=precision, enabled=precision is not None):
                    for _ in range(1 + arguments.rounds):
                        started = time.perf_counter()
                        network(tiles)
                        synchronize(device)
                        seconds.append(time.perf_counter() - started)
                each_ms = 1000 * min(seconds[1:]) / n_tiles
                patch, n_voxels = "x".join(map(str, planned.patch_size)), n_tiles * math.prod(planned.patch_size)
                print(f"{name:<16}{patch:<14}{n_tiles:>6}{n_voxels:>9}{each_ms:>13.2f}", flush=True)
                rows.append({"patch": list(planned.patch_size), "tiles": n_tiles, "ms_per_tile": each_ms})
                if seconds[-1] > MAX_BATCH_S / 2:
                    break
    return {"precision": str(precision), "runs": rows}


# -- all parts ---------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "restore": restore,
    "folder": folder,
    "memory": memory,
    "batch": batch,
}


def print_disturbance(runs: list[Measured]) -> None:
    """Says whether other programs ran meanwhile."""
    disturbed = sum(known.others_busy > MAX_OTHERS_BUSY for known in runs)
    print(f"{disturbed} of {len(runs)} measurements were disturbed by other programs\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[1].parent / "shared"
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--peer", type=Path, help="Python of an environment with nnU-Net")
    parser.add_argument("--shared", type=Path, default=default, help="folder with the real data")
    parser.add_argument("--images", type=int, default=200, help="of `folder`, at most")
    parser.add_argument("--rounds", type=int, default=2, help="how often the sides take turns")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    # So that the scratch folder does not outlive this process.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as name:
        content = PARTS[arguments.part](arguments, Path(name))
    if arguments.json:
        report = {"part": arguments.part, "cpus": os.cpu_count(), **content}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
