"""What a large dataset on many GPUs would cost, computed from costs measured here.

    python scripts/bench_cluster.py [--cases 10000] [--voxels 50e6]

Measured on generated data, in a temporary folder: preprocessing, looking whether cases are preprocessed, a checkpoint
of the network in plans/msd_liver.json, the start of a job, `autoseg status`. What follows from them for 1, 8 and 64
GPUs is printed as a table for docs/clusters.md. The time of a training is no question here: it is the budget.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import autoseg
from autoseg.core.runtime import format_duration, n_cpus
from autoseg.data.phantom import write_phantom_dataset
from autoseg.networks.build import build_trainable
from autoseg.pipeline import Workspace, preprocess_cases
from autoseg.pipeline.jobs.batch import Batch, BatchFolder, Job, JobState, now
from autoseg.pipeline.jobs.schedule import CASES_PER_PREPROCESSING_JOB, MAX_PREPROCESSING_JOBS
from autoseg.pipeline.preprocess import cases_to_preprocess
from autoseg.planning.ready import read_source_plan
from autoseg.training.checkpoint import save_weights
from autoseg.training.recipe import RECIPES, make_optimizer

N_CASES = 12
N_COPIES = 200
GPUS = (1, 8, 64)
N_FOLDS = 5
CPUS_PER_JOB = 8
LARGE_PLAN = Path(__file__).parents[1] / "plans" / "msd_liver.json"
EPOCH_S = 60.0
"""Of a planned network on a GPU of today, for the traffic of checkpoints, which are written once an epoch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """What was measured.

    Attributes:
        preprocessing_s: on one processor, per million voxels.
        stored_bytes: per voxel.
        n_files: per preprocessed case.
        look_s: whether a case is preprocessed as it is now.
        checkpoint_gib: weights and optimizer of the network in `LARGE_PLAN`.
        checkpoint_s: to write it.
        start_s: of a job, until its task begins.
        status_s: of `autoseg status` with five folds in the queue.
    """

    preprocessing_s: float
    stored_bytes: float
    n_files: float
    look_s: float
    checkpoint_gib: float
    checkpoint_s: float
    start_s: float
    status_s: float


def main() -> None:
    """Measures, computes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=float, default=10_000, help="of the dataset")
    parser.add_argument("--voxels", type=float, default=50e6, help="of a case at the target spacing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        costs = measure(Path(folder))
    print(f"measured on {n_cpus()} processors, torch {torch.__version__}")
    for field in dataclasses.fields(costs):
        print(f"  {field.name}: {getattr(costs, field.name):.4g}")
    print()
    print_table(costs, n_cases=int(arguments.cases), voxels=arguments.voxels)


def measure(folder: Path) -> Costs:
    """All costs, on generated data in a folder."""
    dataset = write_phantom_dataset(folder / "dataset", n_train=N_CASES, n_test=0)
    workspace = Workspace(root=folder / "work")
    made = autoseg.plan(dataset, workspace.root, preprocess="none")
    index = workspace.read_dataset()
    started = time.monotonic()
    preprocess_cases(workspace, index, made, made.recommended)
    preprocessing_s = (time.monotonic() - started) * n_cpus()
    stored = [file for file in (workspace.root / "preprocessed").rglob("*") if file.is_file()]
    n_bytes = sum(file.stat().st_size for file in stored)
    image = next(file for file in stored if file.name == "image.npy")
    n_voxels = sum(file.stat().st_size for file in stored if file.name == image.name) / 2
    many = dataclasses.replace(index, cases=index.cases * N_COPIES)
    started = time.monotonic()
    cases_to_preprocess(workspace, many, made, made.recommended)
    look_s = (time.monotonic() - started) / len(many.cases)
    checkpoint_gib, checkpoint_s = _measure_checkpoint(folder)
    return Costs(
        preprocessing_s=preprocessing_s / (n_voxels / 1e6),
        stored_bytes=n_bytes / n_voxels,
        n_files=len(stored) / N_CASES,
        look_s=look_s,
        checkpoint_gib=checkpoint_gib,
        checkpoint_s=checkpoint_s,
        start_s=_time_command("run-job", _idle_batch(workspace), "preprocess", "--device", "cpu"),
        status_s=_time_command("status", "-w", workspace.root),
    )


def _measure_checkpoint(folder: Path) -> tuple[float, float]:
    """Size and seconds of a checkpoint: as many numbers as weights and the optimizer's state make."""
    made = read_source_plan(LARGE_PLAN)
    network = build_trainable(made, made.configuration("3d_fullres"))
    optimizer = make_optimizer(network, RECIPES["fast"], torch.device("cpu"))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    n_states = sum(tensor.numel() for state in optimizer.state.values() for tensor in state.values())
    n_weights = sum(parameter.numel() for parameter in network.parameters())
    parts = torch.nn.ParameterList([torch.zeros(n_weights), torch.zeros(n_states)])
    started = time.monotonic()
    save_weights(folder / "checkpoint.safetensors", parts)
    seconds = time.monotonic() - started
    return (folder / "checkpoint.safetensors").stat().st_size / 2**30, seconds


def _idle_batch(workspace: Workspace) -> Path:
    """A batch like that of a training of five folds; its preprocessing has nothing left to do."""
    grid = workspace.read_plan().recommended
    folds = [
        Job(name=f"{grid}-fold-{fold}", task="train", configurations=(grid,), fold=fold) for fold in range(N_FOLDS)
    ]
    jobs = (Job(name="preprocess", task="preprocess", configurations=(grid,)), *folds)
    folder = BatchFolder.create(Batch(work=workspace.root.resolve(), executor="local", jobs=jobs))
    for job in folds:
        folder.write_state(job.name, JobState(status="stopped", host="node", began=now(), changed=now(), n_attempts=1))
    return folder.root


def _time_command(*arguments: object) -> float:
    """Seconds of a command of autoseg."""
    started = time.monotonic()
    command = [sys.executable, "-m", "autoseg", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - started


def print_table(costs: Costs, *, n_cases: int, voxels: float) -> None:
    """What follows for so many cases of so many voxels."""
    one_case_s = costs.preprocessing_s * voxels / 1e6
    n_jobs = min(MAX_PREPROCESSING_JOBS, math.ceil(n_cases / CASES_PER_PREPROCESSING_JOB))
    disk_tib = n_cases * voxels * costs.stored_bytes / 2**40
    print(f"{n_cases:,} cases of {voxels / 1e6:,.0f} million voxels:")
    print()
    print(f"| | {' | '.join(f'{n} GPU' + 's' * (n > 1) for n in GPUS)} |")
    print(f"|---|{'---|' * len(GPUS)}")

    def row(name: str, *cells: str) -> None:
        print(f"| {name} | {' | '.join(cells)} |")

    def same(name: str, cell: str) -> None:
        row(name, *[cell] * len(GPUS))

    side_by_side = [min(n, n_jobs) for n in GPUS]
    row("preprocessing jobs at once, of 8 processors", *map(str, side_by_side))
    row("preprocessing", *(format_duration(n_cases * one_case_s / (CPUS_PER_JOB * n)) for n in side_by_side))
    same("disk", f"{disk_tib:.1f} TiB")
    same("files", f"{n_cases * costs.n_files:,.0f}")
    folds_at_once = [min(n, N_FOLDS) for n in GPUS]
    row("folds at once, of five", *map(str, folds_at_once))
    row("rounds of the training budget", *(str(math.ceil(N_FOLDS / n)) for n in folds_at_once))
    row("GPUs that one configuration can use, batch 2", *(str(min(n, N_FOLDS * 2)) for n in GPUS))
    same("looking for cases to preprocess, each job", format_duration(n_cases * costs.look_s))
    row(
        "checkpoints, written once an epoch",
        *(f"{n * costs.checkpoint_gib * 1024 / EPOCH_S:.1f} MiB/s" for n in folds_at_once),
    )
    same("files that a fold holds, besides its validation", "5")


if __name__ == "__main__":
    main()
