"""Charts are read back: bars are as long as they should be, and lines are where they should be, solid or dashed."""

from __future__ import annotations

import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from training_logs import make_epochs

from autoseg.evaluation.crossval import N_CONFIDENCE_BINS, Calibration
from autoseg.evaluation.evaluate import summarise_scores
from autoseg.evaluation.scores import MISSED, OK, CaseScore, Evaluation, LabelScore, ScoreSettings
from autoseg.reporting.agreement_figures import (
    compare_volumes,
    draw_bland_altman,
    draw_calibration,
    draw_confusion,
    normalise_rows,
)
from autoseg.reporting.charts import BAR, MAX_NAME, MEAN_COLOUR, MEDIAN_COLOUR, safe_names, safe_text
from autoseg.reporting.results_figures import (
    collect_scores,
    draw_case_bars,
    draw_label_dice,
    draw_learning_curves,
    draw_volumes,
    smooth_centred,
)
from autoseg.training.record import EpochFigures

HOSTILE = "$x^{$ \\frac \x1b[31m \u202e 心臓 _{ <b>"


def make_score(label: str, dice: float, *, reference_ml: float = 1.0, predicted_ml: float = 1.0) -> LabelScore:
    return LabelScore(
        label=label,
        values=(1,),
        status=MISSED if dice == 0 else OK,
        n_reference=1000,
        n_predicted=1000,
        reference_ml=reference_ml,
        predicted_ml=predicted_ml,
        dice=dice,
        iou=dice,
        precision=dice,
        recall=dice,
        f_beta=dice,
        volume_error=0.0,
        hd95_mm=1.0,
        assd_mm=0.5,
        surface_dice=dice,
        n_lesions=1,
        n_predicted_lesions=1,
        n_matched_lesions=1,
        lesion_f1=1.0,
        lesion_recall=1.0,
        lesion_precision=1.0,
    )


def make_evaluation(dice: dict[str, list[float]], labels: tuple[str, ...] = ("heart",)) -> Evaluation:
    """Cases by name, with the Dice of every label; NaN where the reference lacks it."""
    cases = []
    for name, values in dice.items():
        scores = tuple(make_score(label, value) for label, value in zip(labels, values, strict=True))
        known = [value for value in values if math.isfinite(value)]
        cases.append(CaseScore(case=name, labels=scores, mean_dice=float(np.mean(known)) if known else math.nan))
    return summarise_scores(cases, settings=ScoreSettings())


def read_picture(path: Path) -> NDArray[np.float64]:
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return matplotlib.image.imread(path)[..., :3].astype(np.float64)


def find_colour(picture: NDArray[np.float64], colour: str) -> NDArray[np.bool_]:
    return np.abs(picture - to_rgb(colour)).max(axis=-1) < 0.03


def count_runs(line: NDArray[np.bool_]) -> int:
    return int((np.diff(np.concatenate([[0], line.astype(int)])) == 1).sum())


def make_curve(n: int, *, worse: float = 0.0) -> list[EpochFigures]:
    """Without the Dice of the second epoch."""
    return [
        replace(
            figures,
            validation_loss=figures.validation_loss + worse,
            validation_dice=math.nan if figures.epoch == 2 else figures.validation_dice,
        )
        for figures in make_epochs(n)
    ]


def test_scores_as_a_table() -> None:
    evaluation = make_evaluation({"a": [0.5, math.nan], "b": [0.25, 1.0]}, ("x", "y"))
    np.testing.assert_array_equal(collect_scores(evaluation), [[0.5, math.nan], [0.25, 1.0]])


def test_bars_are_as_long_as_the_dice(tmp_path: Path) -> None:
    evaluation = make_evaluation({"good": [1.0], "bad": [0.25], "none": [math.nan]})
    picture = read_picture(draw_case_bars(tmp_path / "a.png", evaluation))
    lengths = find_colour(picture, BAR).sum(axis=1)
    rows = np.flatnonzero(lengths > 0.5 * lengths.max())
    short = np.flatnonzero((lengths > 0.1 * lengths.max()) & (lengths < 0.4 * lengths.max()))
    assert short.max() < rows.min(), "the worst is on top"
    # Text and lines hide parts of a bar, but not in all of its rows.
    assert lengths[short].max() / lengths.max() == pytest.approx(0.25, abs=0.02)
    assert count_runs(lengths > 0.1 * lengths.max()) == 2, "without a Dice there is no bar"


@pytest.mark.parametrize("n", [1, 60, 61, 1000])
def test_any_number_of_cases_fits(tmp_path: Path, n: int) -> None:
    evaluation = make_evaluation({f"case_{i}": [1 - i / n / 2] for i in range(n)})
    path = draw_case_bars(tmp_path / "a.png", evaluation)
    height, width, _ = read_picture(path).shape
    assert width == 1000
    assert height < 3000
    assert path.stat().st_size < 400_000


def test_the_mean_is_solid_and_red_and_the_median_dashed_and_green(tmp_path: Path) -> None:
    # Far apart, so that neither hides the other.
    evaluation = make_evaluation({f"case_{i}": [value] for i, value in enumerate([0.1, 0.9, 0.9, 0.95, 0.9])})
    for draw in (draw_label_dice, draw_case_bars):
        picture = read_picture(draw(tmp_path / "a.png", evaluation))
        # Not the samples in the legend.
        below = picture[80:]
        n_pieces = {}
        for colour in (MEAN_COLOUR, MEDIAN_COLOUR):
            found = find_colour(below, colour)
            column = found[:, found.sum(axis=0).argmax()]
            assert column.sum() > 30
            n_pieces[colour] = count_runs(column)
        assert n_pieces[MEAN_COLOUR] == 1
        assert n_pieces[MEDIAN_COLOUR] >= 3
        mean, median = (
            np.flatnonzero(find_colour(below, colour).any(axis=0)).mean() for colour in (MEAN_COLOUR, MEDIAN_COLOUR)
        )
        assert mean < median


def test_labels_that_no_case_has(tmp_path: Path) -> None:
    evaluation = make_evaluation({"a": [0.5, math.nan], "b": [0.7, math.nan]}, ("x", "y"))
    draw_label_dice(tmp_path / "a.png", evaluation)
    draw_label_dice(tmp_path / "b.png", make_evaluation({"a": [math.nan]}))
    draw_case_bars(tmp_path / "c.png", make_evaluation({"a": [math.nan]}))
    draw_volumes(tmp_path / "d.png", {"x": np.zeros(0), "y": np.array([2.0])})
    draw_volumes(tmp_path / "e.png", {"x": np.zeros(0)})
    assert len(list(tmp_path.iterdir())) == 5


def test_many_labels_have_a_row_each(tmp_path: Path) -> None:
    labels = tuple(f"organ {i}" for i in range(118))
    evaluation = make_evaluation({f"c{i}": [0.5 + i / 20 + j / 1000 for j in range(118)] for i in range(5)}, labels)
    path = draw_label_dice(tmp_path / "a.png", evaluation)
    found = find_colour(read_picture(path)[80:], MEAN_COLOUR)
    assert count_runs(np.asarray(found.any(axis=1))) == 118
    assert path.stat().st_size < 600_000


def test_learning_curves_of_some_folds(tmp_path: Path) -> None:
    curves = {0: make_curve(40), 1: [], 3: make_curve(1), 7: make_curve(300, worse=0.2)}
    assert read_picture(draw_learning_curves(tmp_path / "a.png", curves)).shape[1] == 1000
    many = {fold: make_curve(5, worse=fold / 50) for fold in range(20)}
    assert read_picture(draw_learning_curves(tmp_path / "b.png", many)).shape[1] == 1000


def test_smoothing_does_not_lag() -> None:
    line = np.linspace(0, 1, 1000)
    np.testing.assert_allclose(smooth_centred(line), line, atol=1e-12)
    noisy = line + np.random.default_rng(0).normal(0, 0.1, 1000)
    assert np.abs(smooth_centred(noisy)[50:-50] - line[50:-50]).max() < 0.06
    holes = np.where(np.arange(1000) % 3 == 0, np.nan, 2.0)
    np.testing.assert_array_equal(smooth_centred(holes), holes)
    assert smooth_centred(np.zeros(0)).size == 0


def test_rows_of_a_confusion_add_up_to_one() -> None:
    parts = normalise_rows([[8, 2], [0, 0]])
    np.testing.assert_array_equal(parts, [[0.8, 0.2], [math.nan, math.nan]])


def test_volumes_agree_as_bland_and_altman_say(tmp_path: Path) -> None:
    pairs = {"a": (10.0, 11.0), "b": (20.0, 23.0), "c": (0.0, 0.0), "d": (30.0, 32.0)}
    cases = [
        CaseScore(
            case=name,
            labels=(
                make_score("same", 1.0, reference_ml=5.0, predicted_ml=5.0),
                make_score("larger", 0.9, reference_ml=reference, predicted_ml=predicted),
            ),
            mean_dice=0.95,
        )
        for name, (reference, predicted) in pairs.items()
    ]
    larger, same = compare_volumes(summarise_scores(cases, settings=ScoreSettings()))
    assert (larger.label, same.label) == ("larger", "same"), "the one that disagrees most comes first"
    assert larger.mean_ml.tolist() == [10.5, 21.5, 31.0], "where neither has the label there is nothing to compare"
    assert larger.bias_ml == 2.0
    assert larger.limits_ml == pytest.approx((2 - 1.96, 2 + 1.96))
    picture = read_picture(draw_bland_altman(tmp_path / "a.png", larger))
    # Rows grow downwards: the mean difference is above 0, which is in the middle of the axes.
    rows = np.flatnonzero(find_colour(picture, MEAN_COLOUR).sum(axis=1) > 100)
    assert 100 < rows.mean() < 0.4 * picture.shape[0]


def test_one_case_has_no_limits(tmp_path: Path) -> None:
    (agreement,) = compare_volumes(make_evaluation({"a": [0.9]}))
    assert agreement.limits_ml is None
    draw_bland_altman(tmp_path / "a.png", agreement)


def test_empty_bins_of_a_calibration(tmp_path: Path) -> None:
    empty = [math.nan] * N_CONFIDENCE_BINS
    counts = [0] * N_CONFIDENCE_BINS
    sure, right = [*empty[:-1], 0.97], [*empty[:-1], 0.9]
    calibration = Calibration(n_voxels=(*counts[:-1], 1234), confidence=tuple(sure), accuracy=tuple(right))
    assert calibration.expected_error == pytest.approx(0.07)
    assert draw_calibration(tmp_path / "a.png", calibration).is_file()


def test_names_are_drawn_letter_by_letter(tmp_path: Path) -> None:
    evaluation = make_evaluation({HOSTILE: [0.5], HOSTILE + "2": [0.6]}, (HOSTILE,))
    with warnings.catch_warnings():
        # Of letters that the font lacks, matplotlib warns.
        warnings.simplefilter("error")
        draw_case_bars(tmp_path / "a.png", evaluation)
        draw_label_dice(tmp_path / "b.png", evaluation)
        draw_confusion(tmp_path / "c.png", [[1, 2], [3, 4]], ["background", HOSTILE])
        draw_bland_altman(tmp_path / "d.png", compare_volumes(evaluation)[0])
        draw_volumes(tmp_path / "e.png", {HOSTILE: np.array([0.01, 100.0])})
    assert safe_text("a$b$c\n心") == r"a\$b\$c\n" + "\N{WHITE SQUARE}"


def test_short_names_stay_different() -> None:
    names = [f"a_very_long_name_of_a_case_{i:03}" for i in range(3)]
    short = safe_names(names)
    assert [name[-3:] for name in short] == ["000", "001", "002"]
    assert max(map(len, short)) <= MAX_NAME
    assert len(set(safe_names(["心臓", "肝臓", "a" * 30 + "b" * 30, "a" * 31 + "b" * 30]))) == 4
    assert safe_names(["liver"]) == ["liver"]


def test_charts_from_several_threads_are_the_same(tmp_path: Path) -> None:
    evaluation = make_evaluation({f"case_{i}": [0.5 + i / 50, 0.9] for i in range(20)}, ("x", "y"))
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda i: draw_label_dice(tmp_path / f"{i}.png", evaluation), range(8)))
    assert len({path.read_bytes() for path in paths}) == 1
