"""What the folds of a configuration share is settled once."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import autoseg
from autoseg.core.errors import TrainingError
from autoseg.core.serialize import read_json
from autoseg.pipeline.settle import RECIPE_FILE, discard_folds, settle_training
from autoseg.pipeline.workspace import Workspace
from autoseg.planning.plan import SET_BY_USER, Plan
from autoseg.training.config import Budget, TrainConfig
from autoseg.training.folds import fold_folder, unfinished_folds
from autoseg.training.ladder import resize
from autoseg.training.recipe import RECIPES
from autoseg.training.record import FoldFiles, TrainingChoices

CPU = torch.device("cpu")
SHORT = TrainConfig(budget=Budget(max_time_s=0.1))
HOLD = """
import pathlib, sys, time
from autoseg.core.locks import locked
with locked(pathlib.Path(sys.argv[1]), waiting_for="trains"):
    print("held", flush=True)
    time.sleep(60)
"""
LONG = TrainConfig(budget=Budget(max_time_s=1e6))


@pytest.fixture(scope="module")
def plan(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return autoseg.plan(tiny_dataset, tmp_path_factory.mktemp("settle") / "work", preprocess="none")


def ask(
    model: Path, plan: Plan, config: TrainConfig = SHORT, *, folds: Sequence[int] = (0,), resume: bool = True
) -> tuple[Plan, TrainingChoices, float]:
    configuration = plan.configuration(plan.recommended)
    return settle_training(model, plan, configuration, config, folds=folds, resume=resume, n_cases=4, device=CPU)


def begin(model: Path, fold: int) -> None:
    """As if the fold had been trained for a while."""
    folder = fold_folder(model, fold)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint.safetensors").touch()


def test_the_plan_beside_the_weights_is_the_one_that_is_trained(plan: Plan, tmp_path: Path) -> None:
    adapted, choices, spent_s = ask(tmp_path, plan)
    name = plan.recommended
    assert choices.configuration == adapted.configuration(name) == resize(plan.configuration(name), "half", 0.4)
    assert spent_s > 0
    assert read_json(tmp_path / "plan.json", Plan) == adapted
    assert adapted.recommended == name
    assert not adapted.is_edited
    reasons = {reason.subject: reason.text for reason in adapted.reasons}
    assert reasons.items() >= {reason.subject: reason.text for reason in choices.reasons}.items()
    assert reasons[f"configurations.{name}.patch_size"] == reasons["training.network"]


def test_the_same_request_gets_the_same_without_timing_anything(plan: Plan, tmp_path: Path) -> None:
    first = ask(tmp_path, plan)
    again = ask(tmp_path, plan, dataclasses.replace(SHORT, seed=3), folds=(1,))
    assert again[:2] == first[:2]
    assert again[2] == 0


def test_another_budget_is_settled_anew_while_no_fold_has_begun(plan: Plan, tmp_path: Path) -> None:
    ask(tmp_path, plan)
    adapted, _, _ = ask(tmp_path, plan, TrainConfig(budget=Budget(iterations=5)))
    assert adapted.configurations == plan.configurations


@pytest.mark.parametrize(("folds", "resume"), [((1,), True), ((1,), False), ((0,), True)])
def test_folds_that_stay_keep_their_network(plan: Plan, tmp_path: Path, folds: tuple[int, ...], resume: bool) -> None:
    first = ask(tmp_path, plan)
    begin(tmp_path, 0)
    plan_of_folds, choices, spent_s = ask(tmp_path, plan, LONG, folds=folds, resume=resume)
    assert plan_of_folds.configurations == first[0].configurations
    assert dataclasses.replace(choices, budget=first[1].budget) == first[1]
    assert choices.budget == LONG.budget
    assert spent_s == 0
    assert ask(tmp_path / "other", plan, LONG)[0].configurations != first[0].configurations


def test_a_fold_that_begins_anew_alone_is_settled_anew(plan: Plan, tmp_path: Path) -> None:
    ask(tmp_path, plan)
    begin(tmp_path, 0)
    adapted, _, _ = ask(tmp_path, plan, TrainConfig(budget=Budget(iterations=5)), resume=False)
    assert adapted.configurations == plan.configurations


def test_folds_of_another_recipe_network_or_plan_are_named(plan: Plan, tmp_path: Path) -> None:
    ask(tmp_path, plan)
    begin(tmp_path, 0)
    with pytest.raises(TrainingError, match=r"recipe 'fast', 'published' is wanted; give --recipe fast"):
        ask(tmp_path, plan, TrainConfig(recipe="published"), folds=(1,))
    with pytest.raises(TrainingError, match="smaller network than the planned one"):
        ask(tmp_path, plan, TrainConfig(network="planned"), folds=(1,))
    with pytest.raises(TrainingError, match="another plan"):
        ask(tmp_path, dataclasses.replace(plan, axis_order=(1, 0, 2)), folds=(1,))
    (tmp_path / RECIPE_FILE).write_text("{")
    with pytest.raises(TrainingError, match=r"no recipe\.json that says how"):
        ask(tmp_path, plan, folds=(1,))


def test_folds_that_begin_at_once_share_what_the_first_one_has_chosen(plan: Plan, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        settled = list(pool.map(lambda fold: ask(tmp_path, plan, folds=(fold,)), range(4)))
    assert all(result[:2] == settled[0][:2] for result in settled)
    assert sum(spent_s > 0 for _, _, spent_s in settled) == 1


def test_a_fold_without_a_checkpoint_yet_keeps_its_network(plan: Plan, tmp_path: Path) -> None:
    first, _, _ = ask(tmp_path, plan)
    files = FoldFiles.of(tmp_path, 0)
    assert ask(tmp_path, plan, LONG, folds=(1,))[0].configurations == first.configurations, "it may be loading cases"
    files.begun.unlink()
    FoldFiles.of(tmp_path, 1).begun.unlink()
    files.training.touch()
    assert ask(tmp_path, plan, LONG, folds=(1,))[0].configurations == first.configurations
    FoldFiles.of(tmp_path, 1).begun.unlink()
    assert ask(tmp_path, plan, LONG, folds=(0,))[0].configurations == plan.configurations


def test_a_fold_that_never_came_to_train_is_forgotten_where_it_begins_anew(plan: Plan, tmp_path: Path) -> None:
    model = Workspace(root=tmp_path).model(plan.recommended)
    for fold in (0, 1):
        ask(model, plan, folds=(fold,))
    discard_folds([model], [0, 1])
    published, _, _ = ask(model, plan, TrainConfig(recipe="published"))
    assert published.configuration(plan.recommended) == plan.configuration(plan.recommended)


def test_training_anew_deletes_all_folds_that_are_asked_for_at_once(plan: Plan, tmp_path: Path) -> None:
    """Or else folds of two networks would be averaged, if the training is stopped in between."""
    ask(tmp_path, plan)
    for fold in range(3):
        begin(tmp_path, fold)
    with pytest.raises(TrainingError, match="recipe"):
        ask(tmp_path, plan, TrainConfig(recipe="published"), folds=(0, 1), resume=False)
    assert unfinished_folds(tmp_path) == (0, 1, 2), "a request that is refused deletes nothing"
    ask(tmp_path, plan, LONG, folds=(0, 1, 2), resume=False)
    assert unfinished_folds(tmp_path) == ()


def test_options_of_one_fold_are_told_and_do_not_change_the_reasons_of_others(plan: Plan, tmp_path: Path) -> None:
    _, first, _ = ask(tmp_path, plan)
    begin(tmp_path, 0)
    _, second, _ = ask(tmp_path, plan, dataclasses.replace(SHORT, mirror=True), folds=(1,))
    told = [{reason.subject: reason.text for reason in choices.reasons} for choices in (first, second)]
    assert told[1]["training.mirror"] == SET_BY_USER != told[0]["training.mirror"]
    assert ask(tmp_path, plan, folds=(2,))[1] == first


def test_without_a_budget_it_is_a_full_training_whatever_the_others_had(plan: Plan, tmp_path: Path) -> None:
    ask(tmp_path, plan)
    begin(tmp_path, 0)
    _, choices, _ = ask(tmp_path, plan, TrainConfig(), folds=(1,))
    assert choices.budget == Budget(max_time_s=RECIPES["fast"].full_cpu_time_s)
    assert any(reason.subject == "training.budget" for reason in choices.reasons)


def test_nothing_of_a_fold_is_deleted_while_another_process_trains_it(plan: Plan, tmp_path: Path) -> None:
    model = Workspace(root=tmp_path).model(plan.recommended)
    folders = [fold_folder(model, fold) for fold in (0, 1)]
    for fold in (0, 1):
        begin(model, fold)
    training = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folders[1] / ".training.lock")], stdout=subprocess.PIPE
    )
    with training:
        assert training.stdout is not None
        training.stdout.readline()
        with pytest.raises(TrainingError, match="fold_1: another process trains it; wait for it or end it"):
            discard_folds([model], [0, 1])
        assert all((folder / "checkpoint.safetensors").exists() for folder in folders)
        training.terminate()
    discard_folds([model], [0, 1])
    assert not any((folder / "checkpoint.safetensors").exists() for folder in folders)


def test_a_fold_that_fails_before_its_first_step_leaves_nothing_to_go_by(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = autoseg.plan(tiny_dataset, tmp_path)
    model = Workspace(root=tmp_path).model(plan.recommended)

    def fail(*_: object, **__: object) -> None:
        assert FoldFiles.of(model, 0).begun.exists(), "whoever begins another fold now has to take the same network"
        raise TrainingError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr("autoseg.training.trainer.train_fold", fail)
        with pytest.raises(TrainingError, match="no memory"):
            autoseg.train(tmp_path, folds=[0], config=SHORT, device="cpu")
    assert not FoldFiles.of(model, 0).begun.exists()
