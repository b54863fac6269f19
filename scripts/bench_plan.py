"""Time and memory of `autoseg plan`, all processes together, on the hippocampus MR scans and on four large CTs.

    python scripts/bench_plan.py [--data ../shared/data] [--json FILE]

The CTs are made from one small CT by enlarging it (4x in-plane, 1.2 to 1.6x through-plane), with noise, as int16, and
labels from thresholds. Each row is a fresh work folder and a fresh process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    Attributes:
        name: what was planned.
        seconds: wall time of the process.
        peak_mib: largest sum of the resident memory of the process and all its children.
    """

    name: str
    seconds: float
    peak_mib: float


def resident_mib(root: int) -> float:
    """Resident memory of a process and all that descend from it, from /proc."""
    parents, resident = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except (FileNotFoundError, ProcessLookupError):
            continue
        pid = int(status.parent.name)
        parents[pid] = int(fields["PPid"])
        resident[pid] = int(fields.get("VmRSS", "0 kB").split()[0]) / 1024
    family, grown = {root}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in family} - family
        family |= more
        grown = bool(more)
    return sum(resident.get(pid, 0.0) for pid in family)


def measure(name: str, dataset: Path, work: Path, *options: str) -> Row:
    """Runs `autoseg plan` and watches its memory every 20 ms."""
    started = time.monotonic()
    command = [sys.executable, "-m", "autoseg", "-q", "plan", str(dataset), "-w", str(work), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak_mib = [0.0]

    def watch() -> None:
        while process.poll() is None:
            peak_mib[0] = max(peak_mib[0], resident_mib(process.pid))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if process.wait():
        raise SystemExit(f"autoseg plan {dataset} failed")
    seconds = time.monotonic() - started
    watcher.join()
    return Row(name=name, seconds=round(seconds, 2), peak_mib=round(peak_mib[0]))


def make_large_cts(source: Path, folder: Path) -> None:
    """Four CTs of about 490x400x160 voxels with three labels, in nnU-Net raw layout."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    image = nib.load(source)
    voxels = np.asarray(image.dataobj, np.float32)
    rng = np.random.default_rng(0)
    for index, factor in enumerate((1.2, 1.35, 1.5, 1.6)):
        # The through-plane axis is the third; the array is padded or cut by nothing, only enlarged.
        factors = np.array([4.0, 4.0, factor])
        large = ndimage.zoom(voxels, factors, order=1, grid_mode=True, mode="nearest")
        large += rng.normal(0, 12, large.shape).astype(np.float32)
        smooth = ndimage.uniform_filter(large, 5)
        label = np.select([smooth > 250, smooth > 20, (smooth > -900) & (smooth < -500)], [3, 1, 2], 0)
        affine = image.affine @ np.diag([*(np.array(voxels.shape) / large.shape), 1.0])
        case = f"ct_{index}"
        nib.save(nib.Nifti1Image(large.round().astype(np.int16), affine), folder / "imagesTr" / f"{case}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label.astype(np.uint8), affine), folder / "labelsTr" / f"{case}.nii.gz")
    labels = {"background": 0, "soft tissue": 1, "lung": 2, "bone": 3}
    content = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 4, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[1].parent / "shared" / "data")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        hippocampus = arguments.data / "Task04_Hippocampus"
        if hippocampus.is_dir():
            rows.append(measure("hippocampus, 200 MR, 3D", hippocampus, scratch / "h3"))
            rows.append(measure("hippocampus, 200 MR, 2D and 3D", hippocampus, scratch / "h2", "-c", "all"))
        small_ct = arguments.data / "whole_body_ct" / "example_ct.nii.gz"
        if small_ct.is_file():
            make_large_cts(small_ct, scratch / "cts")
            rows.append(measure("four large CTs, 3D", scratch / "cts", scratch / "c3", "-c", "3d_fullres"))
    if not rows:
        raise SystemExit(f"{arguments.data}: found neither Task04_Hippocampus nor whole_body_ct")
    print(f"{'dataset':<32}{'seconds':>9}{'peak MiB':>10}")
    for row in rows:
        print(f"{row.name:<32}{row.seconds:>9.1f}{row.peak_mib:>10.0f}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
