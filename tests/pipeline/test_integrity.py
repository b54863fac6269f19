"""What is damaged on disk, made by a newer autoseg, or in use by another process: found, mended or named."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

import autoseg
from autoseg.cli import app
from autoseg.core.errors import AutosegError, TrainingError, WorkspaceError
from autoseg.core.locks import locked
from autoseg.core.serialize import read_json, write_json
from autoseg.core.versions import FOLDER_FORMAT, VERSION_FILE
from autoseg.pipeline import Workspace
from autoseg.pipeline.preprocess import preprocess_cases
from autoseg.training.config import Budget, TrainConfig
from autoseg.training.record import FoldFiles

CONFIGURATION = "3d_fullres"
SHORT = TrainConfig(budget=Budget(iterations=3))


@pytest.fixture(scope="module")
def prepared(tiny_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its cases are preprocessed. Do not change it: copy it."""
    work = tmp_path_factory.mktemp("integrity") / "work"
    shutil.copytree(tiny_work, work)
    preprocess(work)
    return work


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One fold is trained. Do not change it: copy it."""
    work = tmp_path_factory.mktemp("integrity") / "trained"
    shutil.copytree(prepared, work)
    autoseg.train(work, folds=[0], config=SHORT, device="cpu", validate=False)
    return work


@pytest.fixture
def work(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "work"))


def preprocess(work: Path, part: tuple[int, int] = (1, 1)) -> None:
    workspace = Workspace(root=work)
    preprocess_cases(workspace, workspace.read_dataset(), workspace.read_plan(), CONFIGURATION, part=part)


def read_stored(work: Path) -> dict[str, bytes]:
    folder = work / "preprocessed" / CONFIGURATION
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.*"))}


def flip(file: Path, position: int = -20) -> Path:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    return file


def damage_cases(work: Path) -> list[Path]:
    """A byte in one case, an end that is missing in the next, a file in the next, and a record in the last."""
    folders = sorted((work / "preprocessed" / CONFIGURATION).iterdir())
    damaged = [flip(folders[0] / "image.npy"), folders[1] / "label.npy", folders[2] / "foreground.npy"]
    os.truncate(damaged[1], 200)
    damaged[2].unlink()
    return [*damaged, flip(folders[3] / "case.json", 300)]


# -- preprocessed cases ------------------------------------------------------------------------------------------------


def test_training_makes_damaged_cases_again_and_names_them(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = read_stored(work)
    damaged = damage_cases(work)
    with caplog.at_level(logging.INFO):
        autoseg.train(work, folds=[0], config=SHORT, device="cpu", validate=False)
    (warning,) = [text for text in caplog.messages if "damaged" in text]
    assert warning.startswith("4 preprocessed cases are damaged, and made again from the scans: ")
    assert all(str(file) in warning for file in damaged)
    assert any("preprocessed 4 cases" in text and "2 were there already" in text for text in caplog.messages)
    assert read_stored(work) == before


def test_planning_again_makes_damaged_cases_again(
    tiny_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    autoseg.plan(tiny_dataset, tmp_path / "work")
    before = read_stored(tmp_path / "work")
    damage_cases(tmp_path / "work")
    with caplog.at_level(logging.WARNING):
        autoseg.plan(tiny_dataset, tmp_path / "work")
    assert "4 preprocessed cases are damaged, and made again from the scans" in caplog.text
    assert read_stored(tmp_path / "work") == before


def test_a_damaged_case_whose_scans_have_gone_is_named_with_them(tiny_dataset: Path, tmp_path: Path) -> None:
    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    autoseg.plan(data, tmp_path / "work")
    damaged = damage_cases(tmp_path / "work")[1]
    scan = next((data / "imagesTr").glob(f"{damaged.parent.name}*"))
    scan.unlink()
    with pytest.raises(WorkspaceError) as raised:
        autoseg.train(tmp_path / "work", folds=[0], config=SHORT, device="cpu")
    assert str(raised.value).startswith(f"{damaged}: is damaged, and cannot be made again. {scan}: the file has gone")


# -- weights and checkpoints -------------------------------------------------------------------------------------------


def test_damaged_weights_are_named_and_made_again_from_the_checkpoint(
    trained: Path, tiny_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = shutil.copytree(trained, tmp_path / "work")
    files = FoldFiles(folder=work / "models" / CONFIGURATION / "fold_0")
    before = files.weights.read_bytes()
    flip(files.weights)
    message = (
        r"weights\.safetensors: the file is damaged .* the same 'autoseg train' makes it again from the checkpoint"
    )
    with pytest.raises(TrainingError, match=message):
        autoseg.predict(tiny_dataset / "imagesTs", tmp_path / "out", work, device="cpu")
    with pytest.raises(TrainingError, match=message):
        autoseg.export(work, tmp_path / "model.autoseg")
    with caplog.at_level(logging.WARNING):
        autoseg.train(work, folds=[0], config=SHORT, device="cpu", validate=False)
    assert "they are made again from the checkpoint" in caplog.text
    assert files.weights.read_bytes() == before


def test_a_damaged_checkpoint_does_not_keep_anybody_from_predicting(
    trained: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    work = shutil.copytree(trained, tmp_path / "work")
    checkpoint = flip(FoldFiles(folder=work / "models" / CONFIGURATION / "fold_0").checkpoint)
    image = sorted((tiny_dataset / "imagesTs").iterdir())[0]
    assert len(autoseg.predict(image, tmp_path / "out", work, device="cpu")) == 1
    with pytest.raises(TrainingError, match=rf"{checkpoint}: the file is damaged .*; the fold is trained and can be"):
        autoseg.train(work, folds=[0], config=SHORT, device="cpu", validate=False)


def test_models_tell_the_environment_that_they_were_trained_in(trained: Path, tmp_path: Path) -> None:
    record = read_json(FoldFiles(folder=trained / "models" / CONFIGURATION / "fold_0").training)
    environment = record["environment"]
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["numpy"] == __import__("numpy").__version__
    assert {"platform", "scipy", "nibabel", "SimpleITK", "monai", "safetensors"} <= environment.keys()
    file = autoseg.export(trained, tmp_path / "model.autoseg")
    with zipfile.ZipFile(file) as archive:
        assert json.loads(archive.read("fold_0/training.json"))["environment"] == environment


# -- other versions ----------------------------------------------------------------------------------------------------

NEWER = {"format": FOLDER_FORMAT + 1, "autoseg": "99.1", "more": True}


@pytest.mark.parametrize("command", ["plan", "train", "predict", "select", "report", "status", "export", "check"])
def test_a_work_folder_from_a_newer_autoseg_is_left_alone(
    tiny_work: Path, tiny_dataset: Path, tmp_path: Path, command: str
) -> None:
    work = shutil.copytree(tiny_work, tmp_path / "work")
    write_json(work / VERSION_FILE, NEWER)
    # What this version would take for damaged, and make anew.
    write_json(work / "dataset.json", {"name": "new", "kinds": []})
    before = {file: file.read_bytes() for file in work.rglob("*") if file.is_file()}
    arguments = {
        "plan": [str(tiny_dataset)],
        "check": [str(tiny_dataset)],
        "predict": [str(tiny_dataset / "imagesTs"), str(tmp_path / "out")],
    }
    result = CliRunner().invoke(app, [command, *arguments.get(command, []), "-w", str(work)])
    assert isinstance(result.exception, AutosegError), result.output
    message = str(result.exception)
    assert str(work / VERSION_FILE) in message
    assert "was made by a newer autoseg, 99.1" in message
    assert "update autoseg, or name another one" in message
    assert {file: file.read_bytes() for file in work.rglob("*") if file.is_file()} == before
    assert not (tmp_path / "out").exists()


def test_a_model_from_a_newer_autoseg_is_named(trained: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    work = shutil.copytree(trained, tmp_path / "work")
    model = work / "models" / CONFIGURATION
    assert read_json(model / VERSION_FILE) == read_json(work / VERSION_FILE)
    write_json(model / VERSION_FILE, NEWER)
    message = r"autoseg\.json: the folder was made by a newer autoseg, 99\.1 .* name another one"
    with pytest.raises(WorkspaceError, match=message):
        autoseg.predict(tiny_dataset / "imagesTs", tmp_path / "out", model=model, device="cpu")
    with pytest.raises(WorkspaceError, match=message):
        autoseg.train(work, folds=[1], config=SHORT, device="cpu")
    assert not (model / "fold_1" / "training.json").exists()


def test_a_file_that_another_version_has_written_otherwise_is_told_with_that_version(
    tiny_work: Path, tmp_path: Path
) -> None:
    work = shutil.copytree(tiny_work, tmp_path / "work")
    write_json(work / VERSION_FILE, {"format": FOLDER_FORMAT, "autoseg": "0.0.1"})
    write_json(work / "splits.json", {"parts": 5})
    with pytest.raises(AutosegError, match=r"splits\.json.*unknown key 'parts'.*written by autoseg 0\.0\.1; this is "):
        autoseg.train(work, folds=[0], config=SHORT, device="cpu")


# -- two processes -----------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from autoseg.core.locks import locked
with locked(Path(sys.argv[1]), waiting_for=""):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_planning_waits_for_another_process_that_plans(
    tiny_dataset: Path, tiny_work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = shutil.copytree(tiny_work, tmp_path / "work")
    command = [sys.executable, "-c", HOLD, str(work / ".planning.lock")]
    caplog.set_level(logging.INFO)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        before = (work / "plan.json").read_bytes()
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(autoseg.plan, tiny_dataset, work, preprocess="none")
            while not any("waiting for another process, which plans in" in text for text in caplog.messages):
                assert not done.done()
                time.sleep(0.05)
            assert (work / "plan.json").read_bytes() == before
            other.communicate("\n", timeout=60)
            assert done.result().recommended == CONFIGURATION


def test_processes_that_preprocess_at_once_do_it_once(tiny_work: Path, tmp_path: Path) -> None:
    work = shutil.copytree(tiny_work, tmp_path / "work")
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(preprocess, work, part) for part in ((1, 1), (1, 2), (2, 2), (1, 1))]
        for one in done:
            one.result()
    stored = read_stored(work)
    assert len(stored) == 6 * 5
    preprocess(work)
    assert read_stored(work) == stored
    assert not list((work / "preprocessed" / CONFIGURATION).glob(".*"))


def test_parts_go_side_by_side_and_wait_for_whoever_does_all(tmp_path: Path) -> None:
    workspace = Workspace(root=tmp_path)

    def enter(part: tuple[int, int], entered: threading.Event, leave: threading.Event) -> None:
        with workspace.preprocessing("grid", part):
            entered.set()
            leave.wait(60)

    with ThreadPoolExecutor(8) as pool:

        def begin(part: tuple[int, int]) -> tuple[threading.Event, Callable[[], None]]:
            entered, leave = threading.Event(), threading.Event()
            running: Future[None] = pool.submit(enter, part, entered, leave)

            def end() -> None:
                leave.set()
                running.result()

            return entered, end

        first, end_first = begin((1, 2))
        second, end_second = begin((2, 2))
        assert first.wait(60)
        assert second.wait(60), "parts go side by side"
        same, end_same = begin((1, 2))
        assert not same.wait(0.2), "the same part waits"
        end_first()
        assert same.wait(60)
        of_three, end_of_three = begin((3, 3))
        assert not of_three.wait(0.2), "parts of another number hold other cases"
        whole, end_whole = begin((1, 1))
        end_same()
        assert not whole.wait(0.2)
        end_second()
        end_of_three()
        assert whole.wait(60)
        late, end_late = begin((1, 2))
        assert not late.wait(0.2), "whoever does all keeps parts from beginning"
        end_whole()
        assert late.wait(60)
        end_late()


def test_a_fold_that_another_process_trains_is_not_deleted(trained: Path, tmp_path: Path) -> None:
    work = shutil.copytree(trained, tmp_path / "work")
    files = FoldFiles(folder=work / "models" / CONFIGURATION / "fold_0")
    with (
        ThreadPoolExecutor(1) as pool,
        locked(files.lock, waiting_for=""),
        pytest.raises(
            TrainingError, match=r"fold_0: another process trains it; wait for it or end it, then begin anew"
        ),
    ):
        pool.submit(autoseg.train, work, folds=[0], config=SHORT, device="cpu", resume=False).result()
    assert files.checkpoint.exists()
    assert files.weights.exists()


def test_predictions_into_one_folder_at_once(trained: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    def predict(output: Path) -> dict[str, bytes]:
        files = autoseg.predict(tiny_dataset / "imagesTs", output, trained, device="cpu", speed="fast")
        return {file.name: file.read_bytes() for file in files}

    expected = predict(tmp_path / "alone")
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(predict, [tmp_path / "shared"] * 3)) == [expected] * 3
    assert sorted(file.name for file in (tmp_path / "shared").iterdir()) == sorted([*expected, "prediction.json"])
    known = read_json(tmp_path / "shared" / "prediction.json")["cases"]
    assert [case["status"] for case in known.values()] == ["done", "done"]


# -- clocks ------------------------------------------------------------------------------------------------------------

YEAR_S = 365 * 24 * 3600.0


@pytest.mark.parametrize("jump_s", [-YEAR_S, YEAR_S])
def test_going_on_with_a_request_does_not_depend_on_clocks(
    trained: Path, tiny_dataset: Path, tmp_path: Path, jump_s: float
) -> None:
    """Its own label maps count, and those from before do not, however the clock has jumped in between."""
    model, images = trained / "models" / CONFIGURATION, tiny_dataset / "imagesTs"

    def predict(request: str) -> dict[Path, int]:
        files = autoseg.predict(
            images, tmp_path, model=model, device="cpu", speed="fast", overwrite=False, request=request
        )
        return {file: file.stat().st_mtime_ns for file in files}

    def move_clock(files: dict[Path, int]) -> dict[Path, int]:
        for file in files:
            at_s = file.stat().st_mtime + jump_s
            os.utime(file, (at_s, at_s))
        return {file: file.stat().st_mtime_ns for file in files}

    before = move_clock(predict("first"))
    assert predict("first") == before
    made = move_clock(predict("second"))
    assert made.keys() == before.keys()
    assert all(made[file] != before[file] for file in made)
    lost = next(iter(made))
    lost.unlink()
    again = predict("second")
    assert {file for file in again if again[file] != made[file]} == {lost}
