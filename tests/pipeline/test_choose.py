"""Cross-validation and selection complete by themselves, are used by prediction, and notice other weights."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

import autoseg
from autoseg.cli import app
from autoseg.core.errors import PredictionError, TrainingError, TrainingInterrupted
from autoseg.core.serialize import read_json, write_json
from autoseg.core.steps import FOREGROUND, LARGEST, Step
from autoseg.data.io import read_image, read_label
from autoseg.evaluation.evaluate import score_case
from autoseg.evaluation.review import Reviewer, calibrate
from autoseg.evaluation.scores import targets_of
from autoseg.evaluation.selection import Selection
from autoseg.inference.ensemble import Ensemble
from autoseg.inference.model import read_model
from autoseg.inference.postprocess import apply_steps
from autoseg.inference.predictor import Predictor
from autoseg.inference.quality import QualityModel
from autoseg.inference.sources import Postprocessing
from autoseg.pipeline import Workspace, cross_validate, crossval
from autoseg.pipeline.crossval import read_cross_validation
from autoseg.pipeline.fold_validation import validation_label_map
from autoseg.pipeline.inputs import configuration_to_predict
from autoseg.pipeline.stored import open_stored, prepare_stored
from autoseg.training.config import Budget, TrainConfig

SHORT = TrainConfig(budget=Budget(iterations=8))
BOTH = "2d + 3d_fullres"


@pytest.fixture(scope="module")
def trained(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds of the 3D configuration, the second first, then two of the 2D one. Do not change it."""
    work = tmp_path_factory.mktemp("choose") / "work"
    autoseg.plan(tiny_dataset, work, n_folds=2)
    autoseg.train(work, folds=[1], config=SHORT, device="cpu")
    assert not (work / "selection.json").exists()
    autoseg.train(work, folds=[0], config=SHORT, device="cpu")
    alone: Selection = read_json(work / "selection.json", Selection)
    assert [known.name for known in alone.candidates] == ["3d_fullres"]
    assert alone.missing["2d"].endswith("run 'autoseg train -c 2d --fold 0,1'")
    autoseg.train(work, configuration="2d", config=SHORT, device="cpu")
    return work


@pytest.fixture
def work(trained: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(trained, tmp_path / "work"))


def choose(work: Path, name: str, *, steps: tuple[Step, ...] = ()) -> None:
    """As if another candidate had been selected."""
    content = json.loads((work / "selection.json").read_text())
    content["chosen"] = name
    for candidate in content["candidates"]:
        candidate["steps"] = json.loads(json.dumps([vars(step) for step in steps]))
    (work / "selection.json").write_text(json.dumps(content))


def manifest(folder: Path) -> dict:
    content: dict = json.loads((folder / "prediction.json").read_text())
    return content


@pytest.mark.parametrize("name", ["2d", "3d_fullres"])
def test_every_case_is_scored_by_the_fold_that_had_not_seen_it(trained: Path, name: str) -> None:
    workspace = Workspace(root=trained)
    known = read_cross_validation(workspace, name)
    assert known is not None
    splits, dataset = workspace.read_splits(), workspace.read_dataset()
    expected = {case: fold for fold, split in enumerate(splits.folds) for case in split.validation}
    assert known.folds == expected
    assert {case.case for case in known.evaluation.cases} == {case.id for case in dataset.cases}
    targets = targets_of(workspace.read_plan().labels)
    by_name = {case.case: case for case in known.evaluation.cases}
    for case in dataset.cases:
        file = workspace.model(name) / f"fold_{expected[case.id]}" / "validation" / f"{case.id}.nii.gz"
        reference, geometry = read_label(case.label_files[0])
        score = score_case(case.id, read_label(file)[0], reference, targets, spacing_mm=geometry.spacing_mm)
        assert by_name[case.id].mean_dice == pytest.approx(score.mean_dice, nan_ok=True)
    assert known.model == read_model(workspace.model(name)).digest()
    n_voxels = sum(
        np.load(workspace.preprocessed(workspace.read_plan().grid(name), case.id) / "label.npy").size
        for case in dataset.cases
    )
    assert np.sum(known.confusion) == n_voxels
    assert [review.fold for review in known.reviews] == [expected[review.case] for review in known.reviews]


@pytest.mark.parametrize("names", [("2d",), ("3d_fullres",), ("2d", "3d_fullres")])
def test_the_label_maps_that_are_judged_are_of_networks_that_had_not_seen_the_case(
    trained: Path, names: tuple[str, ...]
) -> None:
    workspace = Workspace(root=trained)
    cases = {case.id: case for case in workspace.read_dataset().cases}

    def segment(case: str, members: list[Predictor]) -> NDArray:
        prepared = [prepare_stored(open_stored(workspace, member, cases[case])) for member in members]
        if len(members) == 1:
            return members[0].segment(prepared[0]).label
        return Ensemble(members).segment(prepared).label

    def load(folds: list[int] | None) -> list[Predictor]:
        return [Predictor(workspace.model(name), device="cpu", folds=folds, postprocess=False) for name in names]

    differs, of_all_folds = False, load(None)
    for fold, split in enumerate(workspace.read_splits().folds):
        own = load([fold])
        for case in split.validation:
            file = workspace.ensemble(names) / f"{case}.nii.gz"
            if len(names) == 1:
                file = validation_label_map(workspace, names[0], fold, case)
            found, _ = read_label(file)
            np.testing.assert_array_equal(found, segment(case, own))
            differs = differs or bool((found != segment(case, of_all_folds)).any())
    assert differs, "whichever networks see a case, the test would pass"


@pytest.mark.parametrize("name", ["2d", "3d_fullres"])
def test_confusion_calibration_and_losses_are_of_the_network_that_had_not_seen_the_case(
    trained: Path, name: str
) -> None:
    workspace = Workspace(root=trained)
    known, splits = read_cross_validation(workspace, name), workspace.read_splits()
    assert known is not None
    cases = {case.id: case for case in workspace.read_dataset().cases}
    fold_of = {case: fold for fold, split in enumerate(splits.folds) for case in split.validation}
    predictors = [Predictor(workspace.model(name), device="cpu", folds=[fold], mirroring=False) for fold in (0, 1)]

    def look(case: str, predictor: Predictor) -> Reviewer:
        """As one network by itself sees it."""
        stored = open_stored(workspace, predictor, cases[case])
        prepared = prepare_stored(stored)
        label = torch.from_numpy(stored.label.astype(np.int64))
        reviewer = Reviewer(1, predictor.outputs, own=0)
        for rows, logits in predictor.sweep(prepared, axis=0, separate=True):
            reviewer.add(logits, label[rows])
        return reviewer

    own = [look(review.case, predictors[fold_of[review.case]]) for review in known.reviews]
    other = [look(review.case, predictors[1 - fold_of[review.case]]) for review in known.reviews]
    confusions = [sum(reviewer.counts().confusion for reviewer in reviewers) for reviewers in (own, other)]
    np.testing.assert_array_equal(known.confusion, confusions[0])
    assert np.any(confusions[0] != confusions[1])
    expected = calibrate([reviewer.counts() for reviewer in own])
    assert known.calibration.n_voxels == expected.n_voxels
    assert known.calibration.accuracy == pytest.approx(expected.accuracy, nan_ok=True)
    losses = [reviewer.review("", 0).loss for reviewer in own]
    assert [review.loss for review in known.reviews] == pytest.approx(losses)


def test_all_folds_look_at_cases_no_longer_than_their_training_took(
    work: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    workspace = Workspace(root=work)
    whole = read_cross_validation(workspace, "3d_fullres")
    assert whole is not None
    assert [review.fold for review in whole.reviews[:4]] == [0, 1, 0, 1]
    workspace.model("3d_fullres").joinpath("cv.json").unlink()
    # Four tenths of the limit pass with each case.
    clock = itertools.count(0, 0.4 * crossval.MIN_REVIEW_S)
    monkeypatch.setattr(crossval, "time", SimpleNamespace(monotonic=clock.__next__))
    caplog.set_level(logging.INFO)
    part = cross_validate(work, configuration="3d_fullres", device="cpu")
    assert part.reviews == whole.reviews[:2]
    assert part.evaluation == whole.evaluation
    assert f"all folds looked at 2 of {len(whole.folds)} cases" in caplog.text


def test_the_selection_names_all_candidates_and_the_best_that_is_beyond_noise(trained: Path) -> None:
    selection: Selection = read_json(trained / "selection.json", Selection)
    assert {known.name for known in selection.candidates} == {"2d", "3d_fullres", BOTH}
    assert [known.cost for known in selection.candidates] == sorted(known.cost for known in selection.candidates)
    assert selection.missing == {}
    best = max(known.mean_dice for known in selection.candidates)
    if selection.candidate.mean_dice < best:
        assert "within noise" in selection.why
    for known in selection.candidates:
        assert known.mean_dice >= known.raw_dice - 1e-12
        assert known.steps == tuple(decision.step for decision in known.decisions if decision.adopted)


def test_what_is_there_is_not_made_again(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = [file for file in trained.rglob("*.nii.gz") if "preprocessed" not in file.parts]
    before = {file: file.stat().st_mtime_ns for file in files}
    first: Selection = read_json(trained / "selection.json", Selection)
    caplog.set_level(logging.INFO)
    assert autoseg.select(trained, device="cpu") == first
    assert {file: file.stat().st_mtime_ns for file in files} == before
    assert not any("look at all cases" in record.getMessage() for record in caplog.records)


def test_what_alone_is_trained_predicts_where_the_recommended_one_is_not(
    work: Path, tiny_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (work / "selection.json").unlink()
    shutil.rmtree(work / "models" / "3d_fullres")
    caplog.set_level(logging.INFO)
    autoseg.predict(tiny_dataset / "imagesTs", tmp_path / "out", work, device="cpu", speed="fast")
    assert manifest(tmp_path / "out")["configuration"] == "2d"
    assert "3d_fullres is recommended, but not trained to its end: 2d segments" in caplog.text
    with pytest.raises(PredictionError, match="3d_fullres is not trained; trained are 2d: name one"):
        autoseg.predict(tiny_dataset / "imagesTs", tmp_path / "other", work, device="cpu", configuration="3d_fullres")


def test_what_is_trained_to_its_end_predicts_before_what_is_not(work: Path) -> None:
    workspace = Workspace(root=work)
    assert configuration_to_predict(workspace) == "3d_fullres"
    for weights in (work / "models" / "3d_fullres").glob("fold_*/weights.safetensors"):
        weights.unlink()
    assert configuration_to_predict(workspace) == "2d"
    shutil.rmtree(work / "models" / "2d")
    assert configuration_to_predict(workspace) == "3d_fullres"


def test_the_next_command_names_what_was_trained_where_another_one_would_predict(work: Path) -> None:
    def next_command(*arguments: str) -> str:
        command = ["train", "--fold", "0", "--iterations", "8", "--device", "cpu", "-w", str(work), *arguments]
        return CliRunner().invoke(app, command, catch_exceptions=False).output.splitlines()[-1]

    named, not_named = f"Next: autoseg predict IN OUT -c 2d -w {work}", f"Next: autoseg predict IN OUT -w {work}"
    for chosen, expected in (("2d", not_named), (BOTH, not_named), ("3d_fullres", named)):
        choose(work, chosen)
        assert next_command("-c", "2d", "--no-validate") == expected
    (work / "selection.json").unlink()
    for name in ("2d", "3d_fullres"):
        shutil.rmtree(work / "models" / name / "fold_1")
    assert next_command("-c", "2d") == named
    assert next_command() == not_named


def test_a_damaged_model_that_is_selected_does_not_spoil_the_end_of_a_training(work: Path) -> None:
    choose(work, "3d_fullres")
    (work / "models" / "3d_fullres" / "plan.json").write_text("{")
    options = ["--fold", "0", "--no-validate", "--iterations", "8", "--device", "cpu", "-w", str(work)]
    result = CliRunner().invoke(app, ["train", "-c", "2d", *options], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.splitlines()[-1] == f"Next: autoseg predict IN OUT -c 2d -w {work}"


def after(n: int) -> Callable[[], bool]:
    asked = iter(range(n))

    def stop() -> bool:
        return next(asked, None) is None

    return stop


@pytest.mark.parametrize("n_cases", [1, 4, 8, 15])
def test_an_interrupted_selection_goes_on_to_the_same_result(work: Path, n_cases: int) -> None:
    first = (work / "selection.json").read_text()
    shutil.rmtree(work / "models" / "ensembles")
    (work / "selection.json").unlink()
    (work / "models" / "2d" / "cv.json").unlink()
    if n_cases == 8:
        (work / "models" / "2d" / "fold_1" / "validation" / "evaluation.json").unlink()
    try:
        autoseg.select(work, device="cpu", stop=after(n_cases))
    except TrainingInterrupted:
        assert not (work / "selection.json").exists()
        autoseg.select(work, device="cpu")
    else:
        assert n_cases == 15
    assert (work / "selection.json").read_text() == first


def test_prediction_uses_what_was_selected(work: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    images = sorted((tiny_dataset / "imagesTs").iterdir())
    step = Step(kind=LARGEST, target=FOREGROUND, values=(1, 2, 3, 4, 5))
    choose(work, BOTH, steps=(step,))
    options: dict[str, Any] = {"device": "cpu", "mirroring": False}
    autoseg.predict(images, tmp_path / "both", work, **options, postprocess=False)
    assert manifest(tmp_path / "both")["configuration"] == BOTH
    assert manifest(tmp_path / "both")["postprocessing"] == []
    # Folds average logits, configurations probabilities, on the grid of the scan.
    probabilities = {}
    for name in ("2d", "3d_fullres"):
        autoseg.predict(images, tmp_path / name, work, **options, configuration=name, save_probabilities=True)
        for image in images:
            case = image.name.removesuffix("_0000.nii.gz")
            files = sorted((tmp_path / name / "probabilities" / case).iterdir())
            stack = np.stack([read_image(file)[0][0] for file in files])
            probabilities[name, case] = np.concatenate([1 - stack.sum(axis=0, keepdims=True), stack])
    autoseg.predict(images, tmp_path / "steps", work, **options)
    assert manifest(tmp_path / "steps")["postprocessing"][0]["kind"] == LARGEST
    for image in images:
        case = image.name.removesuffix("_0000.nii.gz")
        expected = (probabilities["2d", case] + probabilities["3d_fullres", case]).argmax(axis=0)
        found, geometry = read_label(tmp_path / "both" / f"{case}.nii.gz")
        assert (found == expected).mean() > 0.99
        assert (found != probabilities["2d", case].argmax(axis=0)).any()
        with_steps, _ = read_label(tmp_path / "steps" / f"{case}.nii.gz")
        expected_steps = apply_steps(found, (step,), voxel_ml=geometry.voxel_volume_ml)
        np.testing.assert_array_equal(with_steps, expected_steps)


def test_an_ensemble_gives_probabilities_and_uncertainty_of_the_mean(
    work: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    choose(work, BOTH)
    image = sorted((tiny_dataset / "imagesTs").iterdir())[0]
    autoseg.predict(
        image, tmp_path, work, device="cpu", save_probabilities=True, save_uncertainty=True, mirroring=False
    )
    (case,) = manifest(tmp_path)["cases"]
    label, _ = read_label(tmp_path / f"{case}.nii.gz")
    maps = np.stack([read_image(file)[0][0] for file in sorted((tmp_path / "probabilities" / case).iterdir())])
    background = 1 - maps.sum(axis=0)
    chosen = np.concatenate([background[None], maps])
    assert (chosen.argmax(axis=0) == label).mean() > 0.99
    disagreement = read_image(tmp_path / "uncertainty" / case / "disagreement.nii.gz")[0][0]
    # Of two folds in each of two configurations.
    assert set(np.unique((4 * disagreement).round(1))) <= {0, 1, 2, 3, 4}
    assert disagreement.max() > 0


def test_a_selection_of_other_weights_does_not_count(
    work: Path, tiny_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    choose(work, "2d")
    weights = work / "models" / "2d" / "fold_0" / "weights.safetensors"
    shutil.copy(work / "models" / "2d" / "fold_1" / "weights.safetensors", weights)
    image = sorted((tiny_dataset / "imagesTs").iterdir())[0]
    with caplog.at_level(logging.WARNING):
        autoseg.predict(image, tmp_path, work, device="cpu")
    assert manifest(tmp_path)["configuration"] == "3d_fullres"
    assert any("made with other weights" in text and "autoseg select" in text for text in caplog.messages)
    # The cross-validation is made anew, and so is what rests on it.
    before = read_cross_validation(Workspace(root=work), "2d")
    again = cross_validate(work, configuration="2d", device="cpu")
    assert before is not None
    assert again.model != before.model
    selection = autoseg.select(work, device="cpu")
    assert {known.models for known in selection.candidates if known.name == "2d"} == {(again.model,)}


def test_cross_validation_names_the_folds_that_are_missing(work: Path, tmp_path: Path) -> None:
    (work / "models" / "2d" / "fold_1" / "weights.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"2d: cannot be cross-validated: folds 1 are not .* -c 2d --fold 1'"):
        cross_validate(work, configuration="2d", device="cpu")
    shutil.rmtree(work / "models")
    with pytest.raises(TrainingError, match=r"no configuration is trained on all folds\n.*2d: folds 0,1 "):
        autoseg.select(work, device="cpu")


def put_postprocessing(work: Path, *, quality: QualityModel | None, steps: tuple[Step, ...] = ()) -> Path:
    folder = work / "models" / "3d_fullres"
    model = read_model(folder)
    weights = {fold: model.source.hash_weights(fold) for fold in model.finished}
    write_json(folder / "postprocessing.json", Postprocessing(weights=weights, steps=steps, quality=quality))
    return folder


def test_a_model_carries_its_post_processing_and_its_quality_estimate(
    work: Path, tiny_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = sorted((tiny_dataset / "imagesTs").iterdir())[0]
    step = Step(kind=LARGEST, target=FOREGROUND, values=(1, 2, 3, 4, 5))
    quality = QualityModel(intercept=0.1, slope=0.5, residual_std=0.01, correlation=0.9, low_dice=1.0, n_cases=20)
    folder = put_postprocessing(work, quality=quality, steps=(step,))
    file = autoseg.export(folder, tmp_path / "model.autoseg")
    with caplog.at_level(logging.WARNING):
        autoseg.predict(image, tmp_path / "folder", model=folder, device="cpu")
    autoseg.predict(image, tmp_path / "file", model=file, device="cpu")
    autoseg.predict(image, tmp_path / "raw", model=file, device="cpu", postprocess=False)
    (case,) = manifest(tmp_path / "file")["cases"]
    labels = {name: read_label(tmp_path / name / f"{case}.nii.gz")[0] for name in ("folder", "file", "raw")}
    np.testing.assert_array_equal(labels["folder"], labels["file"])
    expected = apply_steps(labels["raw"], (step,), voxel_ml=1)
    np.testing.assert_array_equal(labels["file"], expected)
    known = manifest(tmp_path / "folder")["cases"][case]
    assert 0.1 <= known["estimated_dice"] <= 0.6
    assert known["is_doubtful"]
    assert known["files"] == [str(image)]
    assert any("look at it" in text for text in caplog.messages)
    raw = manifest(tmp_path / "raw")["cases"][case]
    assert raw["estimated_dice"] == known["estimated_dice"]
    # One fold alone has nobody to agree with; post-processing is done all the same.
    alone = Predictor(file, device="cpu", folds=[0])
    assert (alone.steps, alone.quality) == ((step,), quality)
    prepared = alone.prepare(*read_image(image))
    assert alone.segment(prepared).estimated_dice is None


def test_the_agreement_is_that_of_the_label_maps_of_the_folds(work: Path, tiny_dataset: Path) -> None:
    quality = QualityModel(intercept=0.0, slope=1.0, residual_std=0.01, correlation=0.9, low_dice=0.0, n_cases=20)
    folder = put_postprocessing(work, quality=quality)
    image, geometry = read_image(sorted((tiny_dataset / "imagesTs").iterdir())[0])
    both = Predictor(folder, device="cpu", mirroring=False)
    prepared = both.prepare(image, geometry)
    maps = []
    for fold in (0, 1):
        one = Predictor(folder, device="cpu", folds=[fold], mirroring=False)
        logits = np.concatenate([rows.numpy() for _, rows in one.sweep(prepared, axis=0, separate=False)], axis=1)
        maps.append(logits.argmax(axis=0))
    dice = []
    for index in range(1, 6):
        first, second = (of_fold == index for of_fold in maps)
        if first.any() or second.any():
            dice.append(2 * (first & second).sum() / (first.sum() + second.sum()))
    assert both.segment(prepared).estimated_dice == pytest.approx(np.mean(dice), abs=1e-6)
    together = Ensemble([both, both]).segment([prepared, prepared])
    assert together.estimated_dice == pytest.approx(np.mean(dice), abs=1e-6)
    np.testing.assert_array_equal(together.label, both.segment(prepared).label)


def test_folds_of_other_splits_do_not_count(work: Path) -> None:
    """Their validation cases may be among those that they have learned from."""
    splits = json.loads((work / "splits.json").read_text())
    splits["folds"].reverse()
    (work / "splits.json").write_text(json.dumps(splits))
    with pytest.raises(
        TrainingError, match=r"2d: fold 0 was trained on other cases than the splits have now; train all folds anew"
    ):
        autoseg.select(work, device="cpu")
    splits["folds"] = splits["folds"][:1]
    (work / "splits.json").write_text(json.dumps(splits))
    with pytest.raises(TrainingError, match="it holds folds that the splits do not have; move or delete"):
        cross_validate(work, device="cpu")


def test_a_configuration_of_another_plan_is_left_out_and_named(work: Path) -> None:
    plan = json.loads((work / "plan.json").read_text())
    plan["configurations"]["2d"]["batch_size"] += 1
    (work / "plan.json").write_text(json.dumps(plan))
    selection = autoseg.select(work, device="cpu")
    assert [known.name for known in selection.candidates] == ["3d_fullres"]
    assert "trained by another plan" in selection.missing["2d"]


def test_a_label_that_was_mended_counts(trained: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(tiny_dataset, tmp_path / "dataset"))
    work = Path(shutil.copytree(trained, tmp_path / "work"))
    index = (work / "dataset.json").read_text().replace(str(tiny_dataset), str(copied))
    (work / "dataset.json").write_text(index)
    first = cross_validate(work, configuration="2d", device="cpu")
    case = first.evaluation.cases[0].case
    file = tmp_path / "dataset" / "labelsTr" / f"{case}.nii.gz"
    fold = first.folds[case]
    shutil.copy(work / "models" / "2d" / f"fold_{fold}" / "validation" / f"{case}.nii.gz", file)
    second = cross_validate(work, configuration="2d", device="cpu")
    scores = {known.case: known.mean_dice for known in second.evaluation.cases}
    assert scores[case] == 1
    assert first.evaluation.cases[0].mean_dice < 1


def test_results_of_other_weights_are_not_reported(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = work / "models" / "2d" / "fold_0" / "weights.safetensors"
    shutil.copy(work / "models" / "2d" / "fold_1" / "weights.safetensors", weights)
    page = autoseg.report(work).read_text()
    assert "is of other weights" in caplog.text
    assert "there is no cross-validation yet" in page


def test_an_ensemble_does_not_fit_into_one_file(work: Path, tmp_path: Path) -> None:
    choose(work, BOTH)
    with pytest.raises(PredictionError, match=r"ensemble of 2d and 3d_fullres, .* name it with -c"):
        autoseg.export(work, tmp_path / "model.autoseg")
    choose(work, "2d")
    assert read_model(autoseg.export(work, tmp_path / "model.autoseg")).configuration.name == "2d"
