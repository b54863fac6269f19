"""A plan that a person has edited: what is right is taken, what is not is refused with the nearest that is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoseg.core.errors import AutosegError
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import read_json, write_json
from autoseg.pipeline import Workspace
from autoseg.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint
from autoseg.planning.planner import make_plan


def make_fingerprint() -> Fingerprint:
    """Ten equal CTs."""
    shape = (100, 256, 256)
    cases = tuple(
        CaseFingerprint(case=f"c{i}", shape=shape, spacing_mm=(2.0, 1, 1), cropped_shape=shape, label_volumes_ml=(1.0,))
        for i in range(10)
    )
    channel = ChannelFingerprint(
        name="CT", mean=1.0, std=1.0, minimum=0.0, maximum=2.0, median=1.0, percentile_00_5=0.0, percentile_99_5=2.0
    )
    return Fingerprint(cases=cases, channels=(channel,), median_cropped_fraction=1.0)


Edit = Callable[[dict[str, Any], dict[str, Any]], object]


def edited(tmp_path: Path, edit: Edit) -> Workspace:
    """A work folder with a plan after `edit(plan, plan["configurations"]["3d_fullres"])`."""
    workspace = Workspace(root=tmp_path)
    labels = LabelSpec(names=("organ",), values=(1,))
    write_json(workspace.plan_file, make_plan(make_fingerprint(), labels, dataset="d", n_folds=5))
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
