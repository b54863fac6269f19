"""A plan that a person has edited: what is right is taken, what is not is refused with the nearest that is."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fingerprints import make_fingerprint

from autoseg.core.errors import AutosegError, WorkspaceError
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import read_json, write_json
from autoseg.pipeline import Workspace, train
from autoseg.pipeline.preprocess import cases_to_preprocess, preprocess_cases
from autoseg.planning.choices import Choices
from autoseg.planning.estimates import estimate
from autoseg.planning.plan import Measurement
from autoseg.planning.planner import make_plan
from autoseg.reporting.plan_page import write_plan_page
from autoseg.reporting.text import explain_plan

FINGERPRINT = make_fingerprint(*[((100, 256, 256), (2.0, 1.0, 1.0))] * 10)
"""Of ten equal CTs."""

Edit = Callable[[dict[str, Any], dict[str, Any]], object]


def edited(tmp_path: Path, edit: Edit) -> Workspace:
    """A work folder with a plan after `edit(plan, plan["configurations"]["3d_fullres"])`."""
    workspace = Workspace(root=tmp_path)
    labels = LabelSpec(names=("organ",), values=(1,))
    write_json(workspace.plan_file, make_plan(FINGERPRINT, labels, dataset="d", n_folds=5))
    content = read_json(workspace.plan_file)
    edit(content, content["configurations"]["3d_fullres"])
    write_json(workspace.plan_file, content)
    return workspace


def test_the_plan_to_edit_is_what_the_messages_below_speak_of(tmp_path: Path) -> None:
    full = edited(tmp_path, lambda plan, full: None).read_plan().configuration("3d_fullres")
    assert (full.patch_size, full.batch_size, full.network.divisor) == ((64, 192, 160), 2, (16, 32, 32))


def test_valid_edits_are_taken(tmp_path: Path) -> None:
    def edit(plan: dict[str, Any], full: dict[str, Any]) -> None:
        full.update(patch_size=[48, 128, 128], batch_size=4)
        plan["normalization"][0].update(scheme="zscore", use_mask=True)
        plan["recommended"] = "2d"
        plan["configurations"]["my_smaller"] = {**full, "name": "my_smaller", "batch_size": 2}

    plan = edited(tmp_path, edit).read_plan()
    assert plan.configuration("3d_fullres").patch_size == (48, 128, 128)
    assert plan.recommended == "2d"
    assert plan.grid("my_smaller") == "3d_fullres"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda plan, full: full.update(patch_size=[64, 192]), r"patch_size is \[64, 192\], expected 3 numbers"),
        (lambda plan, full: full.update(patch_size=[64, 192, 170]), r"the nearest that is: \[64, 192, 160\]"),
        (lambda plan, full: full.update(patch_size=[160, 160, 160]), r"the nearest valid one is \[112, 160, 160\]"),
        (lambda plan, full: full.update(patch_size=[0, 160, 160]), "expected positive numbers"),
        (lambda plan, full: full.update(batch_size=3), "needs about .* GiB.* the nearest valid batch_size is 2"),
        (lambda plan, full: full.update(batch_size=0), "expected at least 1"),
        (lambda plan, full: full.update(batch_size=2.5), "expected a whole number"),
        (lambda plan, full: full.update(spacing_mm=[2, 1]), "spacing_mm .* expected 3 numbers"),
        (lambda plan, full: full.update(spacing_mm=[2, -1, 1]), "expected positive numbers"),
        (lambda plan, full: full.update(lowres_axis=3), "expected null or 0 to 2"),
        (lambda plan, full: full.update(previous="3d_lowres"), "no configuration '3d_lowres'"),
        (lambda plan, full: full.update(previous="2d"), "its previous, 2d, is not 3D"),
        (lambda plan, full: full.update(previous="3d_fullres"), "is a second stage itself"),
        (lambda plan, full: full.update(patch_size=[16, 32, 32]), r"a single voxel .* \[16, 32, 64\]"),
        (lambda plan, full: full["network"]["features"].__setitem__(0, 32000), "use fewer features"),
        (lambda plan, full: plan.update(n_folds=-3), "n_folds is -3"),
        (lambda plan, full: plan["normalization"][0].update(mean=None), "expected finite numbers"),
        (lambda plan, full: full.update(name="other"), "found the name 'other' under '3d_fullres'"),
        (lambda plan, full: full.update(batchsize=3), "unknown key 'batchsize'; did you mean 'batch_size'"),
        (lambda plan, full: full.pop("network"), "key 'network' is missing"),
        (lambda plan, full: full["network"].update(architecture="vit"), "architecture 'vit'; known are unet"),
        (lambda plan, full: full["network"]["features"].pop(), "one entry per stage"),
        (lambda plan, full: full["network"]["kernel_sizes"].__setitem__(0, [3, 3]), "3 numbers"),
        (lambda plan, full: full["network"]["kernel_sizes"].__setitem__(0, [3, 3, 4]), "odd numbers"),
        (lambda plan, full: full["network"]["strides"].__setitem__(0, [2, 2, 2]), "the first stride all ones"),
        (lambda plan, full: full["network"].update(strides=[]), "2 numbers .* per stage"),
        (lambda plan, full: plan.update(recommended="3d"), "no configuration '3d'; choose one of 2d, 3d_fullres"),
        (lambda plan, full: plan.update(preset="resenc"), "no preset 'resenc'"),
        (lambda plan, full: plan.update(gpu_memory_gib=0), "gpu_memory_gib above 0"),
        (lambda plan, full: plan.update(gpu_memory_gib=4), "gpu_memory_gib 4; the nearest valid batch_size is"),
        (
            lambda plan, full: full.update(patch_size=[112, 256, 256]),
            r"not even one patch fits; the nearest valid patch_size is \[\d+, \d+, \d+\]",
        ),
        (lambda plan, full: plan.update(axis_order=[0, 1, 1]), "permutation"),
        (lambda plan, full: plan.update(version=1), "format 1.* plan the dataset again"),
        (lambda plan, full: plan.update(normalization=[]), "at least one channel"),
        (lambda plan, full: plan["normalization"][0].update(scheme="z-score"), "did you mean 'zscore'"),
        (lambda plan, full: plan["normalization"][0].update(mean=None, std=None), "expected finite numbers"),
        (
            lambda plan, full: plan["configurations"].update({"../x": {**full, "name": "../x"}}),
            "the same name of letters",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, edit: Edit, message: str) -> None:
    with pytest.raises(AutosegError, match=message) as caught:
        edited(tmp_path, edit).read_plan()
    assert str(tmp_path / "plan.json") in str(caught.value)


def test_more_memory_makes_room(tmp_path: Path) -> None:
    def edit(plan: dict[str, Any], full: dict[str, Any]) -> None:
        full["batch_size"] = 6
        plan["gpu_memory_gib"] = 24

    assert edited(tmp_path, edit).read_plan().configuration("3d_fullres").batch_size == 6


def test_a_plan_tells_that_it_was_edited(tmp_path: Path) -> None:
    workspace = edited(tmp_path, lambda plan, full: None)
    assert not workspace.read_plan().is_edited
    workspace = edited(tmp_path, lambda plan, full: full.update(batch_size=1))
    plan = workspace.read_plan()
    assert plan.is_edited
    assert "edited by hand" in explain_plan(plan, estimate(FINGERPRINT, plan))


def test_a_measurement_counts_only_for_what_was_measured(tmp_path: Path) -> None:
    plan = edited(tmp_path, lambda plan, full: None).read_plan()
    known = Measurement(
        configuration="3d_fullres",
        key=plan.measurement_key("3d_fullres"),
        device="GPU",
        peak_memory_gib=7.0,
        step_time_s=0.5,
        largest_batch_size=4,
    )
    plan = dataclasses.replace(plan, measurements=(known,))
    assert plan.measurement("3d_fullres") == known
    assert plan.measurement("2d") is None
    assert "the largest batch size is 4" in explain_plan(plan, estimate(FINGERPRINT, plan))
    other = dataclasses.replace(plan.configuration("3d_fullres"), batch_size=1)
    changed = dataclasses.replace(plan, configurations={**plan.configurations, "3d_fullres": other})
    assert changed.measurement("3d_fullres") is None
    assert "the largest batch size" not in explain_plan(changed, estimate(FINGERPRINT, changed))


def test_a_configuration_of_ones_own_is_explained_too(tmp_path: Path) -> None:
    def edit(plan: dict[str, Any], full: dict[str, Any]) -> None:
        plan["configurations"]["mine"] = {**full, "name": "mine", "spacing_mm": [3, 1, 1]}
        plan["recommended"] = "mine"

    plan = edited(tmp_path, edit).read_plan()
    page = write_plan_page(tmp_path / "plan.html", plan, FINGERPRINT, estimate(FINGERPRINT, plan))
    assert "added to the plan by hand" in page.read_text()
    assert "mine" in explain_plan(plan, estimate(FINGERPRINT, plan))


def test_both_stages_at_full_resolution_share_their_cases() -> None:
    large = (400, 512, 512)
    cases = tuple(dataclasses.replace(case, cropped_shape=large) for case in FINGERPRINT.cases)
    fingerprint = dataclasses.replace(FINGERPRINT, cases=cases)
    labels = LabelSpec(names=("organ",), values=(1,))
    for configurations, grid in ((None, "3d_fullres"), (("3d_cascade_fullres",), "3d_cascade_fullres")):
        choices = Choices(configurations=configurations)
        plan = make_plan(fingerprint, labels, dataset="d", n_folds=5, choices=choices)
        assert plan.grid("3d_cascade_fullres") == grid, "a configuration that the plan has"
        assert plan.grid("3d_lowres") == "3d_lowres"


def test_cases_of_a_smoothed_grid_are_not_those_of_another(tmp_path: Path, tiny_work: Path) -> None:
    workspace = Workspace(root=shutil.copytree(tiny_work, tmp_path / "work"))
    plan, dataset = workspace.read_plan(), workspace.read_dataset()
    full = plan.configuration("3d_fullres")
    preprocess_cases(workspace, dataset, plan, full.name)
    assert not cases_to_preprocess(workspace, dataset, plan, full.name)
    smoothed = dataclasses.replace(full, smoothed=True)
    changed = dataclasses.replace(plan, configurations={full.name: smoothed})
    assert len(cases_to_preprocess(workspace, dataset, changed, full.name)) == len(dataset.cases)
    both = {full.name: full, "3d_quick": dataclasses.replace(smoothed, name="3d_quick")}
    assert dataclasses.replace(plan, configurations=both).grid("3d_quick") == "3d_quick"


def test_a_case_that_the_dataset_does_not_have_any_more_is_not_trained_on(tmp_path: Path, tiny_work: Path) -> None:
    workspace = Workspace(root=shutil.copytree(tiny_work, tmp_path / "work"))
    dataset = workspace.read_dataset()
    write_json(workspace.dataset_file, dataclasses.replace(dataset, cases=dataset.cases[1:]))
    with pytest.raises(WorkspaceError, match=rf"does not have any more: {dataset.cases[0].id}; plan again"):
        train(workspace.root, configuration="3d_fullres", device="cpu")
