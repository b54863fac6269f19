"""Faults as scripts/fault_suite.py tries them, a few of each, and what a user reads when memory or a GPU fails."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fault_suite
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from autoseg import pipeline
from autoseg.cli import main
from autoseg.core.errors import TrainingError
from autoseg.core.faults import DeviceError
from autoseg.core.serialize import read_json
from autoseg.training.config import Budget, TrainConfig

pytestmark = pytest.mark.slow  # Two minutes together, of which making the world takes half a minute.

N_STEPS = 6
CONFIG = TrainConfig(budget=Budget(iterations=N_STEPS), batch_size=1, precision="float32")
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
NO_HOST_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
LOST = torch.AcceleratorError("CUDA error: unspecified launch failure")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Generated data, and what each command leaves undisturbed."""
    return fault_suite.make_world(
        tmp_path_factory.mktemp("world"), stages=("plan", "train", "select", "predict"), n_steps=6, checked=False
    )


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["autoseg", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


# -- real processes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "seed"), [("plan", 1), ("train", 3), ("select", 4), ("predict", 5)])
def test_what_was_killed_ends_as_if_it_had_not_been(world: Any, stage: str, seed: int) -> None:
    assert fault_suite.kill_often(stage, most=1)(world, random.Random(seed)) == fault_suite.SAME


def test_the_suite_sees_a_wrong_result(world: Any) -> None:
    """A comparison that never fails would show nothing."""
    with world.copy("predict") as one:
        found = fault_suite.contents(one.folder)
        weights = next(one.folder.rglob("weights.safetensors"))
        fault_suite.damage(weights, "a bit flipped", random.Random(1))
        name = str(weights.relative_to(one.folder))
        assert fault_suite.differences(fault_suite.contents(one.folder), found) == [f"{name} differs"]
        with pytest.raises(fault_suite.Broken, match="not as without the fault"):
            one.same()
        (one.folder / f".{12 * 'a'}-half").touch()
        assert fault_suite.leftovers(one.folder)


# -- memory and GPU ----------------------------------------------------------------------------------------------------


class Failing:
    """Raises an error at the n-th convolution from now on, and at all later ones, of whatever network runs here."""

    def __init__(self, error: Exception, *, at: float) -> None:
        self._error, self._at, self.seen = error, at, 0

    def __enter__(self) -> Failing:
        def look(module: torch.nn.Module, inputs: Any) -> None:
            self.seen += isinstance(module, torch.nn.Conv3d)
            if self.seen >= self._at:
                raise self._error

        self._hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A work folder with preprocessed cases and a trained fold, and how many convolutions a step of it makes."""

    work: Path
    n_convolutions: int


@pytest.fixture(scope="module")
def prepared(tiny_work: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Prepared:
    work = tmp_path_factory.mktemp("prepared") / "work"
    shutil.copytree(tiny_work, work)
    with Failing(LOST, at=math.inf) as counting:
        train(work)
    # The steps, and one batch of validation.
    return Prepared(work=work, n_convolutions=counting.seen // (N_STEPS + 1))


def train(work: Path) -> None:
    pipeline.train(work, folds=[0], config=CONFIG, device="cpu", validate=False)


def weights_of(work: Path) -> dict[str, np.ndarray]:
    return load_file(work / "models" / "3d_fullres" / "fold_0" / "weights.safetensors")


@pytest.mark.parametrize(
    ("error", "kind", "expected"),
    [
        (
            NO_MEMORY,
            TrainingError,
            "of cpu is full at step 4, with a batch of 1 .*goes on from step 3.*--gpu-memory",
        ),
        (NO_HOST_MEMORY, TrainingError, "memory of this machine.*goes on from step 3; or .*smaller --batch-size"),
        (MemoryError(), TrainingError, r"at step 4.*\(MemoryError\).*goes on from step 3"),
        (LOST, DeviceError, r"at step 4 the GPU has failed \(CUDA error.*begins again: nothing was saved yet"),
    ],
)
def test_a_training_that_a_fault_ends_goes_on(
    prepared: Prepared, tmp_path: Path, error: Exception, kind: type[Exception], expected: str
) -> None:
    work = Path(shutil.copytree(prepared.work, tmp_path / "work"))
    shutil.rmtree(work / "models")
    with Failing(error, at=3 * prepared.n_convolutions + 5), pytest.raises(kind, match=f"(?s){expected}"):
        train(work)
    train(work)
    found, undisturbed = weights_of(work), weights_of(prepared.work)
    for name, values in undisturbed.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize(
    ("error", "code", "expected", "statuses"),
    [
        (NO_MEMORY, 2, "2 of 2 images could not be segmented", ["failed", "failed"]),
        (NO_HOST_MEMORY, 2, "or what may be used of it, is full", ["failed", "failed"]),
        (LOST, 2, "phantom_test_000: the GPU has failed", []),
        (ValueError("odd\x1b[31m"), 1, "Error: ValueError: odd\\x1b[31m; this is a bug in autoseg", []),
    ],
)
def test_what_a_user_reads_of_a_prediction_that_fails(
    prepared: Prepared,
    tiny_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    expected: str,
    statuses: list[str],
) -> None:
    arguments = ("predict", tiny_dataset / "imagesTs", tmp_path / "out", "-w", prepared.work, "--device", "cpu")
    with Failing(error, at=3):
        assert run_main(monkeypatch, *arguments) == code
    told = capsys.readouterr().err
    assert expected in told.splitlines()[-1] if code == 1 else expected in told
    assert ("Traceback" in told) == (code == 1)
    record = read_json(tmp_path / "out" / "prediction.json")
    assert [case["status"] for case in record["cases"].values()] == statuses
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_sigterm_ends_a_prediction_and_leaves_nothing_half_done(
    prepared: Prepared,
    tiny_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[torch.nn.Module] = []

    def look(module: torch.nn.Module, inputs: Any) -> None:
        if not seen:
            seen.append(module)
            os.kill(os.getpid(), signal.SIGTERM)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    arguments = ("predict", tiny_dataset / "imagesTs", tmp_path / "out", "-w", prepared.work, "--device", "cpu")
    try:
        assert run_main(monkeypatch, *arguments) == 143
    finally:
        hook.remove()
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["prediction.json"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


FINALIZER = """
import os, signal, sys, time
from autoseg.cli import app, main

# Shells switch it off for what they start in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)

class Cleaned:
    def __del__(self):
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        time.sleep(0)

@app.command()
def wait(name: str):
    Cleaned()
    time.sleep(20)

main()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_is_not_lost_where_nothing_can_be_raised(name: str, code: int) -> None:
    """Python swallows what a signal raises while an object is cleaned up, and prints a traceback."""
    done = subprocess.run([sys.executable, "-c", FINALIZER, "wait", name], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"stopped by {name}; ")
    assert "Traceback" not in done.stderr


# -- disks -------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_and_what_was_begun_goes_on(
    world: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = world.stages["plan"]
    half_kib = fault_suite.used_kib(world.stages["train"].before) // 2
    try:
        with fault_suite.small_disk(world, half_kib) as disk:
            arguments = [part.format(work=disk / "work", out="") for part in stage.arguments]
            assert run_main(monkeypatch, *arguments) == 2
            told = capsys.readouterr().err
            assert f"Error: {disk / 'work'}" in told
            assert "the disk is full (No space left on device; " in told
            assert "Traceback" not in told
            assert not fault_suite.leftovers(disk)
            fault_suite.remount(disk, "size=200m")
            assert run_main(monkeypatch, *arguments) == 0
            assert not fault_suite.differences(fault_suite.contents(disk), stage.result)
    except fault_suite.NotHere:
        assert fault_suite.limited_files("plan")(world, random.Random(1)) == fault_suite.TOLD


def test_a_read_only_disk_is_told(
    world: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = world.stages["predict"]
    try:
        with fault_suite.small_disk(world, 1000) as disk:
            fault_suite.remount(disk, "ro")
            arguments = [part.format(work=stage.before / "work", out=disk / "out") for part in stage.arguments]
            assert run_main(monkeypatch, *arguments) == 2
            told = capsys.readouterr().err
            assert f"Error: {disk / 'out'}" in told
            assert "the disk is read-only" in told
    except fault_suite.NotHere:
        assert fault_suite.no_rights("predict")(world, random.Random(1)) == fault_suite.TOLD
