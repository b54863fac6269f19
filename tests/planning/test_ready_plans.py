"""The ready-made plans: what the rules of planning decide about well-known datasets, kept as golden files."""

from __future__ import annotations

import dataclasses
import difflib
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoseg.core.errors import FormatError, PlanError
from autoseg.core.serialize import dump_json, from_plain, read_json, to_plain, write_json
from autoseg.planning.checks import check_plan
from autoseg.planning.plan import Plan
from autoseg.planning.planner import make_plan, recommend
from autoseg.planning.ready import ReadyPlan, read_source_plan
from autoseg.planning.transfer import transfer_plan

ROOT = Path(__file__).resolve().parents[2]
PLANS = ROOT / "plans"
SCRIPT = ROOT / "scripts" / "make_plans.py"
NAMES = sorted(path.stem for path in PLANS.glob("*.json"))
MAX_BYTES = 90_000
MAX_DIFF_LINES = 40
REGENERATE = "where the change is wanted, run: python scripts/make_plans.py"

by_name = pytest.mark.parametrize("name", NAMES)


def read_ready(name: str) -> ReadyPlan:
    ready: ReadyPlan = read_json(PLANS / f"{name}.json", ReadyPlan)
    return ready


def text_of(plan: Plan) -> str:
    """The plan as it reads from a file, without autoseg's version, which alone is no difference."""
    provenance = {key: value for key, value in plan.provenance.items() if key != "autoseg"}
    # Read back, because 8 and 8.0 are the same number.
    return dump_json(from_plain(Plan, to_plain(dataclasses.replace(plan, provenance=provenance))))


def describe_difference(stored: str, made: str, name: str) -> str:
    """A unified diff with one line around each difference; empty where there is none."""
    lines = list(
        difflib.unified_diff(
            stored.splitlines(), made.splitlines(), f"plans/{name} (stored)", f"{name} (made now)", n=1, lineterm=""
        )
    )
    if len(lines) > MAX_DIFF_LINES:
        lines = [*lines[:MAX_DIFF_LINES], f"... and {len(lines) - MAX_DIFF_LINES} more lines"]
    return "\n".join(lines)


def test_there_are_ready_plans() -> None:
    assert len(NAMES) >= 10, f"found {NAMES} in {PLANS}"


@by_name
def test_the_rules_still_decide_as_stored(name: str) -> None:
    stored = read_ready(name)
    made = make_plan(stored.fingerprint, stored.plan.labels, dataset=stored.plan.dataset, n_folds=stored.plan.n_folds)
    difference = describe_difference(text_of(stored.plan), text_of(made), f"{name}.json")
    if difference:
        pytest.fail(f"the plan of {name} has changed; {REGENERATE}\n{difference}", pytrace=False)


def test_a_difference_is_told_in_a_few_lines() -> None:
    stored = read_ready(NAMES[0]).plan
    edited = dataclasses.replace(stored, n_folds=stored.n_folds + 1)
    difference = describe_difference(text_of(stored), text_of(edited), "a.json").splitlines()
    assert f'-  "n_folds": {stored.n_folds},' in difference
    assert f'+  "n_folds": {stored.n_folds + 1},' in difference
    assert len(difference) <= 7
    newer = dataclasses.replace(stored, provenance={**stored.provenance, "autoseg": "99.0"})
    assert not describe_difference(text_of(stored), text_of(newer), "a.json")


def test_the_script_makes_these_files_and_no_others(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path / "plans")], check=True, cwd=tmp_path)
    expected = {path.name: path.read_bytes() for path in PLANS.iterdir()}
    made = {path.name: path.read_bytes() for path in (tmp_path / "plans").iterdir()}
    assert sorted(made) == sorted(expected), REGENERATE
    for name, content in made.items():
        if content != expected[name]:
            difference = describe_difference(expected[name].decode(), content.decode(), name)
            pytest.fail(f"plans/{name} is not what the script makes; {REGENERATE}\n{difference}", pytrace=False)


def test_only_one_plan_is_written_on_request(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path), "--only", "drive"], check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["drive.json"]


@by_name
def test_medians_are_the_published_ones(name: str) -> None:
    (known,) = [
        known
        for known in runpy.run_path(str(ROOT / "scripts" / "known_datasets.py"))["KNOWN_DATASETS"]
        if known.name == name
    ]
    cases = read_ready(name).fingerprint.cases
    drawn: dict[str, Any] = {
        field: np.array([getattr(case, field) for case in cases]) for field in ("spacing_mm", "shape", "cropped_shape")
    }
    published = {
        "spacing_mm": known.spacing_mm,
        "shape": known.shape,
        "cropped_shape": known.cropped_shape or known.shape,
    }
    for field, spreads in published.items():
        np.testing.assert_allclose(np.median(drawn[field], axis=0), [spread.median for spread in spreads], rtol=1e-9)
        np.testing.assert_allclose(drawn[field].min(axis=0), [spread.low for spread in spreads], atol=1e-4)
        np.testing.assert_allclose(drawn[field].max(axis=0), [spread.high for spread in spreads], atol=1e-4)
    assert (drawn["cropped_shape"] <= drawn["shape"]).all()
    # The more voxels along an axis, the finer they are.
    for axis in range(3):
        order = np.lexsort((-drawn["shape"][:, axis], drawn["spacing_mm"][:, axis]))
        if np.ptp(drawn["spacing_mm"][:, axis]) > 0:
            assert (np.diff(drawn["shape"][order, axis]) <= 0).all()


@by_name
def test_plans_are_valid_and_files_short(name: str) -> None:
    stored = read_ready(name)
    check_plan(stored.plan)
    assert stored.plan.dataset == name
    assert stored.title
    assert stored.source
    assert "drawn" in stored.note
    assert (PLANS / f"{name}.json").stat().st_size < MAX_BYTES


@by_name
def test_plans_can_be_taken_over_by_another_dataset(name: str) -> None:
    source = read_source_plan(PLANS / f"{name}.json")
    others = {other: read_ready(other) for other in [*NAMES[NAMES.index(name) + 1 :], *NAMES[: NAMES.index(name)]]}
    alike = [
        other
        for other, ready in others.items()
        if ("3d_fullres" in ready.plan.configurations) == ("3d_fullres" in source.configurations)
        and ready.plan.labels.n_classes <= source.labels.n_classes
    ]
    # DRIVE is the only one in 2D: its plan goes to its own scans.
    target = others[alike[0]] if alike else read_ready(name)
    made = transfer_plan(
        source, target.fingerprint, target.plan.labels, dataset=target.plan.dataset, n_folds=5, name=f"{name}.json"
    )
    assert made.recommended == recommend(made.configurations)[0]
    assert made.channels == target.plan.channels
    assert made.provenance["like"] == f"{name}.json"
    for key, configuration in source.configurations.items():
        assert made.configurations[key].network == configuration.network
        assert made.configurations[key].patch_size == configuration.patch_size
        assert made.configurations[key].spacing_mm == configuration.spacing_mm


# --- Reading --------------------------------------------------------------------------------------------------------


def test_a_bare_plan_is_read_as_well(tmp_path: Path) -> None:
    plan = read_source_plan(PLANS / "msd_liver.json")
    write_json(tmp_path / "plan.json", plan)
    assert read_source_plan(tmp_path / "plan.json") == plan


def test_a_missing_file_lists_the_names() -> None:
    for typed in ("msd_livr.json", "msd_liver", "liver"):
        with pytest.raises(FormatError, match=rf"{typed}: no such file; did you mean 'msd_liver.json'\?") as caught:
            read_source_plan(PLANS / typed)
        assert all(f"{name}.json" in str(caught.value) for name in NAMES)
    with pytest.raises(FormatError, match=r"xyz.json: no such file; .*plans has acdc.json, ") as caught:
        read_source_plan(PLANS / "xyz.json")
    assert "did you mean" not in str(caught.value)
    with pytest.raises(FormatError, match=r"plans: is a folder, expected a file; .*msd_liver.json"):
        read_source_plan(PLANS)


def test_a_missing_file_among_no_others(tmp_path: Path) -> None:
    for path in (tmp_path / "plan.json", tmp_path / "nowhere" / "plan.json"):
        with pytest.raises(FormatError, match=r"no such file, and there are no \.json files in"):
            read_source_plan(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "plan.json: found a list, expected a ready-made plan or a plan.json"),
        ({"fingerprint": {}, "title": "a"}, "plan.json: ReadyPlan: key 'source' is missing"),
        ({"configurations": {}}, "plan.json: Plan: key 'version' is missing"),
    ],
)
def test_what_is_not_a_plan_is_told_with_the_file(tmp_path: Path, content: object, message: str) -> None:
    write_json(tmp_path / "plan.json", content)
    with pytest.raises(FormatError, match=message):
        read_source_plan(tmp_path / "plan.json")


def test_an_edited_ready_plan_is_checked(tmp_path: Path) -> None:
    data = read_json(PLANS / "msd_liver.json")
    data["plan"]["recommended"] = "3d_fulres"
    write_json(tmp_path / "edited.json", data)
    with pytest.raises(PlanError, match=r"edited.json: the plan has no configuration '3d_fulres'; did you mean"):
        read_source_plan(tmp_path / "edited.json")
