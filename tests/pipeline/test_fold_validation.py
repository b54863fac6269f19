"""Validating a fold: what an interruption leaves is used, and nothing of other weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from autoseg import pipeline
from autoseg.core.errors import TrainingError, TrainingInterrupted
from autoseg.pipeline.fold_validation import validate_fold, validation_folder
from autoseg.pipeline.workspace import Workspace
from autoseg.training.config import Budget, TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def workspace(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Workspace:
    """Two folds of three validation cases each, of which one is trained."""
    found = Workspace(root=tmp_path_factory.mktemp("validated") / "work")
    pipeline.plan(tiny_dataset, found.root, n_folds=2)
    train(found, seed=0)
    return found


def train(workspace: Workspace, *, seed: int) -> None:
    config = TrainConfig(budget=Budget(iterations=2), batch_size=1, seed=seed)
    pipeline.train(workspace.root, folds=[0], config=config, device="cpu", validate=False, resume=False)


def interrupt(workspace: Workspace, *, n_cases: int) -> None:
    left = [n_cases]

    def stop() -> bool:
        left[0] -= 1
        return left[0] < 0

    with pytest.raises(TrainingInterrupted, match="goes on with the next case"):
        validate_fold(workspace, "3d_fullres", 0, device="cpu", stop=stop)


def test_it_goes_on_with_the_next_case_and_starts_anew_for_other_weights(workspace: Workspace) -> None:
    folder = validation_folder(workspace, "3d_fullres", 0)
    interrupt(workspace, n_cases=2)
    first, second = sorted(folder.glob("*.nii.gz"))
    for label_map in (first, second):
        os.utime(label_map, (1, 1))
    scores = validate_fold(workspace, "3d_fullres", 0, device="cpu")
    assert len(scores.cases) == 3
    assert first.stat().st_mtime == second.stat().st_mtime == 1
    alone = {case.case: case.mean_dice for case in scores.cases}
    # What was read again is scored as what was predicted just now.
    for label_map in folder.glob("*"):
        label_map.unlink()
    again = validate_fold(workspace, "3d_fullres", 0, device="cpu")
    assert {case.case: case.mean_dice for case in again.cases} == pytest.approx(alone, nan_ok=True)
    train(workspace, seed=1)
    for label_map in folder.glob("*.nii.gz"):
        os.utime(label_map, (1, 1))
    validate_fold(workspace, "3d_fullres", 0, device="cpu")
    assert all(path.stat().st_mtime > 1 for path in folder.glob("*.nii.gz"))


def test_a_case_whose_image_has_changed_is_predicted_again(workspace: Workspace) -> None:
    validate_fold(workspace, "3d_fullres", 0, device="cpu")
    folder = validation_folder(workspace, "3d_fullres", 0)
    for label_map in folder.glob("*.nii.gz"):
        os.utime(label_map, (1, 1))
    changed = next(case for case in workspace.read_dataset().cases if (folder / f"{case.id}.nii.gz").is_file())
    image = changed.image_files[0]
    assert image is not None
    known = image.stat()
    os.utime(image, ns=(known.st_atime_ns, known.st_mtime_ns + 10**9))
    try:
        validate_fold(workspace, "3d_fullres", 0, device="cpu")
    finally:
        os.utime(image, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert all(path.stat().st_mtime > 1 for path in folder.glob("*.nii.gz"))


def test_a_case_that_needs_too_much_memory_is_named(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoseg.inference.predictor.machine_memory_gib", lambda: 1e-5)
    for label_map in validation_folder(workspace, "3d_fullres", 0).glob("*"):
        label_map.unlink()
    text = r"phantom_00\d: cannot be validated: needs about .* of memory, .*; a machine with more of it goes on"
    with pytest.raises(TrainingError, match=text):
        validate_fold(workspace, "3d_fullres", 0, device="cpu")
