"""Training folds: what follows a training may fail, the training goes on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from autoseg import pipeline
from autoseg.training.config import Budget, TrainConfig
from autoseg.training.record import EpochFigures, FoldFiles, ValidationSlice

pytestmark = pytest.mark.usefixtures("one_thread")

SIX = TrainConfig(budget=Budget(iterations=6, iterations_per_epoch=2), batch_size=1, precision="float32")


class Unreachable:
    """A tracker of somebody's own, whose server is away from the second epoch on."""

    n_told = 0

    def __init__(self, folder: Path, labels: Sequence[str]) -> None:
        assert folder.name == "fold_0"
        assert labels

    def log(self, epochs: Sequence[EpochFigures], slices: Sequence[ValidationSlice]) -> None:
        Unreachable.n_told += 1
        if len(epochs) == 2:
            raise ConnectionError("no route to the server")

    def close(self) -> None:
        raise ConnectionError("nor at the end")


def test_a_tracker_or_curves_that_fail_end_no_training(
    tiny_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def draw(*_: object, **__: object) -> None:
        raise OSError("no such font")

    work = tmp_path / "work"
    shutil.copytree(tiny_work, work)
    monkeypatch.setattr("autoseg.reporting.figures.draw_curves", draw)
    monkeypatch.setattr("autoseg.reporting.trackers.TRACKERS", {"mine": Unreachable})
    pipeline.train(work, folds=[0], config=SIX, device="cpu", validate=False, track_with=["mine"])
    assert FoldFiles.of(work / "models" / "3d_fullres", 0).weights.exists()
    assert Unreachable.n_told == 2, "it is not called again once it has failed"
    for told in ("mine: the training goes on without: no route", "mine: the training goes on without: nor at", "font"):
        assert told in caplog.text
