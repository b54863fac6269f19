"""A training that was stopped is predicted with and given away, from Python."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import autoseg
from autoseg.core.errors import PredictionError, TrainingError, TrainingInterrupted
from autoseg.core.serialize import read_json, write_json
from autoseg.data.io import read_label
from autoseg.training.config import Budget, TrainConfig

SIX = TrainConfig(budget=Budget(iterations=6))


def after(n_steps: int) -> Callable[[], bool]:
    """True at the n-th time it is asked, which is after every step."""
    asked = [0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] >= n_steps

    return stop


@pytest.fixture(scope="module")
def work(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fold 0 was stopped after three of six steps."""
    folder = tmp_path_factory.mktemp("share") / "work"
    autoseg.plan(tiny_dataset, folder)
    with pytest.raises(TrainingInterrupted, match="stopped at step 3"):
        autoseg.train(folder, folds=[0], config=SIX, device="cpu", validate=False, stop=after(3))
    return folder


def test_a_stopped_training_predicts(
    work: Path, tiny_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = sorted((tiny_dataset / "imagesTs").iterdir())[0]
    with caplog.at_level(logging.WARNING):
        (first,) = autoseg.predict(image, tmp_path / "a", work, device="cpu")
    assert caplog.text.count("fold 0 at step 3 (epoch 0)") == 1
    with pytest.raises(PredictionError, match="no fold is trained to its end"):
        autoseg.export(work, tmp_path / "model.autoseg")
    file = autoseg.export(work, tmp_path / "model.autoseg", folds=[0])
    (second,) = autoseg.predict(image, tmp_path / "b", model=file, device="cpu")
    np.testing.assert_array_equal(read_label(first)[0], read_label(second)[0])
    records = [json.loads((tmp_path / folder / "prediction.json").read_text()) for folder in "ab"]
    assert records[0]["model"] == records[1]["model"]


def test_the_file_is_put_beside_the_model(work: Path) -> None:
    model = work / "models" / "3d_fullres"
    assert autoseg.export(work, folds=[0]) == work.resolve() / "models" / "3d_fullres.autoseg"
    assert autoseg.export(model, folds=[0]) == work.resolve() / "models" / "3d_fullres.autoseg"


def test_no_plan_is_put_beside_a_checkpoint_of_another(work: Path) -> None:
    """It would be taken for the plan of those weights."""
    before = read_json(work / "plan.json")
    try:
        write_json(work / "plan.json", {**before, "axis_order": [1, 0, 2]})
        with pytest.raises(TrainingError, match="holds folds that another plan has trained"):
            autoseg.train(work, folds=[1], config=SIX, device="cpu")
    finally:
        write_json(work / "plan.json", before)
