"""All tests marked `gpu` and the benchmarks of training and prediction on one GPU: one command, under ten minutes.

    python scripts/gpu_suite.py [--json FILE] [--peer DIR] [--work DIR] [--sections ...] [--sizes ...]

Made for a machine where nothing can be installed: it needs torch, numpy and safetensors, for the tests also pytest and
scipy. Data for the benchmarks are noise in the sizes of typical datasets; neither image files nor readers are needed.
The sections, in order of importance:

- tests: `pytest -m gpu tests/test_gpu.py`.
- speed: steps per second, with as many processors as `--cpus` names. "no data" is forward, loss, backward and update on
  one batch that stays on the GPU; "whole loop" is `train_fold`, with reading patches, copying them, and augmentation;
  "ratio" is the second by the first. Both as they are and compiled; a training compiles where it is long enough to gain
  by it. "busy" is the per cent of the time that the GPU was, as its driver tells.
- peer: the same of nnU-Net's own trainer with our plan, where `--peer` names a folder with its packages. "no data" is
  its best case. For "whole loop" it reads plain arrays, which is no slower than its compressed files, and starts as
  many loading processes as there are processors, but at most 12.
- folds: where `--work` names a planned and preprocessed work folder, its folds are trained, each for as long as the
  rest of the time allows or as `--fold-time` says, and all validation cases are predicted as wholes. Dice is taken on
  the network's grid against the stored labels, so the scans are not needed; where the plan keeps the spacing of the
  scans, that is the Dice on the scans.
- memory: what the planner estimates for a preset, what training it took, and the largest batch a short search found.
- prediction: seconds for one case with mirroring.

Every measurement is a process of its own, restricted to its processors from its start. A failure or a time-out in one
leaves the others as they are; the report has its traceback. After `--max-time` nothing is begun and what runs is ended;
the report says what was left out. Datasets are measured one after the other, further ones only if what comes after them
still fits. A whole round takes three commands, since five folds want minutes each:

    python scripts/gpu_suite.py --sizes hippocampus --peer DIR --json first.json
    python scripts/gpu_suite.py --sections folds --work DIR --json folds.json
    python scripts/gpu_suite.py --sections speed peer --sizes liver prostate --peer DIR --json sizes.json

What to copy for `--peer` from the `site-packages` of an environment with nnU-Net 2.8, 3 MB: `nnunetv2`,
`batchgenerators`, `batchgeneratorsv2`, `dynamic_network_architectures`, `acvl_utils` and `nnunetv2-*.dist-info`, all
pure Python. They import scipy, scikit-image, scikit-learn, pandas, matplotlib, seaborn, tqdm, requests and
threadpoolctl, which have to be there for the machine's Python. SimpleITK, nibabel, blosc2 and cc3d get a stand-in where
they are missing: no training step uses them.

What to copy for `--work`: `plan.json`, `splits.json` and `preprocessed` of a work folder. safetensors and scipy hold
compiled code; where the machine lacks them, carry wheels for its Python and processor.

`--device cpu --quick` runs every section with hardly any steps in a minute or two, to try out the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from gpu_clock import RESULT, Timing
from gpu_jobs import MEASURED_PRESETS, SIZES, write_cases
from gpu_report import compare_with_goals, cross_validate, last_line, pair_speeds, print_tables

from autoseg.pipeline.workspace import Workspace

ROOT = Path(__file__).parents[1]
JOBS = Path(__file__).with_name("gpu_jobs.py")
SECTIONS = ("tests", "speed", "peer", "folds", "memory", "prediction")
DATASETS = ("hippocampus", "prostate", "liver")
MODES = ("eager", "compiled")
CPUS = (2, 4, 16)
QUICK = Timing(n_warm_up=1, n_least=2, n_most=3, time_s=0.5)
# What a job needs to be worth its start, and what it may take, in seconds.
NEEDED_S = {"tests": 30.0, "speed": 45.0, "peer": 50.0, "memory": 40.0, "prediction": 20.0}
LIMITS_S = {"tests": 240.0, "speed": 200.0, "peer": 160.0, "memory": 100.0, "prediction": 90.0}
# What is kept for the sections to come.
RESERVES_S = {"folds": 150.0, "memory": 80.0, "prediction": 30.0}
# Start, opening the cases and predicting those for validation, of a process that trains a fold.
FOLD_OVERHEAD_S = 20.0
MIN_FOLD_S = 10.0
QUICK_FOLD_STEPS, QUICK_FOLDS = 2, 2
MAX_TEXT, SHOWN_LINES = 4000, 15


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does.

    Attributes:
        section: one of `SECTIONS`.
        name: for people.
        command: the process.
        n_cpus: it may use; None for all.
        needed_s: it is begun only if there is so much time; None for `NEEDED_S`.
        limit_s: it is ended after this time; None for `LIMITS_S`.
        reserve_s: and so much more, for what comes later.
    """

    section: str
    name: str
    command: tuple[str, ...]
    n_cpus: int | None = None
    needed_s: float | None = None
    limit_s: float | None = None
    reserve_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended.

    Attributes:
        section, name: of the job.
        status: "done", "failed", "out of time", or "skipped".
        seconds: it took.
        text: why not, or what a test run says.
        results: what it gave until it ended.
    """

    section: str
    name: str
    status: str
    seconds: float = 0.0
    text: str = ""
    results: list[dict[str, Any]] = field(default_factory=list)


class Suite:
    """The jobs of one command, their time, and what came of them."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch = options, scratch
        self.machine: dict[str, Any] = {}
        self.outcomes: list[Outcome] = []
        self._started = time.monotonic()

    @property
    def left_s(self) -> float:
        """Until `--max-time`."""
        return self.options.max_time - (time.monotonic() - self._started)

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self, job: Job) -> Outcome:
        """Runs a job if there is time, and writes the report."""
        needed_s = 0.0 if self.options.quick else job.needed_s or NEEDED_S[job.section]
        if self.left_s < needed_s + job.reserve_s or self.left_s <= 0:
            later = f" and {job.reserve_s:.0f} s for what comes later" if job.reserve_s else ""
            text = f"{max(0.0, self.left_s):.0f} s were left, wanted {needed_s:.0f} s{later}"
            return self.add(Outcome(section=job.section, name=job.name, status="skipped", text=text))
        print(f"{time.monotonic() - self._started:4.0f} s  {job.section}: {job.name} ...", flush=True)
        limit_s = min(self.left_s, job.limit_s or LIMITS_S[job.section])
        return self.add(run_process(job, limit_s))

    def add(self, outcome: Outcome) -> Outcome:
        """Keeps an outcome and writes the report, so that it is there whatever comes next."""
        self.outcomes.append(outcome)
        lines = outcome.text.strip().splitlines() or [""]
        shown = lines[-SHOWN_LINES:] if outcome.status == "failed" else lines[-1:]
        name = f"{outcome.section}: {outcome.name} " if outcome.status == "skipped" else ""
        print(f"        {name}{outcome.status} after {outcome.seconds:.0f} s  " + "\n        ".join(shown), flush=True)
        self.write()
        return outcome

    def guard(self, section: str, work: Callable[[], None]) -> None:
        """Does a section; what goes wrong in it is an outcome like any other."""
        try:
            work()
        except Exception:
            text = traceback.format_exc()[-MAX_TEXT:]
            self.add(Outcome(section=section, name="this script", status="failed", text=text))

    def job(self, section: str, name: str, program: str, options: dict[str, Any], **more: Any) -> Job:
        """A job of `gpu_jobs.py`."""
        everything = {"device": self.options.device, "quick": self.options.quick} | options
        return Job(
            section=section,
            name=name,
            command=(sys.executable, str(JOBS), program, json.dumps(everything)),
            **more,
        )

    def reserve_s(self, *later: str) -> float:
        """For those of the sections that are still to come."""
        if self.options.quick:
            return 0.0
        return sum(RESERVES_S[name] for name in later if self.includes(name))

    def includes(self, section: str) -> bool:
        """Whether a section is asked for and has what it needs."""
        given = {"peer": self.options.peer, "folds": self.options.work}
        return section in self.options.sections and given.get(section, True) is not None

    # -- sections ------------------------------------------------------------------------------------------------------

    def describe_machine(self) -> None:
        """Finds out what it runs on; that is also the first use of the GPU."""
        outcome = run_process(self.job("machine", "machine", "machine", {}), 120.0)
        if outcome.status != "done":
            raise SystemExit(f"gpu_suite: {self.options.device} cannot be used: {outcome.text}")
        self.machine = outcome.results[0]

    def run_tests(self) -> None:
        """All tests for a GPU; without one they skip themselves."""
        # -o instead of the option of a plugin that may be missing.
        command = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-o", "timeout=150")
        self.run(Job(section="tests", name="pytest -m gpu", command=(*command, "--durations=5", "tests/test_gpu.py")))

    def run_speeds(self) -> None:
        """Both sides, dataset after dataset, first with all processors: that fills the compiler's cache."""
        timing = QUICK if self.options.quick else Timing()
        available = len(os.sched_getaffinity(0))
        wanted = sorted({min(n, available) for n in self.options.cpus})
        counts = [wanted[-1], *wanted[:-1]]
        for index, size in enumerate(self.options.sizes):
            cases = self.scratch / size
            write_cases(cases, size)
            given = {"size": size, "cases": str(cases), "timing": asdict(timing), "modes": self.options.modes}
            reserve_s = self.reserve_s("folds", "memory", "prediction") if index else 0.0
            sides = {"speed": given, "peer": given | {"peer": str(self.options.peer)}}
            # The goal is about few processors, so those come before the others on both sides.
            for part in (counts[:2], counts[2:]):
                for section in filter(self.includes, sides):
                    for n in part:
                        name = f"{size}, {n} processor{'s' * (n > 1)}"
                        self.run(self.job(section, name, section, sides[section], n_cpus=n, reserve_s=reserve_s))

    def run_folds(self) -> None:
        """Trains the folds one after the other, all for the same time."""
        n_folds = len(Workspace(root=self.options.work).read_splits().folds)
        chosen = self.options.folds
        if chosen is None:
            chosen = list(range(n_folds))[: QUICK_FOLDS if self.options.quick else None]
        reserve_s = self.reserve_s("memory", "prediction")
        time_s = self.options.fold_time
        if time_s is None and not self.options.quick:
            time_s = (self.left_s - reserve_s) / len(chosen) - FOLD_OVERHEAD_S
            if time_s < MIN_FOLD_S:
                text = f"{self.left_s:.0f} s were left, wanted {MIN_FOLD_S + FOLD_OVERHEAD_S:.0f} s for each fold"
                self.add(Outcome(section="folds", name="all", status="skipped", text=text))
                return
        for index, fold in enumerate(chosen):
            if self.options.fold_time is None and not self.options.quick:
                # The overhead is a guess.
                time_s = min(time_s, (self.left_s - reserve_s) / (len(chosen) - index) - FOLD_OVERHEAD_S)
                time_s = max(time_s, MIN_FOLD_S)
            options = {
                "work": str(self.options.work.resolve()),
                "fold": fold,
                "time_s": time_s,
                "iterations": QUICK_FOLD_STEPS if self.options.quick else None,
            }
            name = f"fold {fold}" if time_s is None else f"fold {fold}, {time_s:.0f} s of training"
            needed_s, limit_s = ((time_s or 60.0) + n * FOLD_OVERHEAD_S for n in (0.5, 6))
            self.run(self.job("folds", name, "fold", options, needed_s=needed_s, limit_s=limit_s))

    def run_memory(self) -> None:
        """Each preset by itself: a failed one can leave the GPU unusable for its process."""
        for preset in MEASURED_PRESETS:
            self.run(self.job("memory", preset, "memory", {"preset": preset}))

    def run_prediction(self) -> None:
        """All sizes in one process."""
        self.run(self.job("prediction", "one case of each size", "prediction", {"sizes": self.options.sizes}))

    def run_all(self) -> None:
        """Every section that is asked for."""
        self.describe_machine()
        parts: list[tuple[str, Callable[[], None]]] = [
            ("tests", self.run_tests),
            ("speed", self.run_speeds),
            ("folds", self.run_folds),
            ("memory", self.run_memory),
            ("prediction", self.run_prediction),
        ]
        for section, work in parts:
            if self.includes(section) or (section == "speed" and self.includes("peer")):
                self.guard(section, work)
        for section in self.options.sections:
            if not self.includes(section):
                missing = {"peer": "--peer", "folds": "--work"}[section]
                text = f"{missing} was not given"
                self.add(Outcome(section=section, name="all", status="skipped", text=text))

    # -- the report ----------------------------------------------------------------------------------------------------

    def results(self, *sections: str) -> list[dict[str, Any]]:
        """What the jobs of these sections gave."""
        return [result for known in self.outcomes if known.section in sections for result in known.results]

    def report(self) -> dict[str, Any]:
        """Everything, for the JSON file."""
        speeds, folds = self.results("speed", "peer"), self.results("folds")
        return {
            "date": date.today().isoformat(),
            "machine": self.machine,
            "device": self.options.device,
            "quick": self.options.quick,
            "max_time_s": self.options.max_time,
            "seconds": round(time.monotonic() - self._started, 1),
            "tests_passed": self.tests_passed,
            "goals": compare_with_goals(speeds),
            "speed": pair_speeds(speeds),
            "folds": cross_validate(folds) if folds else None,
            "memory": self.results("memory"),
            "prediction": self.results("prediction"),
            "jobs": [asdict(known) for known in self.outcomes],
        }

    @property
    def tests_passed(self) -> bool | None:
        """Whether all tests that ran passed; None where none ran, or they did not come to their end."""
        for known in self.outcomes:
            if known.section == "tests" and known.status == "failed":
                return False
            if known.section == "tests" and known.status == "done" and " passed" in last_line(known.text):
                return True
        return None

    def write(self) -> None:
        """Writes the JSON file, if one is wanted."""
        if self.options.json:
            self.options.json.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.options.json.with_name(self.options.json.name + ".part")
            temporary.write_text(json.dumps(self.report(), indent=2) + "\n")
            temporary.replace(self.options.json)


# -- processes ---------------------------------------------------------------------------------------------------------


@contextmanager
def restricted(n_cpus: int | None) -> Iterator[None]:
    """Processes that are started in the block may use only so many processors."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:n_cpus])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run_process(job: Job, limit_s: float) -> Outcome:
    """Runs a process, ends it and all that it has started after its time, and reads what it gave."""
    # It would say how many processors the whole command was given, not this job.
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_CPUS_PER_TASK"}
    started, in_time = time.monotonic(), True
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        with restricted(job.n_cpus):
            process = subprocess.Popen(
                job.command, stdout=output, stderr=errors, cwd=ROOT, env=environment, preexec_fn=os.setpgrp
            )
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            in_time = False
        finally:
            end_group(process)
        output.seek(0)
        errors.seek(0)
        said, complained = output.read(), errors.read()
    status = "done" if process.returncode == 0 else "failed"
    results = [json.loads(line.removeprefix(RESULT)) for line in said.splitlines() if line.startswith(RESULT)]
    text = ""
    if job.section == "tests":
        text = said[-MAX_TEXT:] or complained[-MAX_TEXT:]
    elif status != "done":
        text = complained[-MAX_TEXT:]
    if not in_time:
        status, text = "out of time", f"{text}\nended after {limit_s:.0f} s"
    seconds = round(time.monotonic() - started, 1)
    return Outcome(section=job.section, name=job.name, status=status, seconds=seconds, text=text, results=results)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and the loading processes it may have left."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue


# -- the command -------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """The options, with the defaults that depend on others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures to this file, after every measurement")
    parser.add_argument("--max-time", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="hardly any steps of a small network")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help=f"default: {' '.join(DATASETS)}")
    parser.add_argument("--cpus", nargs="+", type=int, default=list(CPUS), help="numbers of processors")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="of our network; default: both")
    parser.add_argument("--peer", type=Path, help="folder with the packages of nnU-Net")
    parser.add_argument("--work", type=Path, help="planned and preprocessed work folder to train the folds of")
    parser.add_argument("--folds", nargs="+", type=int, help="default: all")
    parser.add_argument("--fold-time", type=float, help="seconds of training for each fold; default: what is left")
    options = parser.parse_args()
    for folder in (options.peer, options.work):
        if folder is not None and not folder.is_dir():
            parser.error(f"{folder}: no such folder")
    if min(options.cpus) < 1 or options.max_time <= 0:
        parser.error("--cpus and --max-time must be positive")
    options.sizes = options.sizes or (["tiny"] if options.quick else list(DATASETS))
    options.modes = options.modes or (["eager"] if options.quick else list(MODES))
    if options.peer is not None:
        options.peer = options.peer.resolve()
    return options


def main() -> None:
    options = parse_arguments()
    # So that neither a measured process nor the scratch folder outlives this one.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as name:
        # Processes that are ended leave their files there.
        os.environ["TMPDIR"] = name
        suite = Suite(options, Path(name))
        suite.run_all()
    suite.write()
    print()
    print_tables(suite.report())
    sys.exit(any(known.status == "failed" for known in suite.outcomes))


if __name__ == "__main__":
    main()
