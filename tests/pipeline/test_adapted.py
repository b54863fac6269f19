"""A network that was adapted to a short budget, from training to the file that is given away."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import autoseg
from autoseg.core.serialize import read_json
from autoseg.data.io import read_label
from autoseg.inference.model import read_model
from autoseg.training.config import Budget, TrainConfig
from autoseg.training.record import TrainingRecord

SHORT = TrainConfig(budget=Budget(max_time_s=0.5))


@pytest.fixture(scope="module")
def work(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapted") / "work"
    autoseg.plan(tiny_dataset, folder)
    autoseg.train(folder, folds=[0], config=SHORT, device="cpu")
    return folder


def test_the_model_has_the_network_that_was_trained_and_the_work_folder_the_planned_one(work: Path) -> None:
    planned = read_json(work / "plan.json")["configurations"]["3d_fullres"]["network"]["features"]
    trained = read_model(work / "models" / "3d_fullres").configuration.network.features
    assert [2 * width for width in trained] == planned
    record = read_json(work / "models" / "3d_fullres" / "fold_0" / "training.json", TrainingRecord)
    assert record.choices is not None
    assert record.choices.configuration.network.features == trained
    assert record.choices.budget == SHORT.budget


def test_it_predicts_the_same_from_its_folder_and_from_a_file(work: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    image = sorted((tiny_dataset / "imagesTs").iterdir())[0]
    (first,) = autoseg.predict(image, tmp_path / "a", work, device="cpu")
    file = autoseg.export(work, tmp_path / "model.autoseg")
    (second,) = autoseg.predict(image, tmp_path / "b", model=file, device="cpu")
    np.testing.assert_array_equal(read_label(first)[0], read_label(second)[0])


def test_the_report_says_what_was_chosen_and_why(work: Path) -> None:
    page = autoseg.report(work).read_text()
    assert "Recipe fast." in page
    assert "there is time for about" in page
    assert "to gain by it takes" in page


def test_the_same_command_again_changes_nothing(work: Path) -> None:
    weights = work / "models" / "3d_fullres" / "fold_0" / "weights.safetensors"
    before = weights.read_bytes()
    autoseg.train(work, folds=[0], config=SHORT, device="cpu")
    assert weights.read_bytes() == before
