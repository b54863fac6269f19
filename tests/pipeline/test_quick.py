"""A training with time for small patches only takes a coarser grid, and everything goes on with it."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import autoseg
from autoseg import pipeline
from autoseg.core.serialize import write_json
from autoseg.data.io import read_image, read_label
from autoseg.data.phantom import write_phantom_dataset
from autoseg.pipeline import Workspace, configuration_for_time
from autoseg.pipeline.prepare import _stages_to_preprocess
from autoseg.pipeline.settle import RECIPE_FILE, SettledTraining
from autoseg.planning.choices import Choices
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.training.adapt import choose_training, with_requests
from autoseg.training.config import Budget, TrainConfig
from autoseg.training.ladder import resize

SHORT = TrainConfig(budget=Budget(max_time_s=2.0))
CHOICES = Choices(gpu_memory_gib=1.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large volumes, planned for a small GPU."""
    folder = tmp_path_factory.mktemp("quick")
    data = write_phantom_dataset(folder / "data", n_train=4, n_test=1, coarseness=0.5)
    autoseg.plan(data, folder / "work", choices=CHOICES, n_folds=2, preprocess="none")
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
    # Planning again leaves it where it was, so that what it has trained stays of use.
    assert autoseg.plan(world / "data", work, choices=CHOICES, n_folds=2, preprocess="none") == plan
    assert not list(work.glob("plan.previous*"))


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
    monkeypatch.setattr("autoseg.pipeline.quick.choose_network", None)
    chosen = configuration_for_time(Workspace(root=tmp_path / "work"), SHORT, device="cpu")
    assert chosen == plan.configuration(plan.recommended)


def test_a_first_stage_alone_shows_the_smallest_structures(planned: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = pipeline.force_cascade(planned.root)
    write_json(planned.plan_file, dataclasses.replace(plan, recommended="3d_cascade_fullres").signed())
    config = TrainConfig(budget=Budget(max_time_s=2.0), network="planned")
    assert configuration_for_time(planned, config, device="cpu").name == "3d_lowres"
    voxel_ml = prod(plan.configuration("3d_lowres").spacing_mm) / 1000
    monkeypatch.setattr("autoseg.pipeline.configurations.largest_voxel_ml", lambda _: 0.9 * voxel_ml)
    assert configuration_for_time(planned, config, device="cpu").name == "3d_fullres"
    stages = {name: plan.configuration(name) for name in ("3d_lowres", "3d_cascade_fullres")}
    of_stages = dataclasses.replace(plan, configurations=stages, recommended="3d_cascade_fullres")
    write_json(planned.plan_file, of_stages.signed())
    assert configuration_for_time(planned, config, device="cpu").name == "3d_lowres", "there is nothing finer"


class Timed:
    """What the budget has time for, as if it had been measured; counts how often that is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch_scale, self.n_asked = 0.4, 0
        monkeypatch.setattr("autoseg.pipeline.quick.choose_network", self)

    def __call__(self, plan: Plan, configuration: ConfigurationPlan, *_: object, **__: object) -> tuple[object, float]:
        self.n_asked += 1
        return resize(configuration, "half", self.patch_scale), 1.0


def test_planning_preprocesses_what_is_certainly_trained(
    world: Path, tiny_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preprocessed(name: str) -> set[str]:
        folder = tmp_path / name / "preprocessed"
        return {path.name for path in folder.iterdir() if path.is_dir()} if folder.exists() else set()

    monkeypatch.setattr("autoseg.pipeline.prepare.resolve_device", lambda _: torch.device("cpu"))
    caplog.set_level(logging.INFO)
    plan = autoseg.plan(world / "data", tmp_path / "large", choices=CHOICES, n_folds=2)
    first = plan.configuration(plan.recommended).previous or plan.recommended
    assert preprocessed("large") == set()
    assert f"--configurations {first} preprocesses them now" in caplog.text
    assert "of disk" not in caplog.text
    autoseg.plan(tiny_dataset, tmp_path / "small")
    assert preprocessed("small") == {"3d_fullres"}
    assert "of disk" in caplog.text
    caplog.clear()
    autoseg.plan(tiny_dataset, tmp_path / "small")
    assert "of disk" not in caplog.text, "nothing is missing"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    autoseg.plan(tiny_dataset, tmp_path / "full")
    assert "the disk may get full" in caplog.text
    pipeline.force_cascade(tmp_path / "small")
    plan = Workspace(root=tmp_path / "small").read_plan()
    plan = dataclasses.replace(plan, recommended="3d_cascade_fullres")
    fingerprint = Workspace(root=tmp_path / "small").read_fingerprint()
    assert _stages_to_preprocess(plan, (), fingerprint) == ["3d_fullres"], "its lesions are too small for 3d_lowres"
    known = tuple(dataclasses.replace(case, label_volumes_ml=(), component_volumes_ml=()) for case in fingerprint.cases)
    fingerprint = dataclasses.replace(fingerprint, cases=known)
    assert _stages_to_preprocess(plan, (), fingerprint) == ["3d_lowres"]
    assert _stages_to_preprocess(plan, ("3d_cascade_fullres",), fingerprint) == ["3d_lowres", "3d_cascade_fullres"]
    monkeypatch.setattr("autoseg.pipeline.prepare.resolve_device", lambda _: torch.device("cuda"))
    assert _stages_to_preprocess(plan, (), fingerprint) == ["3d_lowres", "3d_cascade_fullres"]


@pytest.fixture
def planned(world: Path, tmp_path: Path) -> Workspace:
    """Without a coarser grid yet."""
    autoseg.plan(world / "data", tmp_path / "work", choices=CHOICES, n_folds=2, preprocess="none")
    return Workspace(root=tmp_path / "work")


def begin(model: Path, plan: Plan, budget: Budget, **asked: Any) -> None:
    """As if its first fold had been trained for a while, with this budget or what `with_requests` makes of `asked`."""
    (model / "fold_0").mkdir(parents=True)
    (model / "fold_0" / "checkpoint.safetensors").touch()
    config = TrainConfig(budget=budget, network="planned", mirror=False)
    choices, _ = choose_training(plan, plan.configuration(model.name), config, n_cases=2, device=torch.device("cpu"))
    if asked:
        choices = with_requests(choices, TrainConfig(), n_cases=2, **asked)
    write_json(model / RECIPE_FILE, SettledTraining(planned="", request="", choices=choices))


def test_another_grid_does_not_take_the_place_of_one_that_others_may_work_on(
    planned: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = Timed(monkeypatch)
    first = configuration_for_time(planned, SHORT, device="cpu")
    timed.patch_scale = 0.5
    assert configuration_for_time(planned, SHORT, device="cpu") == first
    with monkeypatch.context() as others:
        others.setattr("autoseg.pipeline.quick.is_free", lambda lock: "fold_1" not in lock.parts)
        assert configuration_for_time(planned, SHORT, device="cpu", folds=(0, 1), resume=False) == first
    anew = configuration_for_time(planned, SHORT, device="cpu", folds=(0, 1), resume=False)
    assert anew.name == "3d_quick"
    assert prod(anew.spacing_mm) < prod(first.spacing_mm)
    begin(planned.model("3d_quick"), planned.read_plan(), Budget(max_time_s=99.0))
    timed.patch_scale = 0.4
    assert configuration_for_time(planned, SHORT, device="cpu", folds=(1,), resume=False) == anew
    assert prod(configuration_for_time(planned, SHORT, device="cpu", folds=(0,), resume=False).spacing_mm) == (
        pytest.approx(prod(first.spacing_mm))
    )


def test_what_has_begun_goes_on_without_a_look_with_the_same_budget_only(
    planned: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    timed = Timed(monkeypatch)
    short, hour = Budget(max_time_s=99.0), TrainConfig()
    quick = configuration_for_time(planned, TrainConfig(budget=short), device="cpu")
    begin(planned.model(quick.name), planned.read_plan(), short)
    assert configuration_for_time(planned, TrainConfig(budget=short), device="cpu") == quick
    assert timed.n_asked == 1
    # The hour that a CPU has without a budget is another one.
    timed.patch_scale = 1.0
    caplog.set_level(logging.INFO)
    assert configuration_for_time(planned, hour, device="cpu").name == planned.read_plan().recommended
    assert timed.n_asked == 2
    assert "-c 3d_quick goes on with what is there" in caplog.text


def test_a_training_of_a_gpu_goes_on_with_a_cpu(planned: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    timed, plan = Timed(monkeypatch), planned.read_plan()
    begin(planned.model(plan.recommended), plan, Budget(iterations=10), on_cpu=False)
    configuration = plan.configuration(plan.recommended)
    assert configuration_for_time(planned, TrainConfig(), device="cpu") == configuration
    assert timed.n_asked == 0
