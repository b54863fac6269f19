"""Folds side by side on this machine, as a user trains them: real processes, real files."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from autoseg import pipeline
from autoseg.cli import app
from autoseg.cluster.processes import Ending, LogFollower, ProcessGroup
from autoseg.cluster.slurm import Partition, SlurmOptions, parse_time, submit_array
from autoseg.core.errors import AutosegError
from autoseg.core.serialize import read_json, to_plain
from autoseg.pipeline.configurations import choose_configurations, configuration_to_train
from autoseg.pipeline.jobs.batch import Batch, BatchFolder, Job, JobState, PredictRequest
from autoseg.pipeline.jobs.cancel import cancel
from autoseg.pipeline.jobs.local import choose_devices
from autoseg.pipeline.jobs.results import count_results
from autoseg.pipeline.jobs.schedule import groups_of, training_jobs
from autoseg.pipeline.jobs.status import status
from autoseg.pipeline.jobs.supervise import Supervisor, kind_of
from autoseg.training.config import Budget, TrainConfig

COMMAND = Path(sys.executable).with_name("autoseg")
PREDICTION = {
    **{name: "" for name in ("autoseg", "torch", "python", "dataset", "configuration", "model", "device", "precision")},
    **{"folds": [0], "mirrored": False, "step_fraction": 0.5, "labels": {"names": ["a"], "values": [1]}},
    **{"postprocessing": [], "started": "", "seconds": 1.0, "peak_memory_gib": 1.0, "peak_gpu_memory_gib": None},
    "cases": {},
}
OPTIONS = ("--device", "cpu", "--precision", "float32", "--batch-size", 2)


def start(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(COMMAND), *map(str, arguments)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def autoseg(*arguments: object, cwd: Path, code: int = 0) -> str:
    process = start(*arguments, cwd=cwd)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, f"{arguments}\n{output}\n{errors}"
    assert "Traceback" not in errors, errors
    return output + errors


def statuses(cwd: Path) -> dict[str, dict[str, Any]]:
    return {one.name: to_plain(one) for one in status(cwd / "autoseg-work")}


def wait_until(condition: Callable[[], bool], *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)


def wait_for(group: ProcessGroup) -> Ending:
    wait_until(lambda: group.poll() is not None)
    ending = group.poll()
    assert ending is not None
    return ending


def fold_folder(cwd: Path, fold: int) -> Path:
    return cwd / "autoseg-work" / "models" / "3d_fullres" / f"fold_{fold}"


def n_epochs(cwd: Path, fold: int) -> int:
    log = fold_folder(cwd, fold) / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def user(tiny_work: Path, tmp_path: Path) -> Path:
    """A folder in which a user has planned a tiny network, to train in."""
    shutil.copytree(tiny_work, tmp_path / "autoseg-work")
    return tmp_path


def test_folds_are_trained_side_by_side_and_then_selected_from(user: Path) -> None:
    told = autoseg("train", "--fold", "0..4", "--gpus", 2, "--iterations", 6, *OPTIONS, cwd=user)
    known = {one["name"]: one for one in json.loads(autoseg("status", "--json", cwd=user))}
    names = ["preprocess", *(f"3d_fullres-fold-{fold}" for fold in range(5)), "select"]
    assert {name: one["status"] for name, one in known.items()} == dict.fromkeys(names, "done")
    assert all(known[name]["progress"]["step"] == 6 for name in names[1:-1])
    assert "3d_fullres, fold 4, " in told
    assert "fold_3: epoch 2" in told, "what folds write is seen while they are trained"
    assert json.loads((user / "autoseg-work" / "selection.json").read_text())["chosen"] == "3d_fullres"
    assert (user / "autoseg-work" / "report" / "results.html").exists()
    began = {name: BatchFolder.all_in(user / "autoseg-work")[0].read_state(name) for name in names}
    order = [state.began for state in began.values() if state is not None]
    assert order == sorted(order)


def test_a_fold_that_fails_does_not_stop_the_others(user: Path) -> None:
    in_the_way = fold_folder(user, 0)
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("in the way")
    told = autoseg("train", "--fold", "0,1", "--gpus", 2, "--iterations", 4, *OPTIONS, cwd=user, code=2)
    assert "not done: 3d_fullres-fold-0, select; the others are" in told
    known = statuses(user)
    assert {name: one["status"] for name, one in known.items()} == {
        "preprocess": "done",
        "3d_fullres-fold-0": "failed",
        "3d_fullres-fold-1": "done",
        "select": "not begun",
    }
    assert "3d_fullres-fold-0 not done" in told, "why it has not begun"
    assert "fold_0" in known["3d_fullres-fold-0"]["error"]
    assert "fold_0" in autoseg("logs", 0, cwd=user)
    in_the_way.unlink()
    autoseg("train", "--fold", "0,1", "--gpus", 2, "--iterations", 4, "--no-validate", *OPTIONS, cwd=user)
    assert {one["status"] for one in statuses(user).values() if one["fold"] is not None} == {"done"}


def test_interrupted_folds_go_on_where_they_were(user: Path) -> None:
    command = ("train", "--fold", "0,1", "--gpus", 2, "--iterations", 600, "--no-validate", *OPTIONS)
    process = start(*command, cwd=user)
    wait_until(lambda: all(n_epochs(user, fold) for fold in (0, 1)))
    names = ["3d_fullres-fold-0", "3d_fullres-fold-1"]
    known = statuses(user)
    assert {known[name]["status"] for name in names} == {"running"}
    assert all(known[name]["progress"]["left_s"] > 0 for name in names)
    assert "are on their way already" in autoseg(*command, cwd=user, code=2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    known = statuses(user)
    assert {known[name]["status"] for name in names} == {"stopped"}
    reached = [n_epochs(user, fold) for fold in (0, 1)]
    process = start(*command, cwd=user)
    wait_until(lambda: all(n_epochs(user, fold) > reached[fold] for fold in (0, 1)))
    assert "cancelled: 3d_fullres-fold-0, 3d_fullres-fold-1" in autoseg("cancel", cwd=user)
    process.communicate(timeout=120)
    known = statuses(user)
    assert {known[name]["status"] for name in names} == {"cancelled"}
    assert all("stopped at step" in Path(known[name]["log"]).read_text() for name in names)


def test_two_processes_train_a_fold_as_one_does(user: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    alone = tmp_path_factory.mktemp("alone")
    shutil.copytree(user / "autoseg-work", alone / "autoseg-work")
    # Muon and AdamW would make steps of equal size from gradients that are zero but for rounding.
    command = ("train", "--fold", 0, "--iterations", 6, "--recipe", "published", *OPTIONS)
    autoseg(*command, cwd=alone)
    autoseg(*command, "--gpus-per-fold", 2, cwd=user)
    weights = [load_file(fold_folder(folder, 0) / "weights.safetensors") for folder in (alone, user)]
    for name, expected in weights[0].items():
        np.testing.assert_allclose(weights[1][name], expected, atol=2e-4, err_msg=name)
    scored = [(fold_folder(folder, 0) / "validation" / "evaluation.json").read_text() for folder in (alone, user)]
    assert [json.loads(text)["cases"][0]["case"] for text in scored] == ["phantom_003"] * 2


def test_one_killed_process_ends_the_fold(user: Path) -> None:
    command = ("train", "--fold", 0, "--gpus-per-fold", 2, "--iterations", 600, "--no-validate", *OPTIONS)
    process = start(*command, cwd=user)
    wait_until(lambda: n_epochs(user, 0) > 0)
    state = BatchFolder.all_in(user / "autoseg-work")[0].read_state("3d_fullres-fold-0")
    assert state is not None
    os.kill(state.pids[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "killed by SIGKILL" in statuses(user)["3d_fullres-fold-0"]["error"]


def test_options_that_do_not_go_together(user: Path) -> None:
    def refused(*options: object) -> str:
        work = str(user / "autoseg-work")
        result = CliRunner().invoke(app, ["train", "-w", work, *map(str, options)])
        assert isinstance(result.exception, AutosegError), result.output
        return str(result.exception)

    assert "belong to --executor slurm" in refused("--partition", "gpu")
    assert "expected local or slurm" in refused("--executor", "pbs")
    assert "expected KEY=VALUE" in refused("--executor", "slurm", "--sbatch", "exclusive")
    assert "--gpus is for this machine" in refused("--executor", "slurm", "--gpus", 2)
    assert "expected auto, numbers" in refused("--gpus", "first")
    assert "a fold wants 3 GPUs, and there are 2" in refused("--device", "cpu", "--gpus", 2, "--gpus-per-fold", 3)


def test_without_slurm_the_message_says_so(user: Path) -> None:
    environment = {**os.environ, "PATH": str(COMMAND.parent)}
    done = subprocess.run(
        [COMMAND, "train", "--executor", "slurm"], cwd=user, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "there is no Slurm here" in done.stderr
    assert not statuses(user)


def test_without_submitit_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    partition = Partition(n_cpus=1, time_limit_min=None, has_gpus=False)
    options = SlurmOptions()
    with pytest.raises(AutosegError, match=r"submitit is missing.*pip install"):
        submit_array([], folder=tmp_path, name="x", n_processes=1, uses_gpu=False, options=options, partition=partition)


def test_devices_of_the_processor() -> None:
    assert choose_devices("cpu", None, n_jobs=5) == ["cpu"]
    assert choose_devices("cpu", "3", n_jobs=5) == ["cpu"] * 3
    assert choose_devices("cpu", None, n_jobs=1, gpus_per_fold=2) == ["cpu"] * 2
    with pytest.raises(AutosegError, match="expected auto"):
        choose_devices("cpu", "1;2", n_jobs=5)


def test_the_stages_of_a_cascade_and_other_configurations_are_in_order(user: Path) -> None:
    workspace = pipeline.Workspace(root=user / "autoseg-work")
    made = pipeline.force_cascade(workspace.root)
    found = workspace.read_fingerprint()
    # With structures of any size.
    cases = tuple(dataclasses.replace(case, label_volumes_ml=(), component_volumes_ml=()) for case in found.cases)
    read = partial(dataclasses.replace, found, cases=cases)
    choose = partial(choose_configurations, on_cpu=False, fingerprint=read)
    train_on_cpu = partial(configuration_to_train, on_cpu=True, fingerprint=read)
    names = choose(made, "2d,cascade", None)
    assert names == ["2d", "3d_cascade_fullres"]
    assert choose(made, "all", None) == list(made.configurations)
    assert choose(made, None, None) == [made.recommended]
    of_cascade = dataclasses.replace(made, recommended="3d_cascade_fullres")
    assert train_on_cpu(of_cascade, None, None).name == "3d_lowres"
    assert train_on_cpu(of_cascade, None, Budget(max_time_s=7200)).name == "3d_lowres"
    assert train_on_cpu(of_cascade, "cascade", None).name == "3d_cascade_fullres"
    for asked, budget, expected in (
        (None, None, "3d_cascade_fullres"),
        (None, Budget(iterations=10), "3d_cascade_fullres"),
        (None, Budget(max_time_s=3600), "3d_cascade_fullres"),
        (None, Budget(max_time_s=900), "3d_lowres"),
        ("cascade", Budget(max_time_s=900), "3d_cascade_fullres"),
    ):
        assert choose(of_cascade, asked, budget) == [expected]
    jobs = training_jobs(workspace, configurations=names, folds=[0, 1], validate=True, n_preprocessing=3)
    done: set[str] = set()
    for job in jobs:
        assert done.issuperset(job.after), job
        done.add(job.name)
    by_name = {job.name: job for job in jobs}
    first = tuple(f"3d_lowres-fold-{fold}" for fold in range(5))
    preprocessing = tuple(f"preprocess-{part}" for part in (1, 2, 3))
    assert by_name["3d_cascade_fullres-first-stage"].after == first
    assert by_name["3d_lowres-fold-3"].after == by_name["2d-fold-1"].after == preprocessing
    assert by_name["3d_cascade_fullres-fold-1"].after == ("3d_cascade_fullres-first-stage",)
    assert set(by_name["select"].after) == {job.name for job in jobs if job.task == "train"}
    groups = [len(group) for group in groups_of(jobs)]
    assert sorted(groups) == [1, 1, 2, 2, 3, 5]


def echo_job(folder: Path, script: str, *, max_failures: int) -> tuple[BatchFolder, Supervisor]:
    """A supervisor of a job that no task is known for, so that it fails."""
    job = Job(name=script, task="unheard_of")
    batch_folder = BatchFolder.create(Batch(work=folder, executor="local", jobs=(job,)))
    return batch_folder, Supervisor(batch_folder, job, devices=["cpu"], max_failures=max_failures)


def test_a_job_does_not_outlive_who_looks_after_it(tmp_path: Path) -> None:
    folder, supervisor = echo_job(tmp_path, "broken", max_failures=1)
    command = ("run-job", folder.root, supervisor.job.name, "--device", "cpu", "--parent")
    for parent, code in ((os.getpid(), 1), (os.getppid(), 128 + signal.SIGTERM)):
        job = start(*command, parent, cwd=tmp_path)
        _, errors = job.communicate(timeout=60)
        assert job.returncode == code
        assert ("unheard_of" in errors) == (code == 1), "it begins only while its parent is there"


def test_a_job_that_fails_for_the_same_reason_is_given_up(tmp_path: Path) -> None:
    folder, supervisor = echo_job(tmp_path, "broken", max_failures=3)
    assert supervisor.begin()
    wait_until(lambda: supervisor.poll() is not None)
    state = folder.read_state("broken")
    assert state is not None
    assert (state.status, state.n_attempts, len(state.failures)) == ("failed", 3, 3)
    assert "unheard_of" in state.failures[-1].reason
    again = Supervisor(folder, folder.read().job("broken"), devices=["cpu"], max_failures=3)
    assert not again.begin(), "on whatever machine it begins next"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "No space left on device: '/w/.3fa9c0aa11bc-log.jsonl'",
            "No space left on device: '/w/.77aa01bcdd01-log.jsonl'",
        ),
        ("Error: fold_1: the loss is nan at step 12", "Error: fold_1: the loss is nan at step 993"),
        ("cannot open /tmp/autoseg-abc_12/rendezvous", "cannot open /tmp/autoseg-x9z/rendezvous"),
    ],
)
def test_reasons_are_the_same_but_for_names_and_numbers(one: str, other: str) -> None:
    assert kind_of(one) == kind_of(other)
    assert kind_of(one) != kind_of("CUDA out of memory")


def test_beginning_anew_deletes_before_any_fold_begins(user: Path) -> None:
    """Each process knows its own fold only, and would take the others' old networks for such as stay."""
    work = user / "autoseg-work"
    config = TrainConfig(budget=Budget(iterations=2), batch_size=1)
    pipeline.train(work, folds=[0, 1], config=config, device="cpu", validate=False)
    more = ("--iterations", 2, "--recipe", "published", "--no-validate", "--gpus", 2)
    command = ("train", "--fold", "0,1", *more, *OPTIONS)
    assert "of the recipe 'fast'" in autoseg(*command, cwd=user, code=2)
    autoseg(*command, "--no-resume", cwd=user)
    assert {one["status"] for one in statuses(user).values() if one["fold"] is not None} == {"done"}
    one_by_one = ["train", "-w", str(work), "--fold", "0,1", "--iterations", "2", "--no-validate", "--device", "cpu"]
    result = CliRunner().invoke(app, [*one_by_one, "--no-resume"])
    assert result.exit_code == 0, result.exception
    assert read_json(fold_folder(user, 1) / "training.json")["recipe"] == "fast"


def test_one_by_one_a_fold_that_fails_does_not_stop_the_others_either(user: Path) -> None:
    in_the_way = fold_folder(user, 0)
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("in the way")
    work = str(user / "autoseg-work")
    result = CliRunner().invoke(app, ["train", "-w", work, "--fold", "0,1", "--iterations", "2", "--device", "cpu"])
    assert isinstance(result.exception, AutosegError), result.output
    assert "1 of 2 folds failed; the others are done" in str(result.exception)
    assert "fold_0" in str(result.exception)
    assert statuses(user)["3d_fullres-fold-1"]["status"] == "done"


def test_a_group_ends_when_one_of_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    python = [sys.executable, "-c"]
    wait = "import time; time.sleep(300)"
    group = ProcessGroup(
        [[*python, wait], [*python, "print('before'); raise SystemExit('out of luck')"]],
        log=tmp_path / "log.txt",
    )
    started = time.monotonic()
    ending = wait_for(group)
    assert (ending.exit_code, ending.reason) == (1, "out of luck")
    assert not ending.is_stopped
    assert time.monotonic() - started < 60
    assert (tmp_path / "log.1.txt").read_text().splitlines()[-1] == "out of luck"


def test_a_killed_process_says_by_what(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    ending = wait_for(ProcessGroup([[sys.executable, "-c", code]], log=tmp_path / "log.txt"))
    assert ending.exit_code == -signal.SIGKILL
    assert "SIGKILL" in ending.reason


def test_who_was_killed_is_why_the_others_have_failed(tmp_path: Path) -> None:
    codes = ("raise SystemExit('lost another')", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    group = ProcessGroup([[sys.executable, "-c", code] for code in codes], log=tmp_path / "log.txt")
    for pid in group.pids:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert "SIGKILL" in wait_for(group).reason


def test_a_log_is_followed_by_whole_lines(tmp_path: Path) -> None:
    follower = LogFollower(tmp_path / "log.txt")
    assert follower.read_new() == ""
    with (tmp_path / "log.txt").open("w") as file:
        file.write("one\ntw")
        file.flush()
        assert follower.read_new() == "one\n"
        file.write("o\n")
        file.flush()
        assert follower.read_new() == "two\n"


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("30", 30),
        ("30:00", 30),
        ("0:30", 1),
        ("12:00:00", 720),
        ("2-00", 2880),
        ("1-12:30:01", 2191),
        ("infinite", None),
    ],
)
def test_times_of_slurm(text: str, minutes: int | None) -> None:
    assert parse_time(text) == minutes


def test_a_fold_writes_nothing_that_another_one_writes(user: Path) -> None:
    work = user / "autoseg-work"
    config = TrainConfig(budget=Budget(iterations=2), batch_size=1)

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file() and path.suffix != ".lock"}

    pipeline.train(work, folds=[0], config=config, device="cpu", and_select=False)
    before = files()
    pipeline.train(work, folds=[1], config=config, device="cpu", and_select=False)
    changed = {path for path, time_ns in files().items() if before.get(path) != time_ns}
    assert changed
    assert all(fold_folder(user, 1) in path.parents for path in changed), changed


def test_what_is_made_anew_in_its_place_counts_as_a_result(tmp_path: Path) -> None:
    """Otherwise a job would be given up whose time limit comes again and again while it gets somewhere."""
    output = tmp_path / "out"
    jobs = (
        Job(name="predict-2", task="predict", part=(2, 2)),
        Job(name="preprocess", task="preprocess", configurations=("3d_fullres",)),
    )
    request = PredictRequest(images=(tmp_path,), output=output)
    batch = Batch(work=tmp_path, executor="slurm", jobs=jobs, prediction=request)
    assert count_results(batch, jobs[0]) == "0"
    case = tmp_path / "preprocessed" / "3d_fullres" / "case"
    case.mkdir(parents=True)
    output.mkdir()
    (output / "case.nii.gz").touch()
    before = [count_results(batch, job) for job in jobs]
    record = {"cases": {"a": {"status": "done"}, "b": {"status": "failed"}}}
    (output / "prediction.part-2-of-2.json").write_text(json.dumps(PREDICTION | record))
    (output / "prediction.part-1-of-2.json").write_text(json.dumps(PREDICTION))
    assert before[0] == "0", "label maps that were there before are none of this job"
    os.utime(case, ns=(1, case.stat().st_mtime_ns + 1))
    after = [count_results(batch, job) for job in jobs]
    assert after[0] == "1"
    assert after[1] != before[1]


def test_jobs_of_a_machine_that_has_gone_can_be_cancelled(tmp_path: Path) -> None:
    """Such as a container: its name comes never again."""
    job = Job(name="3d_fullres-fold-0", task="unheard_of")
    folder = BatchFolder.create(Batch(work=tmp_path, executor="local", jobs=(job,), host="gone", pid=1))
    folder.write_state(job.name, JobState(status="running", host="gone", pids=(7,)))
    assert [known.status for known in status(tmp_path)] == ["running"]
    assert cancel(tmp_path) == [job.name]
    assert [known.status for known in status(tmp_path)] == ["cancelled"]
    assert cancel(tmp_path) == []
