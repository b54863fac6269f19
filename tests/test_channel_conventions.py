"""Channels of every kind, from the files to the label maps, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

import autoseg
from autoseg.cli import app
from autoseg.core.errors import DatasetError, PredictionError

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (8, 20, 20)  # (z, y, x)
N_TRAIN = 8


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def draw(rng: np.random.Generator) -> tuple[NDArray, NDArray, NDArray]:
    """A channel that shows a ball, one that shows something else, and where the ball is."""
    z, y, x = np.indices(SHAPE)

    def ball() -> NDArray[np.bool_]:
        cy, cx = rng.uniform(6, 14, 2)
        return (2 * (z - 4)) ** 2 + (y - cy) ** 2 + (x - cx) ** 2 <= 25

    label, other = ball(), ball()
    shown, distracting = (5 + 3 * mask + 0.3 * rng.standard_normal(SHAPE) for mask in (label, other))
    return shown, distracting, label


def save(path: Path, volume: NDArray, affine: NDArray | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    file_axes = volume.astype(np.float32).transpose(2, 1, 0)
    nib.save(nib.Nifti1Image(file_axes, np.diag([1.0, 1.0, 2.0, 1.0]) if affine is None else affine), path)
    return str(path)


def dice(a: NDArray, b: NDArray) -> float:
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """The first channel distracts, and half of the cases lack it."""
    folder, rng = tmp_path_factory.mktemp("channels"), np.random.default_rng(0)
    cases = []
    for index in range(N_TRAIN):
        shown, distracting, label = draw(rng)
        first = save(folder / f"c{index}_a.nii.gz", distracting) if index % 2 else None
        images = [first, save(folder / f"c{index}_b.nii.gz", shown)]
        cases.append({"id": f"c{index}", "images": images, "label": save(folder / f"c{index}_seg.nii.gz", label)})
    manifest = {"channels": ["CT", "MR"], "labels": {"ball": 1}, "cases": cases}
    (folder / "cases.json").write_text(json.dumps(manifest))
    run("plan", folder / "cases.json", "-w", folder / "work", "-c", "3d_fullres")
    run("train", "--fold", 0, "-w", folder / "work", "--iterations", 100, "--device", "cpu", "--batch-size", 2)
    return folder / "work"


def test_a_channel_that_a_case_lacks_does_not_shift_the_others(trained: Path, tmp_path: Path) -> None:
    """Were the second channel taken for the first, the network would look at what distracts."""
    rng, wanted = np.random.default_rng(1), {}
    for index in range(4):
        shown, distracting, wanted[f"t{index}"] = draw(rng)
        save(tmp_path / "in" / f"t{index}_0001.nii.gz", shown)
        if index % 2:
            save(tmp_path / "in" / f"t{index}_0000.nii.gz", distracting)
    run("predict", tmp_path / "in", tmp_path / "out", "-w", trained, "--device", "cpu")
    for case, label in wanted.items():
        assert (
            dice(np.asarray(nib.load(tmp_path / "out" / f"{case}.nii.gz").dataobj).transpose(2, 1, 0) > 0, label) > 0.85
        )
    cases = json.loads((tmp_path / "out" / "prediction.json").read_text())["cases"]
    assert cases["t0"]["warnings"] == ["lacks the channel CT: it is segmented without"]
    assert cases["t1"]["warnings"] == []


def test_the_plan_says_which_channels_may_be_lacking(trained: Path) -> None:
    plan = json.loads((trained / "plan.json").read_text())
    assert plan["optional_channels"] == ["CT"]
    (text,) = [reason["text"] for reason in plan["reasons"] if reason["subject"] == "optional_channels"]
    assert "of 8 cases lacked: CT by 4" in text


def test_a_channel_that_all_cases_had_may_not_be_lacking(trained: Path, tmp_path: Path) -> None:
    _, distracting, _ = draw(np.random.default_rng(1))
    save(tmp_path / "in" / "t_0000.nii.gz", distracting)
    with pytest.raises(PredictionError, match="wrong number of channels"):
        autoseg.predict(tmp_path / "in", tmp_path / "out", trained, device="cpu")


def test_a_channel_on_another_grid_is_refused_or_resampled(tmp_path: Path) -> None:
    """The second channel has voxels of half the size and begins elsewhere."""
    rng = np.random.default_rng(0)
    cases = []
    for index in range(2):
        shown, distracting, label = draw(rng)
        fine = np.diag([0.5, 0.5, 1.0, 1.0])
        fine[:3, 3] = -0.25, -0.25, -0.5
        doubled = shown.repeat(2, 0).repeat(2, 1).repeat(2, 2)
        images = [
            save(tmp_path / f"{index}_a.nii.gz", distracting),
            save(tmp_path / f"{index}_b.nii.gz", doubled, fine),
        ]
        cases.append({"id": f"c{index}", "images": images, "label": save(tmp_path / f"{index}_seg.nii.gz", label)})
    manifest = {"channels": ["MR 1", "MR 2"], "labels": {"ball": 1}, "cases": cases}
    (tmp_path / "cases.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match="--fix resamples it"):
        autoseg.plan(tmp_path / "cases.json", tmp_path / "work")
    run("plan", tmp_path / "cases.json", "-w", tmp_path / "work", "-c", "3d_fullres", "--fix")
    told = json.loads((tmp_path / "work" / "check.json").read_text())["problems"]
    assert [problem["case"] for problem in told if problem["kind"] == "channel on another grid"] == ["c0", "c1"]
    shown = draw(np.random.default_rng(0))[0]
    stored = np.load(tmp_path / "work" / "preprocessed" / "3d_fullres" / "c0" / "image.npy")[1].astype(float)
    correlation = np.corrcoef(stored.ravel(), shown.ravel())[0, 1]
    assert correlation > 0.999, "each voxel is the mean of its eight parts"
