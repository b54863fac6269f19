"""Folders of real files, scored from end to end."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import math
from pathlib import Path

import nibabel
import numpy as np
import pytest
from medpy.metric import binary
from numpy.typing import NDArray
from typer.testing import CliRunner

from autoseg.cli import app
from autoseg.core.errors import AutosegError, DatasetError
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import read_json, write_json
from autoseg.evaluation.evaluate import score_case, summarise_scores
from autoseg.evaluation.folders import evaluate_folders
from autoseg.evaluation.scores import METRICS, UNKNOWN, CaseScore, Evaluation, LabelScore, ScoreSettings, Target
from autoseg.evaluation.tables import write_csv
from autoseg.pipeline import evaluate

AFFINE = np.diag([0.8, 0.9, 2.5, 1.0])


def save(file: Path, label: NDArray, affine: NDArray = AFFINE) -> Path:
    """Writes (X, Y, Z)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(label, affine)
    nibabel.save(image, file)
    return file


def make_label(seed: int, *, shape: tuple[int, int, int] = (6, 7, 8), values: tuple[int, ...] = (0, 3, 117)) -> NDArray:
    return np.random.default_rng(seed).choice(np.array(values, np.uint8), shape)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three cases with a prediction each."""
    for seed, case in enumerate(("a", "b", "c")):
        save(tmp_path / "reference" / f"{case}.nii.gz", make_label(seed))
        save(tmp_path / "prediction" / f"{case}.nii.gz", make_label(seed + 10))
    (tmp_path / "prediction" / "prediction.json").write_text("{}")
    (tmp_path / "prediction" / ".a.nii.gz").write_text("half a file")
    return tmp_path / "prediction", tmp_path / "reference"


def dice_by_hand(first: NDArray, second: NDArray, value: int) -> float:
    return float(2 * ((first == value) & (second == value)).sum() / ((first == value).sum() + (second == value).sum()))


def test_scores_equal_those_by_hand(folders: tuple[Path, Path], tmp_path: Path) -> None:
    evaluation = evaluate_folders(*folders)
    assert [case.case for case in evaluation.cases] == ["a", "b", "c"]
    assert list(evaluation.label_dice) == ["label 3", "label 117"]
    expected = np.array(
        [[dice_by_hand(make_label(seed + 10), make_label(seed), value) for value in (3, 117)] for seed in range(3)]
    )
    np.testing.assert_allclose([[label.dice for label in case.labels] for case in evaluation.cases], expected)
    np.testing.assert_allclose([case.mean_dice for case in evaluation.cases], expected.mean(axis=1))
    np.testing.assert_allclose(list(evaluation.label_dice.values()), expected.mean(axis=0))
    assert evaluation.mean_dice == pytest.approx(expected.mean())
    assert evaluation.not_scored == ()
    write_json(tmp_path / "evaluation.json", evaluation)
    assert read_json(tmp_path / "evaluation.json", Evaluation) == evaluation


def test_named_labels_and_a_label_that_no_case_has(folders: tuple[Path, Path]) -> None:
    spec = LabelSpec(names=("organ", "tumour"), values=(117, 9))
    evaluation = evaluate_folders(*folders, labels=spec)
    assert list(evaluation.label_dice) == ["organ", "tumour"]
    assert math.isnan(evaluation.label_dice["tumour"])
    assert evaluation.mean_dice == evaluation.label_dice["organ"]
    assert {label.status for case in evaluation.cases for label in case.labels} == {"ok", "in neither"}


def test_same_map_in_another_orientation_scores_one(tmp_path: Path) -> None:
    label = make_label(0)
    save(tmp_path / "reference" / "a.nii.gz", label)
    back = np.diag([-1.0, 1.0, -1.0, 1.0])
    back[:3, 3] = (label.shape[0] - 1, 0, label.shape[2] - 1)
    save(tmp_path / "prediction" / "a.nii.gz", label[::-1, :, ::-1].astype(np.float32), AFFINE @ back)
    evaluation = evaluate_folders(tmp_path / "prediction", tmp_path / "reference")
    assert evaluation.mean_dice == 1


def test_missing_and_surplus_predictions(folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    prediction, reference = folders
    (prediction / "b.nii.gz").unlink()
    (reference / "c.nii.gz").unlink()
    with caplog.at_level(logging.WARNING):
        evaluation = evaluate_folders(prediction, reference)
    assert [case.case for case in evaluation.cases] == ["a"]
    assert evaluation.not_scored == ("b",)
    assert "1 predictions have no reference and are not scored: c" in caplog.text


def test_all_cases_that_cannot_be_compared_are_in_one_error(folders: tuple[Path, Path]) -> None:
    prediction, reference = folders
    save(prediction / "a.nii.gz", make_label(0, shape=(6, 7, 9)))
    moved = AFFINE.copy()
    moved[0, 3] = 5
    save(prediction / "b.nii.gz", make_label(0), moved)
    (prediction / "c.nii.gz").write_bytes(b"not an image")
    save(prediction / "d.nii.gz", make_label(0).astype(np.float32) + 0.5)
    save(reference / "d.nii.gz", make_label(0))
    save(prediction / "e.nii.gz", make_label(0).astype(np.int16) - 1)
    save(reference / "e.nii.gz", make_label(0))
    for labels in (None, LabelSpec(names=("organ",), values=(117,))):
        with pytest.raises(DatasetError) as caught:
            evaluate_folders(prediction, reference, labels=labels)
        message = str(caught.value)
        assert "5 cases cannot be scored" in message
        assert "a: found the shape (9, 7, 6) (z, y, x), expected (8, 7, 6)" in message
        assert "b: found an affine that puts a corner" in message
        for words in ("c.nii.gz: cannot be read", "d.nii.gz: found", "label map with negative values (1)\n  - e"):
            assert words in message
        assert message.count("What to do") >= 2


def test_nothing_in_common(folders: tuple[Path, Path], tmp_path: Path) -> None:
    save(tmp_path / "other" / "x.nii.gz", make_label(0))
    with pytest.raises(DatasetError, match=r"no file name in common: found a, b, c and x"):
        evaluate_folders(folders[0], tmp_path / "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"found no label map and a, b, c"):
        evaluate_folders(tmp_path / "empty", folders[1])
    with pytest.raises(DatasetError, match="nowhere: no such file or folder"):
        evaluate_folders(tmp_path / "nowhere", folders[1])


def test_folders_of_one_file_each_need_the_same_name(tmp_path: Path) -> None:
    first = save(tmp_path / "prediction" / "a.nii.gz", make_label(0))
    second = save(tmp_path / "reference" / "b.nii.gz", make_label(1))
    with pytest.raises(DatasetError, match="no file name in common"):
        evaluate_folders(first.parent, second.parent)
    # Two files that are named one by one are meant for each other.
    evaluation = evaluate_folders(first, second)
    assert [case.case for case in evaluation.cases] == ["a"]
    assert evaluation.cases[0].labels[0].dice == pytest.approx(dice_by_hand(make_label(0), make_label(1), 3))


def test_one_file_is_found_in_a_folder(folders: tuple[Path, Path]) -> None:
    evaluation = evaluate_folders(folders[0] / "b.nii.gz", folders[1])
    assert [case.case for case in evaluation.cases] == ["b"]


def test_all_background_is_an_error(tmp_path: Path) -> None:
    for name in ("prediction", "reference"):
        save(tmp_path / name / "a.nii.gz", np.zeros((3, 4, 5), np.uint8))
    with pytest.raises(DatasetError, match="every voxel is background"):
        evaluate_folders(tmp_path / "prediction", tmp_path / "reference")


# -- what is chosen ----------------------------------------------------------------------------------------------------


def test_distances_are_in_the_files_own_millimetres(folders: tuple[Path, Path]) -> None:
    evaluation = evaluate_folders(*folders)
    first, second = make_label(10) == 3, make_label(0) == 3
    found = evaluation.cases[0].labels[0]
    assert found.hd95_mm == pytest.approx(binary.hd95(first, second, (0.8, 0.9, 2.5)))
    assert found.reference_ml == pytest.approx(second.sum() * 0.8 * 0.9 * 2.5 / 1000)


def test_regions_and_the_ignored_value(folders: tuple[Path, Path]) -> None:
    settings = ScoreSettings(ignore=117)
    evaluation = evaluate_folders(*folders, regions={"whole": (3, 4)}, settings=settings)
    assert list(evaluation.label_dice) == ["label 3", "whole"]
    first, second = make_label(10), make_label(0)
    expected = dice_by_hand(np.where(second == 117, 0, first), second, 3)
    assert [label.dice for label in evaluation.cases[0].labels] == [pytest.approx(expected)] * 2
    assert evaluation.settings == settings
    with pytest.raises(AutosegError, match="value 117 is to be ignored, but whole has it"):
        evaluate_folders(*folders, regions={"whole": (3, 117)}, settings=settings)
    spec = LabelSpec(names=("organ",), values=(117,))
    with pytest.raises(AutosegError, match="organ: is the name of a label"):
        evaluate_folders(*folders, labels=spec, regions={"organ": (3,)})
    with pytest.raises(AutosegError, match="from 1 to 65535"):
        evaluate_folders(*folders, regions={"organ": ()})


# -- what is written ---------------------------------------------------------------------------------------------------


def read_rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_every_score_is_in_the_table(folders: tuple[Path, Path], tmp_path: Path) -> None:
    spec = LabelSpec(names=("organ", "tumour"), values=(117, 9))
    evaluation = evaluate_folders(*folders, labels=spec, regions={"all": (3, 117)})
    write_csv(tmp_path / "scores.csv", evaluation)
    rows = read_rows(tmp_path / "scores.csv")
    scores = [(case.case, score) for case in evaluation.cases for score in case.labels]
    assert len(rows) == len(scores) == 9
    for row, (case, score) in zip(rows, scores, strict=True):
        assert list(row) == ["case", *(field.name for field in dataclasses.fields(LabelScore))]
        assert (row["case"], row["label"], row["status"]) == (case, score.label, score.status)
        assert row["values"] == " ".join(map(str, score.values))
        for name in ("dice", "hd95_mm", "volume_error", "lesion_f1"):
            value = getattr(score, name)
            assert row[name] == ("" if math.isnan(value) else repr(value))
    assert "" in {row["dice"] for row in rows}


def test_names_do_not_become_formulas(tmp_path: Path) -> None:
    names = ("=1+1", "+a", "-b", "@sum", "'quoted", "plain=1", 'with "quotes", and a comma')
    for name in names:
        save(tmp_path / "prediction" / f"{name}.nii", make_label(0, values=(0, 0, 3, 117)))
        save(tmp_path / "reference" / f"{name}.nii", make_label(1))
    spec = LabelSpec(names=('=HYPERLINK("x")', "organ"), values=(3, 117))
    evaluation = evaluate_folders(tmp_path / "prediction", tmp_path / "reference", labels=spec)
    write_csv(tmp_path / "scores.csv", evaluation)
    rows = read_rows(tmp_path / "scores.csv")
    assert {row["case"] for row in rows} == {f"'{name}" if name[0] in "=+-@" else name for name in names}
    assert {row["label"] for row in rows} == {'\'=HYPERLINK("x")', "organ"}
    # A number stays one, also below zero.
    assert all(float(row["volume_error"]) < 0 for row in rows)


def test_files_beside_the_label_maps_and_none_for_single_files(folders: tuple[Path, Path]) -> None:
    prediction, reference = folders
    (prediction / "prediction.json").unlink()
    before = set(prediction.iterdir())
    single = evaluate(prediction / "a.nii.gz", reference / "a.nii.gz")
    assert set(prediction.iterdir()) == before
    evaluation = evaluate(prediction, reference)
    assert {file.name for file in set(prediction.iterdir()) - before} == {"evaluation.json", "evaluation.csv"}
    assert read_json(prediction / "evaluation.json", Evaluation) == evaluation
    assert evaluation.cases[0] == single.cases[0]


# -- the command line --------------------------------------------------------------------------------------------------


def test_command_with_regions_and_an_ignored_value(folders: tuple[Path, Path]) -> None:
    prediction, reference = folders
    (prediction / "prediction.json").unlink()
    options = ["--region", "whole=3,4", "--region", "other=4", "--ignore", "117"]
    options += ["--beta", "1", "--tolerance", "1.5", "--lesion-iou", "0.3"]
    done = CliRunner().invoke(app, ["evaluate", str(prediction), str(reference), *options])
    assert done.exit_code == 0, done.output
    content = json.loads((prediction / "evaluation.json").read_text())
    assert content["settings"] == {"beta": 1, "tolerance_mm": 1.5, "min_lesion_iou": 0.3, "ignore": 117}
    assert [label["label"] for label in content["labels"]] == ["label 3", "whole", "other"]
    assert content["labels"][0]["metrics"]["f_beta"] == content["labels"][0]["metrics"]["dice"]
    evaluation = read_json(prediction / "evaluation.json", Evaluation)
    dice = evaluation.labels[0].metrics["dice"]
    lines = done.output.splitlines()
    assert f"label 3  3       0      0  {dice.mean:.3f} [{dice.low:.3f}, {dice.high:.3f}]" in done.output
    assert next(line.split() for line in lines if line.startswith("other  "))[1:] == ["0", "0", "0", *["-"] * 7]
    assert "surfaces\nat 1.5 mm" in done.output
    assert "from an IoU of 0.3" in done.output
    assert max(map(len, lines[:-1])) <= 105
    assert str(prediction / "evaluation.csv") in lines[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--region", "whole"), "for instance whole=1,2"),
        (("--tolerance", "-1"), "the tolerance is -1"),
        (("--region", "whole=3", "--ignore", "3"), "is to be ignored, but whole has it"),
    ],
)
def test_command_refuses_what_has_no_meaning(
    folders: tuple[Path, Path], options: tuple[str, ...], message: str
) -> None:
    prediction, reference = folders
    (prediction / "prediction.json").unlink()
    done = CliRunner().invoke(app, ["evaluate", str(prediction), str(reference), *options])
    assert isinstance(done.exception, AutosegError)
    assert message in str(done.exception)
    assert not (prediction / "evaluation.json").exists()


# -- one case ----------------------------------------------------------------------------------------------------------

TARGETS = (
    Target(name="whole", values=(1, 2)),
    Target(name="core", values=(2,)),
    Target(name="vessel", values=(3,)),
)


def score(prediction: NDArray, reference: NDArray, *unknown: str, ignore: int | None = None) -> CaseScore:
    return score_case(
        "c",
        prediction,
        reference,
        TARGETS,
        spacing_mm=(2.5, 0.9, 0.8),
        settings=ScoreSettings(ignore=ignore),
        is_known=lambda name: name not in unknown,
    )


def test_what_was_not_looked_for_is_not_scored_and_left_out_of_means() -> None:
    values = (0, 1, 2, 3)
    pairs = [(make_label(seed, values=values), make_label(seed + 10, values=values)) for seed in range(3)]
    known = [score(*pair) for pair in pairs]
    partly = [known[0], score(*pairs[1], "core"), score(*pairs[2], "core", "vessel")]
    assert [[label.status for label in case.labels] for case in partly] == [
        ["ok", "ok", "ok"],
        ["ok", UNKNOWN, "ok"],
        ["ok", UNKNOWN, UNKNOWN],
    ]
    hidden = partly[1].labels[1]
    assert (hidden.label, hidden.values, hidden.n_reference, hidden.n_predicted) == ("core", (2,), 0, 0)
    assert all(math.isnan(getattr(hidden, name)) for name in METRICS)
    # The others are as without it.
    assert partly[1].labels[0] == known[1].labels[0]
    dice = np.array([[label.dice for label in case.labels] for case in known])
    assert partly[1].mean_dice == pytest.approx(dice[1, [0, 2]].mean())
    assert partly[2].mean_dice == pytest.approx(dice[2, 0])
    summary = summarise_scores(partly, settings=ScoreSettings())
    expected = [dice[:, 0].mean(), dice[0, 1], dice[:2, 2].mean()]
    assert [label.metrics["dice"].mean for label in summary.labels] == pytest.approx(expected)
    assert [label.metrics["dice"].n for label in summary.labels] == [3, 1, 2]
    assert [label.n_cases for label in summary.labels] == [3, 1, 2]
    assert summary.mean_dice == pytest.approx(np.mean(expected))


def test_an_unknown_structure_is_neither_missed_nor_a_false_alarm() -> None:
    empty, full = np.zeros((4, 5, 6), np.uint8), np.full((4, 5, 6), 3, np.uint8)
    for pair in ((empty, full), (full, empty)):
        summary = summarise_scores([score(*pair, "vessel")], settings=ScoreSettings())
        vessel = summary.labels[2]
        assert (vessel.n_cases, vessel.n_missed, vessel.n_false) == (0, 0, 0)
        assert math.isnan(vessel.metrics["dice"].mean)


def test_ignored_voxels_are_scored_for_no_target() -> None:
    """Nor for regions, and wherever they lie; the same voxels cut away give the same counts."""
    prediction, reference = (make_label(seed, values=(0, 1, 2, 3)) for seed in (0, 1))
    hidden = reference.copy()
    hidden[:3] = 9
    scores = score(prediction, hidden, ignore=9)
    cut = score(prediction[3:], reference[3:])
    for found, expected in zip(scores.labels, cut.labels, strict=True):
        assert (found.n_reference, found.n_predicted) == (expected.n_reference, expected.n_predicted)
        assert found.dice == expected.dice
    nothing = score(prediction, np.full_like(reference, 9), ignore=9)
    assert [label.status for label in nothing.labels] == ["in neither"] * 3
    assert math.isnan(nothing.mean_dice)
