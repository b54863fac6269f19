"""What becomes of autoseg when the machine, the disk or a file fails: each fault tried with real processes, counted.

    python scripts/fault_suite.py                   # everything, about 25 minutes on two processors
    python scripts/fault_suite.py --quick           # less of it, 3 minutes
    python scripts/fault_suite.py --only kill disk  # faults whose names hold one of these words
    python scripts/fault_suite.py --write           # also puts the table into docs/reliability.md

A small dataset is generated and taken through plan, train, select, predict, evaluate and report once, undisturbed. Each
try of a fault starts from a copy of what a command found there, disturbs the command, gives the same command again, and
compares all that it leaves with the undisturbed result: every array, weight, label map, score and decision, bit for
bit; only times and states on the way do not count. A try fails where the result differs, where a traceback is shown,
where a message does not say what it should, or where a temporary file stays.

Full and read-only disks are small file systems in memory, which only root can make (or `unshare -rm`, where the system
allows it); what cannot be tried here is told as such. A GPU is not needed: its errors are raised in the middle of a
network (`inside` below), which otherwise runs as it is.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
MARKS = "<!-- faults: begin -->", "<!-- faults: end -->"
SAME, TOLD = "same result", "named in a message, then the same result"
TIMEOUT_S = 240.0
N_STEPS = 16
NOT_HERE = "not tried here"
# What differs from run to run, and says nothing about the result.
TIMES = {"seconds", "started", "peak_memory_gib", "files"}
TEMPORARY = re.compile(r"\.[0-9a-f]{12,}-.+")


class Broken(Exception):
    """A try that did not end as promised; the message tells how."""


class NotHere(Exception):
    """Something that this machine does not let us try."""


# -- running the command line ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a process has ended."""

    code: int
    told: str
    seconds: float

    def expect(self, *codes: int) -> Done:
        """Itself, where it ended with one of these exit codes, without a traceback."""
        if self.code not in codes:
            raise Broken(f"exit code {self.code}, expected {' or '.join(map(str, codes))}: {self.tail}")
        for sign in ("Traceback", "Fatal Python error"):
            if sign in self.told:
                place = self.told.index(sign)
                raise Broken(f"a traceback: {' | '.join(self.told[max(0, place - 200) : place + 1500].splitlines())}")
        return self

    def expect_words(self, *words: str) -> Done:
        """Itself, where what it printed holds one of these."""
        if not any(word.lower() in self.told.lower() for word in words):
            raise Broken(f"said nothing of {' or '.join(words)}: {self.tail}")
        return self

    @property
    def tail(self) -> str:
        return " | ".join(self.told.strip().splitlines()[-6:])[-900:]


def start(arguments: Sequence[str], inside: Mapping[str, Any] | None = None) -> subprocess.Popen[str]:
    """A process, and a group of its own, that runs autoseg; with `inside`, faults are raised within it."""
    command = [sys.executable, "-m", "autoseg"]
    if inside:
        command = [sys.executable, __file__, "inside", json.dumps(inside)]
    # One thread each: results are bit for bit the same with the same number of threads, and tries run side by side.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], started: float) -> Done:
    """Waits until it has ended."""
    try:
        told, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        told, _ = process.communicate()
        raise Broken(f"had not ended after {TIMEOUT_S:.0f} s: {told[-300:]}") from None
    return Done(code=process.returncode, told=told, seconds=time.monotonic() - started)


def run(arguments: Sequence[str], inside: Mapping[str, Any] | None = None) -> Done:
    started = time.monotonic()
    return finish(start(arguments, inside), started)


def run_until(arguments: Sequence[str], moment_s: float, number: int) -> Done:
    """Sends a signal to the whole group of processes after that time, where it still runs."""
    started = time.monotonic()
    process = start(arguments)
    try:
        process.wait(timeout=moment_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, number)
    return finish(process, started)


# -- faults that are raised within the process -------------------------------------------------------------------------


def run_inside(spec: dict[str, Any], arguments: list[str]) -> None:
    """Runs the command line in this process with faults built in; see the functions below for what `spec` may hold."""
    sys.argv = ["autoseg", *arguments]
    if "clock_s" in spec:
        shift_clock(spec["clock_s"])
    from autoseg.cli import main

    if "changes" in spec:
        watch_changes(Path(spec["folder"]), spec["changes"], spec.get("signal", signal.SIGKILL), spec.get("count_to"))
    if "memory_mib" in spec:
        limit_memory(spec["memory_mib"])
    if "open_files" in spec:
        import resource

        load_libraries()
        resource.setrlimit(resource.RLIMIT_NOFILE, (spec["open_files"], spec["open_files"]))
    if "file_bytes" in spec:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (spec["file_bytes"], spec["file_bytes"]))
    if "gpu" in spec:
        break_gpu(spec["gpu"], spec["step"])
    main()


def watch_changes(folder: Path, at: int | None, number: int, count_to: str | None) -> None:
    """Sends itself a signal before the n-th file that it makes, renames or deletes in a folder; or counts them."""
    prefix, seen = str(folder), [0]
    kinds = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in kinds or not str(arguments[0]).startswith(prefix):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        seen[0] += 1
        if count_to is not None:
            descriptor = os.open(count_to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(descriptor, str(seen[0]).encode())
            os.close(descriptor)
        if seen[0] == at:
            os.killpg(0, number)

    sys.addaudithook(look)


def load_libraries() -> None:
    """Imports what the commands need, so that it is their work that meets a limit."""
    import importlib

    for name in ("nibabel", "scipy.ndimage", "matplotlib.figure", "safetensors.torch"):
        importlib.import_module(name)
    for name in ("inference.predictor", "pipeline", "reporting.plan_page", "training.trainer"):
        importlib.import_module(f"autoseg.{name}")


def limit_memory(more_mib: float) -> None:
    """Lets this process take that much more memory than it has when all libraries are loaded."""
    import resource

    load_libraries()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(more_mib * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def break_gpu(kind: str, step: int) -> None:
    """Raises what torch raises where a GPU's memory is full or it has gone, at the n-th convolution of the process."""
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook

    seen = [0]

    def fail(module: torch.nn.Module, inputs: Any) -> None:
        if isinstance(module, torch.nn.Conv3d):
            seen[0] += 1
            if seen[0] >= step:
                if kind == "memory":
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
                raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    register_module_forward_pre_hook(fail)


def shift_clock(seconds: float) -> None:
    """Sets the clock of this process ahead, or back."""
    real = time.time
    time.time = lambda: real() + seconds


# -- what is compared --------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    """Digests of all that a command is to leave in a work folder or a folder of predictions, by their paths."""
    known = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if not file.is_file() or file.name.endswith(".lock"):
            continue
        if file.name in {"curves.png", "log.jsonl", "checkpoint.safetensors"} or "previous-" in name:
            continue  # Times, and states on the way.
        content = file.read_bytes()
        if file.name == "plan.html":
            # It tells how long earlier trainings took.
            content = content[-10:]
        # What is damaged counts as it is.
        with suppress(ValueError, OSError, EOFError):
            if file.suffix == ".json":
                content = json.dumps(without_times(json.loads(content)), sort_keys=True).encode()
            elif file.suffix == ".gz":
                content = gzip.decompress(content)
        known[name] = hashlib.sha256(content).hexdigest()
    return known


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    missing = [f"{name} is missing" for name in expected if name not in found]
    more = [f"{name} is too many" for name in found if name not in expected]
    return missing + more + [f"{name} differs" for name in expected if name in found and found[name] != expected[name]]


def leftovers(folder: Path) -> list[str]:
    """Temporary files that no process will ever look at again."""
    return [str(file.relative_to(folder)) for file in folder.rglob(".*") if TEMPORARY.fullmatch(file.name)]


# -- the undisturbed line ----------------------------------------------------------------------------------------------


def refuse_leftovers(folder: Path) -> None:
    left = leftovers(folder)
    if left:
        raise Broken(f"temporary files stay: {', '.join(left[:3])}")


@dataclass(kw_only=True)
class Stage:
    """A command of the line.

    Attributes:
        arguments: with {work} and {out}.
        before: a copy of what the command finds.
        result: what it leaves in both folders.
        first_s: when it first changes a file; seconds since its start.
        seconds: that it takes.
        n_changes: of files.
        after_kib: that all files take then.
    """

    arguments: tuple[str, ...]
    before: Path
    result: dict[str, str] = field(default_factory=dict)
    first_s: float = 0.0
    seconds: float = 0.0
    n_changes: int = 0
    after_kib: int = 0


@dataclass(kw_only=True)
class World:
    """The generated data, and each command's beginning and end."""

    scratch: Path
    data: Path
    stages: dict[str, Stage]

    @contextmanager
    def copy(self, stage: str, *, at: Path | None = None) -> Iterator[Try]:
        """A folder as the command of a stage finds it."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch / "tries")) if at is None else at
        try:
            shutil.copytree(self.stages[stage].before, folder, dirs_exist_ok=True, symlinks=True)
            yield Try(world=self, stage=self.stages[stage], folder=folder)
        finally:
            if at is None:
                shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Try:
    """One command, in a folder of its own."""

    world: World
    stage: Stage
    folder: Path

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def arguments(self) -> list[str]:
        return [part.format(work=self.work, out=self.out) for part in self.stage.arguments]

    def run(self, inside: Mapping[str, Any] | None = None) -> Done:
        return run(self.arguments, inside)

    def run_kind(self, stage: str) -> Done:
        """The command of another stage, here."""
        return run([part.format(work=self.work, out=self.out) for part in self.world.stages[stage].arguments])

    def moment(self, rng: random.Random) -> float:
        """A time while it works, in seconds since its start."""
        return rng.uniform(0.9 * self.stage.first_s, self.stage.seconds)

    def same(self) -> str:
        """That all is as it would be without the fault."""
        found = differences(self.contents(), self.stage.result)
        if found:
            raise Broken(f"{len(found)} files are not as without the fault: {', '.join(found[:4])}")
        refuse_leftovers(self.folder)
        return SAME

    def contents(self) -> dict[str, str]:
        return contents(self.folder)

    def again(self) -> str:
        """The same command, undisturbed, completes, and all is as it would be."""
        self.run().expect(0)
        return self.same()


STAGES = "plan", "train", "select", "predict", "evaluate", "report", "plan again"


def make_world(scratch: Path, *, stages: Sequence[str] = STAGES, n_steps: int = N_STEPS, checked: bool = True) -> World:
    """Generates the data and runs the line once.

    Args:
        scratch: an empty folder.
        stages: of the line, in its order.
        n_steps: of the training of each fold.
        checked: run each command once more in a copy, and see that the result is the same.
    """
    from autoseg import pipeline
    from autoseg.core.serialize import to_plain, write_json
    from autoseg.data.phantom import write_phantom_dataset

    data = write_phantom_dataset(scratch / "data", n_train=6, n_test=2, coarseness=2.0)
    (scratch / "tries").mkdir()
    small = to_plain(pipeline.plan(data, scratch / "large", preprocess="none", n_folds=2))
    for configuration in small["configurations"].values():
        # As a person may edit it.
        network = configuration["network"]
        network["features"] = [4 + 2 * stage for stage in range(len(network["features"]))]
    write_json(scratch / "small.json", small)
    plan = ("-q", "plan", str(data), "-w", "{work}", "--folds", "2", "--like", str(scratch / "small.json"))
    train = ("train", "-w", "{work}", "--fold", "0,1", "--iterations", str(n_steps), "--device", "cpu")
    lines = {
        "plan": plan,
        "train": ("-q", *train, "--batch-size", "1", "--precision", "float32"),
        "select": ("-q", "select", "-w", "{work}", "--device", "cpu"),
        "predict": ("-q", "predict", str(data / "imagesTs"), "{out}", "-w", "{work}", "--device", "cpu"),
        "evaluate": ("-q", "evaluate", "{out}", str(data / "labelsTs")),
        "report": ("-q", "report", "-w", "{work}"),
        "plan again": plan,
    }
    world = World(scratch=scratch, data=data, stages={})
    line = scratch / "line"
    line.mkdir()
    for name in stages:
        arguments = lines[name]
        before = scratch / f"before-{name}"
        shutil.copytree(line, before)
        if name == "select":
            # The last fold has selected; here it is done once more, from what the folds alone have left.
            for file in (before / "work").rglob("*.json"):
                if file.name in {"cv.json", "selection.json", "postprocessing.json"}:
                    file.unlink()
        stage = world.stages[name] = Stage(arguments=arguments, before=before)
        told = [part.format(work=line / "work", out=line / "out") for part in arguments]
        count = scratch / "count"
        inside = {"changes": None, "folder": str(line), "count_to": str(count)}
        stage.first_s, stage.seconds = time_of(told, line, inside)
        stage.n_changes = int(count.read_text())
        stage.result, stage.after_kib = contents(line), used_kib(line)
        if checked:
            # Were this not so, no fault could be judged.
            with world.copy(name) as one:
                one.again()
    return world


def time_of(arguments: Sequence[str], folder: Path, inside: Mapping[str, Any]) -> tuple[float, float]:
    """When a command first changes something in a folder, and when it ends; seconds."""

    def state() -> set[tuple[str, int]]:
        return {(str(file), file.lstat().st_mtime_ns) for file in folder.rglob("*") if file.exists()}

    before, started, first = state(), time.monotonic(), math.nan
    process = start(arguments, inside)
    while process.poll() is None:
        try:
            if math.isnan(first) and state() != before:
                first = time.monotonic() - started
        except FileNotFoundError:
            first = time.monotonic() - started
        time.sleep(0.01)
    done = finish(process, started).expect(0)
    return (done.seconds if math.isnan(first) else first), done.seconds


# -- the faults --------------------------------------------------------------------------------------------------------


Attempt = Callable[[World, random.Random], str]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        name: in the table.
        attempt: tries it once and says how it ended; raises `Broken`.
        n: how often it is tried.
        n_quick: with --quick; 0 leaves it out.
    """

    name: str
    attempt: Attempt
    n: int
    n_quick: int = 0


def kill_often(stage: str, *, most: int = 3) -> Attempt:
    """kill -9, once or several times, at random times or before random changes of files, then to the end."""

    def attempt(world: World, rng: random.Random) -> str:
        with world.copy(stage) as one:
            for _ in range(rng.randint(1, most)):
                if rng.random() < 0.5:
                    run_until(one.arguments, one.moment(rng), signal.SIGKILL).expect(0, -signal.SIGKILL)
                else:
                    change = rng.randint(1, one.stage.n_changes)
                    inside = {"changes": change, "folder": str(one.folder)}
                    run(one.arguments, inside).expect(0, -signal.SIGKILL)
            return one.again()

    return attempt


def ask_to_stop(stage: str, number: int) -> Attempt:
    """SIGTERM or Ctrl-C at a random moment: it ends by itself and leaves nothing half done."""

    def attempt(world: World, rng: random.Random) -> str:
        with world.copy(stage) as one:
            if rng.random() < 0.5:
                # Before Python listens, and when it listens no more, the signal itself ends it.
                done = run_until(one.arguments, one.moment(rng), number).expect(0, 128 + number, -number)
            else:
                change = rng.randint(1, one.stage.n_changes)
                inside = {"changes": change, "folder": str(one.folder), "signal": number}
                done = run(one.arguments, inside).expect(0, 128 + number)
            refuse_leftovers(one.folder)
            one.again()
        return SAME if done.code else f"{SAME} (it was done already)"

    return attempt


@contextmanager
def small_disk(world: World, size_kib: int) -> Iterator[Path]:
    """A file system of that size, in memory."""
    folder = Path(tempfile.mkdtemp(dir=world.scratch / "tries"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise NotHere("needs root, or unshare -rm")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def used_kib(folder: Path) -> int:
    """What files take in pages of memory."""
    return sum(4 * math.ceil(file.stat().st_size / 4096) for file in folder.rglob("*") if file.is_file())


def full_disk(stage: str) -> Attempt:
    """The disk gets full somewhere on the way; then there is room again."""

    def attempt(world: World, rng: random.Random) -> str:
        before = used_kib(world.stages[stage].before)
        needed = world.stages[stage].after_kib
        size = before + int(rng.uniform(0, 0.8) * (needed - before)) // 4 * 4
        with small_disk(world, max(4, size)) as disk, world.copy(stage, at=disk) as one:
            done = one.run().expect(0, 2)
            if done.code:
                done.expect_words("disk is full", "No space left").expect_words(str(disk))
                refuse_leftovers(one.folder)
            remount(disk, "size=200m")
            one.again()
        return TOLD if done.code else f"{SAME} (there was room enough)"

    return attempt


def limited(
    stage: str, draw: Callable[[random.Random], Mapping[str, Any]], check: Callable[[Done, Try], None]
) -> Attempt:
    """The process may take only so much of something; then it may again.

    Args:
        stage: whose command it is.
        draw: the limit, as `run_inside` takes it.
        check: of what was told where the limit was reached; it raises `Broken`.
    """

    def attempt(world: World, rng: random.Random) -> str:
        with world.copy(stage) as one:
            done = one.run(draw(rng)).expect(0, 2)
            if done.code:
                check(done, one)
            one.again()
        return TOLD if done.code else f"{SAME} (the limit was not reached)"

    return attempt


def limited_files(stage: str) -> Attempt:
    """A file may not grow beyond a limit; then it may."""

    def check(done: Done, one: Try) -> None:
        done.expect_words("File too large", "disk is full").expect_words(str(one.folder))
        refuse_leftovers(one.folder)

    return limited(stage, lambda rng: {"file_bytes": rng.choice([200, 1000, 3000, 20_000])}, check)


def read_only_disk(stage: str) -> Attempt:
    def attempt(world: World, rng: random.Random) -> str:
        with small_disk(world, 200_000) as disk, world.copy(stage, at=disk) as one:
            remount(disk, "ro")
            one.run().expect(2).expect_words("read-only").expect_words(str(disk))
            remount(disk, "rw")
            one.again()
        return TOLD

    return attempt


def no_rights(stage: str) -> Attempt:
    """A folder that belongs to somebody else."""

    def attempt(world: World, rng: random.Random) -> str:
        with world.copy(stage) as one:
            world.scratch.chmod(0o755)
            (world.scratch / "tries").chmod(0o755)
            one.folder.chmod(0o755)
            if os.geteuid():
                one.folder.chmod(0o555)
                for folder in one.folder.rglob("*"):
                    if folder.is_dir():
                        folder.chmod(0o555)
                command = [sys.executable, "-m", "autoseg"]
            else:
                other = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
                command = [*other, sys.executable, "-m", "autoseg"]
                try:
                    can = subprocess.run([*command, "--version"], cwd="/", capture_output=True).returncode == 0
                except FileNotFoundError:
                    can = False
                if not can:
                    raise NotHere("no other user can run autoseg here")
            environment = {**os.environ, "HOME": "/tmp", "OMP_NUM_THREADS": "1"}
            known = subprocess.run(
                [*command, *one.arguments], cwd="/", env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
            )
            done = Done(code=known.returncode, told=known.stdout + known.stderr, seconds=0.0)
            done.expect(2).expect_words("permission").expect_words(str(one.folder))
            for folder in [one.folder, *one.folder.rglob("*")]:
                if folder.is_dir():
                    folder.chmod(0o755)
            one.again()
        return TOLD

    return attempt


def in_the_way(world: World, rng: random.Random) -> str:
    """A file where a folder is to be, or folders that are missing."""
    stage = rng.choice(["plan", "predict"])
    with world.copy(stage) as one:
        target = one.work if stage == "plan" else one.out
        kind = rng.choice(["file", "parent is a file", "parents missing"])
        arguments = one.arguments
        if kind == "file":
            target.write_text("something else")
        elif kind == "parent is a file":
            target.write_text("something else")
            arguments = [part.replace(str(target), str(target / "deeper")) for part in arguments]
        else:
            other = one.folder / "not" / "there" / "yet"
            arguments = [part.replace(str(target), str(other)) for part in arguments]
            run(arguments).expect(0)
            other.rename(target)
            shutil.rmtree(one.folder / "not")
            return f"{SAME} (folders are made)" if one.same() else ""
        run(arguments).expect(2).expect_words(str(target))
        if target.read_text() != "something else":
            raise Broken(f"the file {target} was changed")
        target.unlink()
        one.again()
    return TOLD


def little_memory(stage: str) -> Attempt:
    """The process may take a few MiB more than its libraries, then as much as it likes."""

    def check(done: Done, _: Try) -> None:
        done.expect_words("memory", "no more threads")

    return limited(stage, lambda rng: {"memory_mib": 2 ** rng.uniform(-1, 6)}, check)


def few_open_files(stage: str) -> Attempt:
    def check(done: Done, _: Try) -> None:
        done.expect_words("too many open files", "too many files")

    return limited(stage, lambda rng: {"open_files": rng.randint(4, 6)}, check)


def broken_gpu(stage: str, kind: str) -> Attempt:
    """The memory of a GPU is full, or it has gone, in the middle of a network; the errors are torch's own."""

    def attempt(world: World, rng: random.Random) -> str:
        with world.copy(stage) as one:
            n_convolutions = {"train": 800, "predict": 90, "select": 200}[stage]
            done = one.run({"gpu": kind, "step": rng.randint(1, n_convolutions)}).expect(0, 2)
            if done.code:
                words = ("memory of", "GPU's memory", "enough memory") if kind == "memory" else ("GPU has failed",)
                done.expect_words(*words)
            one.again()
        return TOLD if done.code else f"{SAME} (it was done by then)"

    return attempt


DAMAGES = ("a bit flipped", "cut off", "emptied", "overwritten", "deleted")
# A flipped bit in a text may well make another text that is as good: a person may edit these files.
TEXT_DAMAGES = DAMAGES[1:]


def damage(file: Path, kind: str, rng: random.Random) -> None:
    """Changes a file as a disk, or a person, might."""
    content = file.read_bytes()
    if kind == "deleted":
        file.unlink()
    elif kind == "cut off":
        file.write_bytes(content[: rng.randrange(1, len(content))])
    elif kind == "emptied":
        file.write_bytes(b"")
    elif kind == "overwritten":
        file.write_bytes(rng.randbytes(len(content)))
    else:
        changed = bytearray(content)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)


def damaged(pattern: str, *, stages: Sequence[str], kinds: Sequence[str] = DAMAGES) -> Attempt:
    """A file of the work folder is damaged: it is made again, or named, and deleting it and planning again helps."""

    def attempt(world: World, rng: random.Random) -> str:
        stage, kind = rng.choice(list(stages)), rng.choice(list(kinds))
        with world.copy(stage) as one:
            file = rng.choice(sorted(one.work.glob(pattern)))
            damage(file, kind, rng)
            where = f"{file.relative_to(one.folder)} {kind}, then {stage}"
            try:
                done = one.run().expect(0, 2)
                if done.code == 0:
                    name, expected = str(file.relative_to(one.folder)), one.stage.result
                    if not differences(one.contents(), expected):
                        return "made again, same result"
                    # A command that does not read it goes on without; whoever needs it tries it, too.
                    found = one.contents() | {name: expected.get(name, "")}
                    if not differences({known: found[known] for known in found if known in expected}, expected):
                        return "not needed, same result"
                # A damaged case or fold is told by its folder, and weights that have gone by what was made with them.
                gone = ("made with other weights",) if kind == "deleted" else ()
                done.expect_words(file.name, str(file.parent), file.parent.name.replace("_", " "), *gone)
                # As the messages say: delete it, plan again, train again.
                remove_damaged(file)
                if "plan" not in stage:
                    one.run_kind("plan").expect(0)
                    one.run_kind("train").expect(0)
                one.again()
            except Broken as broken:
                raise Broken(f"{where}: {broken}") from None
        return "named, then made again"

    return attempt


def damaged_checkpoint(world: World, rng: random.Random) -> str:
    """A training is killed, its checkpoint is damaged, and it goes on."""
    with world.copy("train") as one:
        moment = one.stage.first_s + 0.5 * (one.stage.seconds - one.stage.first_s)
        run_until(one.arguments, moment, signal.SIGTERM).expect(0, 143)
        files = sorted(one.work.glob("models/*/fold_*/checkpoint.safetensors"))
        if not files:
            return one.again()
        file, kind = rng.choice(files), rng.choice(DAMAGES)
        damage(file, kind, rng)
        done = one.run().expect(0, 2)
        if done.code:
            done.expect_words(file.name, str(file.parent))
            shutil.rmtree(file.parent)
            try:
                one.again()
            except Broken as broken:
                raise Broken(f"checkpoint {kind}: {broken}") from None
            return "named, then made again"
        try:
            one.same()
        except Broken as broken:
            raise Broken(f"checkpoint {kind}: {broken}") from None
    return "made again, same result"


def remove_damaged(file: Path) -> None:
    """Deletes it; of a fold that cannot go on, all that a training has left."""
    file.unlink(missing_ok=True)
    if file.suffix == ".safetensors" or file.name in {"training.json", "log.jsonl", "recipe.json"}:
        shutil.rmtree(file.parent)


def newer_version(world: World, rng: random.Random) -> str:
    """A file of the work folder that a later version of autoseg has written, with something that this one lacks."""
    with world.copy("train") as one:
        file = one.work / rng.choice(["autoseg.json", "plan.json", "dataset.json", "splits.json"])
        kept = file.read_bytes()
        content = json.loads(kept)
        if file.name == "autoseg.json":
            content["format"] += 1
        else:
            content["later_invention"] = {"of": "a newer version"}
        file.write_text(json.dumps(content))
        one.run().expect(2).expect_words(file.name)
        if json.loads(file.read_text()) != content:
            raise Broken(f"{file.name} was changed")
        file.write_bytes(kept)
        one.again()
    return TOLD


def stale_temporaries(world: World, rng: random.Random) -> str:
    """Half files of a process that was killed lie everywhere; they do not disturb, and are gone afterwards."""
    stage = rng.choice(["plan", "train", "predict"])
    with world.copy(stage) as one:
        n_kills = 0
        while not leftovers(one.folder) and n_kills < 8:
            run(one.arguments, {"changes": rng.randint(1, one.stage.n_changes), "folder": str(one.folder)})
            n_kills += 1
        has_some = bool(leftovers(one.folder))
        one.again()
    return f"{SAME}, and they are removed" if has_some else f"{SAME} (none were left)"


def two_at_once(first: str, second: str) -> Attempt:
    """Two processes on one work folder, or one folder of label maps, at the same time."""

    def attempt(world: World, rng: random.Random) -> str:
        with world.copy(first) as one:
            other = [part.format(work=one.work, out=one.out) for part in world.stages[second].arguments]
            started = time.monotonic()
            process = start(one.arguments)
            time.sleep(rng.uniform(0, 0.8))
            second_process = start(other)
            codes = []
            for known in (process, second_process):
                done = finish(known, started).expect(0, 2)
                if done.code:
                    done.expect_words("another process", "at the same time", "on their way")
                codes.append(done.code)
            if codes == [2, 2]:
                raise Broken("neither has done it")
            if any(codes):
                one.again()
            one.same()
        return f"{SAME}{', one of them refused' if any(codes) else ''}"

    return attempt


def vanished_scan(world: World, rng: random.Random) -> str:
    """A scan is taken away, cut off or touched between plan and train, or between train and predict."""
    stage = rng.choice(["train", "predict"])
    with world.copy(stage) as one:
        data = Path(shutil.copytree(world.data, one.folder / "data"))
        try:
            for file in one.work.rglob("dataset.json"):
                file.write_text(file.read_text().replace(str(world.data), str(data)))
            # From here on the copy counts; the same files with other times are other files.
            arguments = [part.replace(str(world.data), str(data)) for part in one.arguments]
            images = sorted((data / ("imagesTr" if stage == "train" else "imagesTs")).iterdir())
            image, kind = rng.choice(images), rng.choice(["deleted", "cut off", "touched"])
            kept = image.read_bytes()
            if kind == "touched":
                os.utime(image, (1, 1))
                run(arguments).expect(0)
            else:
                image.write_bytes(kept[:800]) if kind == "cut off" else image.unlink()
                done = run(arguments).expect(0, 2)
                if stage == "train" or kind == "cut off":
                    if done.code != 2:
                        raise Broken(f"{image.name} {kind}, then {stage}: nothing was said")
                    done.expect_words(image.name, str(image))
                image.write_bytes(kept)
                run(arguments).expect(0)
        finally:
            shutil.rmtree(data)
        expected, found = one.stage.result, one.contents()
        # Where the scans lie is written down, and their times are.
        drop = re.compile(r"(dataset|check|evaluation|begun|cv|case|prediction|selection|postprocessing)\.json$|report")
        wrong = differences(
            {name: value for name, value in found.items() if not drop.search(name)},
            {name: value for name, value in expected.items() if not drop.search(name)},
        )
        if wrong:
            raise Broken(f"{image.name} {kind}, then {stage}: {', '.join(wrong[:4])}")
    return "noticed, then the same result"


def clock_jump(world: World, rng: random.Random) -> str:
    """The clock is set ahead or back between two commands, and files are dated into the future or into 1970."""
    stage = rng.choice(["plan", "train", "select", "predict"])
    shift_s = rng.choice([-1, 1]) * rng.uniform(1, 2000) * 86400
    with world.copy(stage) as one:
        for file in [one.folder, *one.folder.rglob("*")]:
            if rng.random() < 0.5:
                moment = rng.choice([0.0, time.time() + abs(shift_s)])
                os.utime(file, (moment, moment))
        if shutil.which("faketime"):
            command = ["faketime", "-f", f"{shift_s / 86400:+.0f}d", sys.executable, "-m", "autoseg", *one.arguments]
            known = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
            Done(code=known.returncode, told=known.stdout + known.stderr, seconds=0.0).expect(0)
        else:
            one.run({"clock_s": shift_s}).expect(0)
        one.same()
        one.again()
    return SAME


def closed_pipe(world: World, rng: random.Random) -> str:
    """Whoever reads the output goes away, as in `autoseg ... | head`."""
    with world.copy("evaluate") as one:
        arguments = rng.choice([one.arguments, ["plan", "-w", str(one.work), "--explain"], ["plan", "--help"]])
        process = subprocess.Popen(
            [sys.executable, "-m", "autoseg", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.close()
        _, told = process.communicate(timeout=TIMEOUT_S)
        Done(code=process.returncode, told=told, seconds=0.0).expect(0, 1)
        if told.strip():
            raise Broken(f"said {told.strip()[-200:]}")
    return "ended quietly"


def make_faults() -> list[Fault]:
    """All of them, in the order of the table."""

    def in_stages(name: str, make: Callable[[str], Attempt], counts: Mapping[str, tuple[int, int]]) -> list[Fault]:
        return [
            Fault(name=name.format(stage), attempt=make(stage), n=n, n_quick=quick)
            for stage, (n, quick) in counts.items()
        ]

    kills = {"plan": (16, 3), "train": (10, 2), "select": (8, 1), "predict": (10, 1)}
    signals = {"plan": (2, 0), "train": (2, 1), "select": (2, 0), "predict": (2, 0)}
    return [
        *in_stages("kill -9 in {}", kill_often, {**kills, "evaluate": (4, 0), "report": (3, 0)}),
        *in_stages("SIGTERM in {}", lambda stage: ask_to_stop(stage, signal.SIGTERM), signals),
        *in_stages("Ctrl-C in {}", lambda stage: ask_to_stop(stage, signal.SIGINT), signals),
        *in_stages("full disk in {}", full_disk, {"plan": (4, 1), "train": (3, 0), "predict": (3, 1)}),
        *in_stages("limit on the size of files in {}", limited_files, {"plan": (2, 0), "train": (2, 0)}),
        *in_stages("read-only disk in {}", read_only_disk, {"plan": (1, 0), "train": (1, 0), "predict": (1, 1)}),
        *in_stages("folder of somebody else in {}", no_rights, {"plan": (1, 0), "train": (1, 0), "predict": (1, 0)}),
        Fault(name="a file where a folder is to be, or missing folders", attempt=in_the_way, n=4),
        *in_stages("memory of the machine in {}", little_memory, {"plan": (3, 0), "train": (3, 1), "predict": (3, 0)}),
        *in_stages("too many open files in {}", few_open_files, {"plan": (2, 0), "train": (1, 0)}),
        *in_stages(
            "memory of the GPU in {} (simulated)",
            lambda stage: broken_gpu(stage, "memory"),
            {"train": (3, 1), "select": (1, 0), "predict": (2, 0)},
        ),
        *in_stages(
            "lost GPU in {} (simulated)",
            lambda stage: broken_gpu(stage, "lost"),
            {"train": (3, 1), "select": (1, 0), "predict": (2, 0)},
        ),
        Fault(
            name="damaged preprocessed case",
            attempt=damaged("preprocessed/*/*/*", stages=["train", "select", "plan again"]),
            n=8,
            n_quick=1,
        ),
        Fault(
            name="damaged weights",
            attempt=damaged("models/*/fold_*/weights.safetensors", stages=["predict", "select", "report"]),
            n=6,
            n_quick=1,
        ),
        Fault(name="damaged checkpoint", attempt=damaged_checkpoint, n=3),
        Fault(
            name="damaged plan, index, folds or fingerprint",
            attempt=damaged("*.json", stages=["plan again", "train", "predict"], kinds=TEXT_DAMAGES),
            n=10,
        ),
        Fault(
            name="damaged records and scores of a training",
            attempt=damaged("models/**/*.json*", stages=["select", "report", "predict"], kinds=TEXT_DAMAGES),
            n=6,
        ),
        Fault(name="work folder of a newer version", attempt=newer_version, n=3, n_quick=1),
        Fault(name="half files of killed processes", attempt=stale_temporaries, n=2),
        Fault(name="two at once: plan and plan", attempt=two_at_once("plan", "plan"), n=3, n_quick=1),
        Fault(name="two at once: train the same fold", attempt=two_at_once("train", "train"), n=1),
        Fault(name="two at once: plan beside train", attempt=two_at_once("train", "plan"), n=2),
        Fault(name="two at once: select and select", attempt=two_at_once("select", "select"), n=1),
        Fault(name="two at once: predict into one folder", attempt=two_at_once("predict", "predict"), n=3),
        Fault(name="scans that vanish or change", attempt=vanished_scan, n=4),
        Fault(name="clock jumps", attempt=clock_jump, n=4),
        Fault(name="closed pipe", attempt=closed_pipe, n=2),
    ]


# -- counting ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of a fault.

    Attributes:
        fault: its name.
        tried: how often.
        outcomes: what happened, how often.
        seconds: of a try, on average.
        broken: what did not go as promised.
    """

    fault: str
    tried: int
    outcomes: dict[str, int]
    seconds: float
    broken: tuple[str, ...]

    @property
    def outcome(self) -> str:
        told = [text if self.tried == n else f"{n} {text}" for text, n in self.outcomes.items()]
        if self.broken:
            told.append(f"**{len(self.broken)} FAILED**")
        return "; ".join(told)


def try_fault(world: World, fault: Fault, n: int, *, seed: int) -> Row:
    """Tries a fault so many times, one after the other."""
    outcomes: Counter[str] = Counter()
    broken, started, tried = [], time.monotonic(), 0
    for number in range(n):
        rng = random.Random(f"{seed}/{fault.name}/{number}")
        try:
            outcomes[fault.attempt(world, rng)] += 1
        except NotHere as why:
            outcomes[f"{NOT_HERE}: {why}"] += 1
            break
        except Broken as error:
            broken.append(f"try {number}: {error}")
        tried += 1
    seconds = (time.monotonic() - started) / max(1, tried)
    ordered = dict(outcomes.most_common())
    return Row(fault=fault.name, tried=tried, outcomes=ordered, seconds=round(seconds, 1), broken=tuple(broken))


def try_all(world: World, faults: Sequence[Fault], *, quick: bool, seed: int) -> list[Row]:
    """All faults, as many at once as there are processors."""

    def one(fault: Fault) -> Row:
        row = try_fault(world, fault, max(1, fault.n_quick) if quick else fault.n, seed=seed)
        print(f"{row.fault}: {row.tried} x, {row.outcome}", file=sys.stderr, flush=True)
        for text in row.broken:
            print(f"    {text}", file=sys.stderr, flush=True)
        return row

    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        return list(pool.map(one, faults))
    finally:
        pool.shutdown(cancel_futures=True)


def make_table(rows: Sequence[Row]) -> str:
    lines = ["| fault | tried | outcome | seconds each |", "|---|---|---|---|"]
    lines += [f"| {row.fault} | {row.tried} | {row.outcome} | {row.seconds:.1f} |" for row in rows]
    tried, broken = sum(row.tried for row in rows), sum(len(row.broken) for row in rows)
    lines.append(f"| **all** | **{tried}** | **{tried - broken} as promised, {broken} not** | |")
    return "\n".join(lines)


def write_page(page: Path, table: str) -> None:
    """Puts the table between its marks."""
    text = page.read_text()
    begin, end = (text.index(mark) for mark in MARKS)
    page.write_text(f"{text[:begin]}{MARKS[0]}\n\n{table}\n\n{text[end:]}")


def enter_namespace() -> None:
    """Where this user may not mount anything, begins again where it may, if the system allows that."""
    if os.geteuid() == 0 or "FAULT_SUITE_INSIDE" in os.environ:
        return
    if shutil.which("unshare") and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0:
        os.environ["FAULT_SUITE_INSIDE"] = "1"
        os.execvp("unshare", ["unshare", "-rm", sys.executable, *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tries")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="faults whose names hold one of these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    faults = [one for one in make_faults() if not arguments.only or any(word in one.name for word in arguments.only)]
    if not faults:
        parser.error(f"no fault is called like that; known are {', '.join(one.name for one in make_faults())}")
    if arguments.quick and not arguments.only:
        faults = [one for one in faults if one.n_quick]
    enter_namespace()
    # Started in the background it may be ignored, which is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        world = make_world(Path(name).resolve(), checked=not arguments.quick)
        rows = try_all(world, faults, quick=arguments.quick, seed=arguments.seed)
    table = make_table(rows)
    print(f"{table}\n\n{(time.monotonic() - started) / 60:.1f} minutes")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    if arguments.write:
        write_page(PAGE, table)
    sys.exit(any(row.broken for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["inside"]:
        run_inside(json.loads(sys.argv[2]), sys.argv[3:])
    else:
        main()
