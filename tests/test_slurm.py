"""Training and segmenting on a real Slurm, with tiny networks: what waits, is interrupted, fails, and is told of."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from autoseg.core.serialize import to_plain
from autoseg.pipeline.jobs.batch import BatchFolder
from autoseg.pipeline.jobs.status import status

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm"), pytest.mark.timeout(900)]

COMMAND = Path(sys.executable).with_name("autoseg")
CLUSTER = ("--executor", "slurm", "--cpus-per-task", 1)
OPTIONS = (*CLUSTER, "--device", "cpu", "--precision", "float32", "--batch-size", 2, "--network", "planned")
N_STEPS = 80
FOLDS = [f"3d_fullres-fold-{fold}" for fold in range(5)]


def autoseg(*arguments: object, cwd: Path, code: int = 0) -> str:
    command = [str(COMMAND), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def statuses(cwd: Path) -> dict[str, dict[str, Any]]:
    return {one.name: to_plain(one) for one in status(cwd / "autoseg-work")}


def words(cwd: Path) -> dict[str, str]:
    return {name: one["status"] for name, one in statuses(cwd).items()}


def wait_until(condition: Callable[[], bool], cwd: Path, *, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it never came\n{autoseg('status', cwd=cwd)}"
        time.sleep(0.3)


def wait_for_end(cwd: Path, *, seconds: float = 240) -> None:
    going_on = {"waiting", "requeued", "running", "ending"}
    wait_until(lambda: not going_on & set(words(cwd).values()), cwd, seconds=seconds)


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def fold_folder(cwd: Path, fold: int) -> Path:
    return cwd / "autoseg-work" / "models" / "3d_fullres" / f"fold_{fold}"


def weights(cwd: Path, fold: int) -> dict[str, Any]:
    return load_file(fold_folder(cwd, fold) / "weights.safetensors")


def is_training(cwd: Path, fold: int) -> bool:
    """Whether a fold has written its first epoch down."""
    return (fold_folder(cwd, fold) / "log.jsonl").exists()


@pytest.fixture
def user(tiny_work: Path, tmp_path: Path) -> Path:
    """A folder in which a user has planned a tiny network, to train in."""
    shutil.copytree(tiny_work, tmp_path / "autoseg-work")
    return tmp_path


@pytest.fixture(scope="module")
def trained(tiny_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five folds as an array, preprocessing before and selection after them, none of it disturbed."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_work, folder / "autoseg-work")
    autoseg("train", "--fold", "0..4", "--iterations", N_STEPS, "--preprocess-jobs", 2, *OPTIONS, cwd=folder)
    known = statuses(folder)
    # Nothing can be done yet, and what cannot begin yet says for what it waits.
    assert known["select"]["status"] == "waiting"
    assert known["select"]["detail"] == f"for {', '.join(FOLDS)}"
    assert {known[name]["status"] for name in FOLDS} == {"waiting"}
    wait_for_end(folder)
    return folder


@pytest.mark.slow
def test_five_folds_as_an_array_then_selection(trained: Path) -> None:
    names = ["preprocess-1", "preprocess-2", *FOLDS, "select"]
    known = {one["name"]: one for one in json.loads(autoseg("status", "--json", cwd=trained))}
    assert {name: known[name]["status"] for name in names} == dict.fromkeys(names, "done")
    arrays = {known[name]["slurm_id"].partition("_")[0] for name in FOLDS}
    assert len(arrays) == 1
    folder = BatchFolder.all_in(trained / "autoseg-work")[0]
    states = {name: folder.read_state(name) for name in names}
    began = {name: state.began for name, state in states.items() if state is not None}
    ended = {name: state.changed for name, state in states.items() if state is not None}
    assert max(ended["preprocess-1"], ended["preprocess-2"]) <= min(began[name] for name in FOLDS)
    assert max(ended[name] for name in FOLDS) <= began["select"]
    assert json.loads((trained / "autoseg-work" / "selection.json").read_text())["chosen"] == "3d_fullres"
    assert (trained / "autoseg-work" / "report" / "results.html").exists()
    pickles = {path.parent.name for path in (trained / "autoseg-work").rglob("*.pkl")}
    assert pickles <= {"submitit"}, "only submitit pickles, and only in its own folder"


@pytest.mark.slow
def test_whatever_interrupts_a_fold_it_ends_with_the_same_weights(trained: Path, user: Path) -> None:
    """Requeued, killed, its supervisor killed, warned of the time limit: one fold each."""
    autoseg("train", "--fold", "0..4", "--iterations", N_STEPS, "--no-validate", *OPTIONS, cwd=user)
    folder = BatchFolder.all_in(user / "autoseg-work")[0]
    ids = folder.read_slurm_ids()
    waiting = dict(zip(FOLDS[::-1], (kill_supervisor, requeue, warn, kill), strict=False))

    def interrupt_those_that_train() -> bool:
        for name in list(waiting):
            state = folder.read_state(name)
            if state is not None and is_training(user, int(name[-1])):
                waiting.pop(name)(state.pids[0], ids[name])
        return not waiting

    wait_until(interrupt_those_that_train, user)
    wait_for_end(user, seconds=400)
    assert set(words(user).values()) == {"done"}
    states = {name: folder.read_state(name) for name in FOLDS}
    assert {name: state.n_attempts for name, state in states.items() if state is not None} == {
        FOLDS[0]: 1,
        **dict.fromkeys(FOLDS[1:], 2),
    }
    reasons = [failure.reason for name in FOLDS for failure in getattr(states[name], "failures", ())]
    assert len(reasons) == 2
    assert all("kill" in reason.lower() for reason in reasons)
    for fold in range(5):
        expected, found = weights(trained, fold), weights(user, fold)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=f"fold {fold}, {name}")


def requeue(pid: int, slurm_id: str) -> None:
    slurm("scontrol", "requeue", slurm_id)


def kill(pid: int, slurm_id: str) -> None:
    os.kill(pid, signal.SIGKILL)


def kill_supervisor(pid: int, slurm_id: str) -> None:
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)


def warn(pid: int, slurm_id: str) -> None:
    """As Slurm does some time before the limit."""
    slurm("scancel", "--signal=USR2", slurm_id)


@pytest.mark.slow
def test_a_time_limit_shorter_than_the_training(trained: Path, user: Path) -> None:
    """A minute is the shortest limit that Slurm knows, and it warns as early as 15 s after the beginning."""
    more = ("--time", "1m", "--sbatch", "signal=USR2@40", "--no-validate", "--max-time", "30s", "--network", "planned")
    autoseg("train", "--fold", 0, *more, *CLUSTER, "--device", "cpu", cwd=user)
    wait_for_end(user, seconds=300)
    (known,) = (one for one in statuses(user).values() if one["fold"] == 0)
    assert known["status"] == "done"
    assert known["n_attempts"] >= 2
    lines = (user / "autoseg-work/models/3d_fullres/fold_0/log.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["time_s"] for line in lines]
    assert seconds == sorted(seconds)
    assert 29 <= seconds[-1] < 40, "what was trained before counts"


@pytest.mark.slow
def test_a_fold_that_fails_is_told_of_and_the_others_complete(user: Path) -> None:
    in_the_way = fold_folder(user, 0)
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("in the way")
    autoseg("train", "--fold", "0,1", "--iterations", 4, *OPTIONS, cwd=user)
    wait_for_end(user)
    known = statuses(user)
    assert {name: one["status"] for name, one in known.items()} == {
        "preprocess": "done",
        FOLDS[0]: "failed",
        FOLDS[1]: "done",
        "select": "not begun",
    }
    assert known[FOLDS[0]]["n_attempts"] == 3
    assert "fold_0" in known[FOLDS[0]]["error"]
    assert known["select"]["detail"] == f"{FOLDS[0]} not done"
    assert f"{FOLDS[0]}: Error: " in autoseg("status", cwd=user)
    assert "fold_0" in autoseg("logs", 0, cwd=user)


def test_status_and_cancel(user: Path) -> None:
    command = ("train", "--fold", "0,1", "--iterations", 100_000, *OPTIONS)
    autoseg(*command, cwd=user)
    assert words(user)[FOLDS[0]] == "waiting"
    assert "are on their way already" in autoseg(*command, cwd=user, code=2)
    wait_until(lambda: is_training(user, 0) and is_training(user, 1), user)
    known = statuses(user)[FOLDS[0]]
    assert known["status"] == "running"
    assert 0 < known["progress"]["fraction"] < 1
    assert known["progress"]["left_s"] > 0
    slurm("scontrol", "requeue", BatchFolder.all_in(user / "autoseg-work")[0].read_slurm_ids()[FOLDS[0]])
    wait_until(lambda: words(user)[FOLDS[0]] == "requeued", user)
    assert words(user)["select"] == "waiting"
    told = autoseg("cancel", cwd=user)
    assert "cancelled: 3d_fullres-fold-0, 3d_fullres-fold-1, select" in told
    wait_until(lambda: set(words(user).values()) == {"done", "cancelled"}, user)
    assert "no job waits or runs" in autoseg("cancel", cwd=user)
    earlier = user / "autoseg-work/models/3d_fullres/fold_1/checkpoint.safetensors"
    assert earlier.exists()
    autoseg(*command, "--no-resume", cwd=user)
    assert not earlier.exists()
    wait_until(lambda: is_training(user, 0), user)
    autoseg("cancel", cwd=user)


@pytest.mark.slow
def test_a_more_urgent_job_interrupts_a_fold(trained: Path, user: Path) -> None:
    """Preemption as clusters do it: the fold is put back into the queue, and goes on when the urgent job is over."""
    if "urgent" not in slurm("sinfo", "--noheader", "--format=%R"):
        pytest.skip("this Slurm has no partition 'urgent' that preempts jobs of others")
    more = ("--iterations", N_STEPS, "--no-validate", "--sbatch", "nodelist=node1")
    autoseg("train", "--fold", 0, *more, *OPTIONS, cwd=user)
    wait_until(lambda: is_training(user, 0), user)
    slurm("sbatch", "--partition=urgent", "--nodelist=node1", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    wait_until(lambda: words(user)[FOLDS[0]] == "requeued", user)
    wait_for_end(user)
    known = statuses(user)[FOLDS[0]]
    assert (known["status"], known["n_attempts"], known["error"]) == ("done", 2, "")
    expected, found = weights(trained, 0), weights(user, 0)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.slow
def test_a_folder_is_segmented_in_parts(trained: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    cluster = ("--jobs", 3, *CLUSTER, "--device", "cpu")
    images, folder = tiny_dataset / "imagesTr", tmp_path / "out"
    autoseg("predict", images, folder, *cluster, cwd=trained)
    wait_for_end(trained)
    known = statuses(trained)
    assert {known[f"predict-{part}"]["status"] for part in (1, 2, 3)} == {"done"}
    autoseg("predict", images, tmp_path / "alone", "--device", "cpu", cwd=trained)
    names = sorted(path.name for path in (tmp_path / "alone").glob("*.nii.gz"))
    assert names == sorted(path.name for path in folder.glob("*.nii.gz"))
    written = {name: (folder / name).stat().st_mtime_ns for name in names}
    (folder / names[0]).unlink()
    autoseg("predict", images, folder, *cluster, cwd=trained)
    wait_for_end(trained)
    assert names == sorted(path.name for path in folder.glob("*.nii.gz"))
    assert [name for name in names if (folder / name).stat().st_mtime_ns != written[name]] == names[:1]
    other = autoseg("predict", images, folder, "--continue", "--step", 0.8, "--device", "cpu", cwd=trained, code=2)
    assert "made by another model or with other folds" in other
    autoseg("report", "--predictions", folder, cwd=trained)


def test_what_slurm_refuses_is_told(user: Path) -> None:
    assert "Slurm has no partition 'nowhere'; it has debug" in autoseg(
        "train", "--partition", "nowhere", *OPTIONS, cwd=user, code=2
    )
    assert "Slurm refuses the job 'autoseg-preprocess-3d_fullres'" in autoseg(
        "train", "--memory", 100_000, *OPTIONS, cwd=user, code=2
    )
    earlier = fold_folder(user, 0) / "checkpoint.safetensors"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("of days of training")
    assert "Slurm refuses the job 'autoseg-preprocess-3d_fullres'" in autoseg(
        "train", "--no-resume", "--memory", 100_000, *OPTIONS, cwd=user, code=2
    )
    assert earlier.exists(), "what Slurm refuses deletes nothing"
    assert not statuses(user)
