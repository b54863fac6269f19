"""Folders of real files, scored from end to end."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from autoseg.core.errors import DatasetError
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import read_json, write_json
from autoseg.evaluation.evaluate import Evaluation, evaluate_folders

AFFINE = np.diag([0.8, 0.9, 2.5, 1.0])


def save(file: Path, label: NDArray, affine: NDArray = AFFINE) -> Path:
    """Writes (X, Y, Z)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(label, affine)
    nibabel.save(image, file)
    return file


def make_label(seed: int, *, shape: tuple[int, int, int] = (6, 7, 8), values: tuple[int, ...] = (0, 3, 117)) -> NDArray:
    return np.random.default_rng(seed).choice(np.array(values, np.uint8), shape)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three cases with a prediction each."""
    for seed, case in enumerate(("a", "b", "c")):
        save(tmp_path / "reference" / f"{case}.nii.gz", make_label(seed))
        save(tmp_path / "prediction" / f"{case}.nii.gz", make_label(seed + 10))
    (tmp_path / "prediction" / "prediction.json").write_text("{}")
    (tmp_path / "prediction" / ".a.nii.gz").write_text("half a file")
    return tmp_path / "prediction", tmp_path / "reference"


def dice_by_hand(first: NDArray, second: NDArray, value: int) -> float:
    return float(2 * ((first == value) & (second == value)).sum() / ((first == value).sum() + (second == value).sum()))


def test_scores_equal_those_by_hand(folders: tuple[Path, Path], tmp_path: Path) -> None:
    evaluation = evaluate_folders(*folders)
    assert [case.case for case in evaluation.cases] == ["a", "b", "c"]
    assert list(evaluation.label_dice) == ["label 3", "label 117"]
    expected = np.array(
        [[dice_by_hand(make_label(seed + 10), make_label(seed), value) for value in (3, 117)] for seed in range(3)]
    )
    np.testing.assert_allclose([[label.dice for label in case.labels] for case in evaluation.cases], expected)
    np.testing.assert_allclose([case.mean_dice for case in evaluation.cases], expected.mean(axis=1))
    np.testing.assert_allclose(list(evaluation.label_dice.values()), expected.mean(axis=0))
    assert evaluation.mean_dice == pytest.approx(expected.mean())
    assert evaluation.not_scored == ()
    write_json(tmp_path / "evaluation.json", evaluation)
    assert read_json(tmp_path / "evaluation.json", Evaluation) == evaluation


def test_named_labels_and_a_label_that_no_case_has(folders: tuple[Path, Path]) -> None:
    spec = LabelSpec(names=("organ", "tumour"), values=(117, 9))
    evaluation = evaluate_folders(*folders, labels=spec)
    assert list(evaluation.label_dice) == ["organ", "tumour"]
    assert math.isnan(evaluation.label_dice["tumour"])
    assert evaluation.mean_dice == evaluation.label_dice["organ"]
    assert {label.status for case in evaluation.cases for label in case.labels} == {"ok", "in neither"}


def test_same_map_in_another_orientation_scores_one(tmp_path: Path) -> None:
    label = make_label(0)
    save(tmp_path / "reference" / "a.nii.gz", label)
    back = np.diag([-1.0, 1.0, -1.0, 1.0])
    back[:3, 3] = (label.shape[0] - 1, 0, label.shape[2] - 1)
    save(tmp_path / "prediction" / "a.nii.gz", label[::-1, :, ::-1].astype(np.float32), AFFINE @ back)
    evaluation = evaluate_folders(tmp_path / "prediction", tmp_path / "reference")
    assert evaluation.mean_dice == 1


def test_missing_and_surplus_predictions(folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    prediction, reference = folders
    (prediction / "b.nii.gz").unlink()
    (reference / "c.nii.gz").unlink()
    with caplog.at_level(logging.WARNING):
        evaluation = evaluate_folders(prediction, reference)
    assert [case.case for case in evaluation.cases] == ["a"]
    assert evaluation.not_scored == ("b",)
    assert "1 predictions have no reference and are not scored: c" in caplog.text


def test_all_cases_that_cannot_be_compared_are_in_one_error(folders: tuple[Path, Path]) -> None:
    prediction, reference = folders
    save(prediction / "a.nii.gz", make_label(0, shape=(6, 7, 9)))
    moved = AFFINE.copy()
    moved[0, 3] = 5
    save(prediction / "b.nii.gz", make_label(0), moved)
    (prediction / "c.nii.gz").write_bytes(b"not an image")
    save(prediction / "d.nii.gz", make_label(0).astype(np.float32) + 0.5)
    save(reference / "d.nii.gz", make_label(0))
    save(prediction / "e.nii.gz", make_label(0).astype(np.int16) - 1)
    save(reference / "e.nii.gz", make_label(0))
    for labels in (None, LabelSpec(names=("organ",), values=(117,))):
        with pytest.raises(DatasetError) as caught:
            evaluate_folders(prediction, reference, labels=labels)
        message = str(caught.value)
        assert "5 cases cannot be scored" in message
        assert "a: found the shape (9, 7, 6) (z, y, x), expected (8, 7, 6)" in message
        assert "b: found an affine that puts a corner" in message
        for words in ("c.nii.gz: cannot be read", "d.nii.gz: found", "label map with negative values (1)\n  - e"):
            assert words in message
        assert message.count("What to do") >= 2


def test_nothing_in_common(folders: tuple[Path, Path], tmp_path: Path) -> None:
    save(tmp_path / "other" / "x.nii.gz", make_label(0))
    with pytest.raises(DatasetError, match=r"no file name in common: found a, b, c and x"):
        evaluate_folders(folders[0], tmp_path / "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"found no label map and a, b, c"):
        evaluate_folders(tmp_path / "empty", folders[1])
    with pytest.raises(DatasetError, match="nowhere: no such file or folder"):
        evaluate_folders(tmp_path / "nowhere", folders[1])


def test_folders_of_one_file_each_need_the_same_name(tmp_path: Path) -> None:
    first = save(tmp_path / "prediction" / "a.nii.gz", make_label(0))
    second = save(tmp_path / "reference" / "b.nii.gz", make_label(1))
    with pytest.raises(DatasetError, match="no file name in common"):
        evaluate_folders(first.parent, second.parent)
    # Two files that are named one by one are meant for each other.
    evaluation = evaluate_folders(first, second)
    assert [case.case for case in evaluation.cases] == ["a"]
    assert evaluation.cases[0].labels[0].dice == pytest.approx(dice_by_hand(make_label(0), make_label(1), 3))


def test_one_file_is_found_in_a_folder(folders: tuple[Path, Path]) -> None:
    evaluation = evaluate_folders(folders[0] / "b.nii.gz", folders[1])
    assert [case.case for case in evaluation.cases] == ["b"]


def test_all_background_is_an_error(tmp_path: Path) -> None:
    for name in ("prediction", "reference"):
        save(tmp_path / name / "a.nii.gz", np.zeros((3, 4, 5), np.uint8))
    with pytest.raises(DatasetError, match="every voxel is background"):
        evaluate_folders(tmp_path / "prediction", tmp_path / "reference")
