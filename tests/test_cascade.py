"""The cascade, through the command line: what its second stage learns from, and what it gains."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import autoseg
from autoseg.cli import app
from autoseg.core.errors import FormatError, PlanError, PredictionError, TrainingError
from autoseg.inference.cost import count_multiply_adds
from autoseg.inference.model import read_model
from autoseg.pipeline.jobs.batch import Batch, Job
from autoseg.pipeline.jobs.tasks import TASKS, Place

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (12, 28, 28)  # (z, y, x), voxels of 1 mm
N_TRAIN, N_TEST = 6, 3
OPTIONS = ("--iterations", 60, "--augment", "none", "--device", "cpu", "--batch-size", 2)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def draw(rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """A shell of one voxel, and a thicker ball beside it: the image and 0 to 2."""
    z, y, x = np.indices(SHAPE)
    cy, cx, radius = rng.uniform(9, 11), rng.uniform(9, 11), rng.uniform(4.5, 5.5)
    distance = np.sqrt((z - 6) ** 2 + (y - cy) ** 2 + (x - cx) ** 2)
    label = np.zeros(SHAPE, int)
    label[np.abs(distance - radius) < 0.6] = 1
    label[np.sqrt((z - 6) ** 2 + (y - 21) ** 2 + (x - rng.uniform(19, 22)) ** 2) < 4] = 2
    return np.array([0.0, 1.5, 3.0])[label] + 0.25 * rng.standard_normal(SHAPE), label


def save(path: Path, volume: NDArray, dtype: type) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume.astype(dtype).transpose(2, 1, 0), np.eye(4)), path)


def mean_dice(folder: Path) -> dict[str, float]:
    scores = json.loads((folder / "evaluation.json").read_text())
    return {label["label"]: label["metrics"]["dice"]["mean"] for label in scores["labels"]}


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A folder with data, a work folder with a trained cascade, and label maps of both stages."""
    folder, rng = tmp_path_factory.mktemp("cascade"), np.random.default_rng(0)
    for part, n_cases in (("Tr", N_TRAIN), ("Ts", N_TEST)):
        for index in range(n_cases):
            image, label = draw(rng)
            save(folder / "data" / f"images{part}" / f"{part}{index}_0000.nii.gz", image, np.float32)
            save(folder / "data" / f"labels{part}" / f"{part}{index}.nii.gz", label, np.uint8)
    content = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "shell": 1, "ball": 2}}
    (folder / "data" / "dataset.json").write_text(json.dumps({**content, "file_ending": ".nii.gz"}))
    run("plan", folder / "data", "-w", folder / "work", "--folds", 2, "-c", "3d_fullres")
    run("train", "-c", "cascade", "--force", "--fold", 0, "-w", folder / "work", *OPTIONS)
    for name in ("cascade", "3d_lowres"):
        run(
            "predict", folder / "data" / "imagesTs", folder / name, "-w", folder / "work", "-c", name, "--device", "cpu"
        )
        run("evaluate", folder / name, folder / "data" / "labelsTs")
    return folder


def test_a_plan_without_one_says_why_and_how_to_get_one(cascade: Path, tmp_path: Path) -> None:
    autoseg.plan(cascade / "data", tmp_path / "work", preprocess="none")
    with pytest.raises(PlanError, match=r"no cascade: none is needed: a patch .* covers.*--force"):
        autoseg.train(tmp_path / "work", configuration="cascade")


def test_the_first_stage_is_trained_on_all_folds_before(cascade: Path) -> None:
    models = cascade / "work" / "models"
    assert {file.parent.name for file in (models / "3d_lowres").rglob("weights.safetensors")} == {"fold_0", "fold_1"}
    assert [file.parent.name for file in (models / "3d_cascade_fullres").rglob("weights.safetensors")] == ["fold_0"]
    plan = json.loads((cascade / "work" / "plan.json").read_text())
    low, full = (plan["configurations"][name] for name in ("3d_lowres", "3d_fullres"))
    assert np.prod(full["median_shape"]) >= 2 * np.prod(low["median_shape"])
    assert plan["recommended"] == "3d_fullres", "what the planner thinks best stays"


def test_the_second_stage_learns_from_predictions_of_networks_that_had_not_seen_the_case(cascade: Path) -> None:
    work = cascade / "work"
    folds = json.loads((work / "splits.json").read_text())["folds"]
    for fold, split in enumerate(folds):
        for case in split["validation"]:
            predicted = nib.load(work / "models" / "3d_lowres" / f"fold_{fold}" / "validation" / f"{case}.nii.gz")
            used = np.load(work / "preprocessed" / "3d_cascade_fullres.first_stage" / case / "previous.npy")
            np.testing.assert_array_equal(used, np.asarray(predicted.dataobj).transpose(2, 1, 0))


def test_it_finds_what_is_thinner_than_the_voxels_of_the_first_stage(cascade: Path) -> None:
    first, both = mean_dice(cascade / "3d_lowres"), mean_dice(cascade / "cascade")
    assert both["shell"] > first["shell"] + 0.1
    assert both["ball"] > first["ball"] - 0.02


def test_it_uses_what_the_first_stage_has_found(cascade: Path, tmp_path: Path) -> None:
    """With a first stage that finds nothing, other label maps come out."""
    models = tmp_path / "models"
    for name in ("3d_lowres", "3d_cascade_fullres"):
        shutil.copytree(cascade / "work" / "models" / name, models / name)
    for file in (models / "3d_lowres").rglob("weights.safetensors"):
        weights = load_file(file)
        for name in weights:
            if name.startswith("heads.") and name.endswith("bias"):
                weights[name] = weights[name] + np.array([100.0, 0.0, 0.0], np.float32)
        save_file(weights, file)
    images = cascade / "data" / "imagesTs"
    autoseg.predict(images, tmp_path / "out", model=models / "3d_cascade_fullres", device="cpu")
    maps = [np.asarray(nib.load(folder / "Ts0.nii.gz").dataobj) for folder in (tmp_path / "out", cascade / "cascade")]
    assert (maps[0] != maps[1]).any()


def test_a_first_stage_that_is_missing_is_named(cascade: Path, tmp_path: Path) -> None:
    alone = tmp_path / "3d_cascade_fullres"
    shutil.copytree(cascade / "work" / "models" / "3d_cascade_fullres", alone)
    with pytest.raises(PredictionError, match=r"second stage of a cascade.*copy both folders"):
        autoseg.predict(cascade / "data" / "imagesTs", tmp_path / "out", model=alone, device="cpu")
    with pytest.raises(FormatError, match="does not go into one file"):
        autoseg.export(cascade / "work", tmp_path / "m.autoseg", configuration="cascade")


def test_training_it_again_makes_nothing_anew(cascade: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = [*(cascade / "work").rglob("weights.safetensors"), *(cascade / "work").rglob("previous.npy")]
    before = {file: file.stat().st_mtime_ns for file in files}
    with caplog.at_level(logging.INFO):
        run("train", "-c", "cascade", "--fold", 0, "-w", cascade / "work", *OPTIONS)
    assert "already trained" in caplog.text
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_cases_that_never_validate_cannot_be_refined(cascade: Path, tmp_path: Path) -> None:
    (tmp_path / "held_out.txt").write_text("Tr0\nTr1\n")
    splits = autoseg.SplitChoices(validation=tmp_path / "held_out.txt")
    autoseg.plan(cascade / "data", tmp_path / "work", splits=splits)
    autoseg.pipeline.force_cascade(tmp_path / "work")
    with pytest.raises(TrainingError, match=r"4 cases validate in no fold.*--folds 5"):
        autoseg.train(tmp_path / "work", configuration="cascade")


@pytest.fixture(scope="module")
def finished(cascade: Path) -> Path:
    """The work folder, with all folds of both stages."""
    run("train", "-c", "cascade", "--fold", 1, "-w", cascade / "work", *OPTIONS)
    run("train", "-c", "3d_lowres", "-w", cascade / "work", *OPTIONS)
    return cascade / "work"


def test_a_finished_cascade_takes_part_in_the_selection(finished: Path) -> None:
    selection = json.loads((finished / "selection.json").read_text())
    named = {name for candidate in selection["candidates"] for name in candidate["configurations"]}
    assert {"3d_lowres", "3d_cascade_fullres"} <= named
    assert selection["chosen"].split(" + ")[0] in named
    cost = {" + ".join(candidate["configurations"]): candidate["cost"] for candidate in selection["candidates"]}
    second = read_model(finished / "models" / "3d_cascade_fullres")
    shape = [round(size) for size in second.plan.configuration("3d_cascade_fullres").median_shape]
    alone = count_multiply_adds(second.plan, second.configuration, shape)
    assert cost["3d_cascade_fullres"] == pytest.approx(cost["3d_lowres"] + alone), "both stages run"


def test_a_job_that_selects_waits_for_the_first_stage(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = Path(shutil.copytree(finished, tmp_path / "work"))
    (work / "models" / "3d_lowres" / "fold_0" / "weights.safetensors").unlink()
    job = Job(name="select", task="select")
    with caplog.at_level(logging.INFO):
        TASKS["select"](Batch(work=work, executor="local", jobs=(job,)), job, Place(device="cpu"))
    assert "nothing to select from yet" in caplog.text
    assert "3d_cascade_fullres: its first stage, 3d_lowres: folds 0 are not trained" in caplog.text
