"""A training with time for small patches only takes a coarser grid, and everything goes on with it."""

from __future__ import annotations

import json
import logging
from math import prod
from pathlib import Path

import pytest

import autoseg
from autoseg.data.io import read_image, read_label
from autoseg.data.phantom import write_phantom_dataset
from autoseg.pipeline import Workspace, configuration_for_time
from autoseg.planning.choices import Choices
from autoseg.training.config import Budget, TrainConfig

SHORT = TrainConfig(budget=Budget(max_time_s=2.0))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large volumes, planned for a small GPU."""
    folder = tmp_path_factory.mktemp("quick")
    data = write_phantom_dataset(folder / "data", n_train=4, n_test=1, coarseness=0.5)
    autoseg.plan(data, folder / "work", choices=Choices(gpu_memory_gib=1.0), n_folds=2, preprocess="none")
    return folder


def test_a_short_training_takes_a_coarser_grid_and_predicts_on_that_of_the_scan(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work, workspace = world / "work", Workspace(root=world / "work")
    before = workspace.read_plan()
    caplog.set_level(logging.INFO)
    scores = autoseg.train(work, config=SHORT, device="cpu")
    assert sorted(scores) == [0, 1]
    assert "3d_quick is trained" in caplog.text
    plan = workspace.read_plan()
    quick, full = plan.configuration("3d_quick"), plan.configuration(before.recommended)
    assert set(plan.configurations) == {*before.configurations, "3d_quick"}
    assert (plan.recommended, plan.is_edited) == (before.recommended, False)
    assert prod(quick.spacing_mm) > 2 * prod(full.spacing_mm)
    assert sorted(path.name for path in (work / "models").iterdir() if path.is_dir()) == ["3d_quick"]
    # What comes next takes it as any other.
    assert json.loads((work / "selection.json").read_text())["chosen"] == "3d_quick"
    (file,) = autoseg.predict(world / "data" / "imagesTs", tmp_path / "out", work, device="cpu", speed="fast")
    image, geometry = read_image(next((world / "data" / "imagesTs").iterdir()))
    label, of_label = read_label(file)
    assert (label.shape, of_label.spacing_mm) == (image.shape[1:], geometry.spacing_mm)
    assert autoseg.report(work).is_file()
    # The same command goes on with it, without looking again.
    caplog.clear()
    assert configuration_for_time(workspace, SHORT, device="cpu").name == "3d_quick"
    assert workspace.read_plan() == plan
    assert "is trained, at" not in caplog.text


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(budget=Budget(iterations=10)),
        TrainConfig(budget=Budget(max_time_s=2.0), network="planned"),
        TrainConfig(budget=Budget(max_time_s=2.0), recipe="published"),
    ],
    ids=["steps", "planned", "published"],
)
def test_what_is_to_be_trained_as_planned_stays_on_its_grid(world: Path, config: TrainConfig) -> None:
    workspace = Workspace(root=world / "work")
    assert configuration_for_time(workspace, config, device="cpu").name == workspace.read_plan().recommended


def test_a_spacing_that_the_user_has_set_is_kept(world: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    choices = Choices(gpu_memory_gib=1.0, spacing_mm=(3.5, 2.0, 2.0))
    plan = autoseg.plan(world / "data", work, choices=choices, n_folds=2, preprocess="none")
    assert configuration_for_time(Workspace(root=work), SHORT, device="cpu").name == plan.recommended


def test_where_small_patches_show_enough_nothing_is_timed(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = autoseg.plan(tiny_dataset, tmp_path / "work", preprocess="none")
    monkeypatch.setattr("autoseg.training.adapt.choose_training", None)
    chosen = configuration_for_time(Workspace(root=tmp_path / "work"), SHORT, device="cpu")
    assert chosen == plan.configuration(plan.recommended)
