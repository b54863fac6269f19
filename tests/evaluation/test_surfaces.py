"""Distances of surfaces against MedPy and MONAI, on random and degenerate masks, and what they must not depend on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from medpy.metric import binary
from monai.metrics import compute_surface_dice
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.evaluation.evaluate import score_case
from autoseg.evaluation.scores import METRICS, LabelScore, ScoreSettings, Target

Mask = NDArray[np.bool_]
TOLERANCE_MM = 1.7


def score(prediction: Mask, reference: Mask, spacing_mm: Sequence[float]) -> LabelScore:
    found, wanted = (array.astype(np.uint8) for array in (prediction, reference))
    settings = ScoreSettings(tolerance_mm=TOLERANCE_MM)
    targets = [Target(name="label", values=(1,))]
    return score_case("case", found, wanted, targets, spacing_mm=spacing_mm, settings=settings).labels[0]


def monai_surface_dice(prediction: Mask, reference: Mask, spacing_mm: Sequence[float]) -> float:
    """NaN where the reference is empty, as everywhere in autoseg."""
    if not reference.any():
        return math.nan
    tensors = (torch.from_numpy(array[None, None].astype(np.float32)) for array in (prediction, reference))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty masks, which are meant
        return compute_surface_dice(*tensors, [TOLERANCE_MM], include_background=True, spacing=list(spacing_mm)).item()


def assert_equals_others(prediction: Mask, reference: Mask, spacing_mm: Sequence[float]) -> None:
    found = score(prediction, reference, spacing_mm)
    if prediction.any() and reference.any():
        hd95_mm = binary.hd95(prediction, reference, spacing_mm)
        assert found.hd95_mm == pytest.approx(hd95_mm, rel=1e-9, abs=1e-9)
        assert found.assd_mm == pytest.approx(binary.assd(prediction, reference, spacing_mm), rel=1e-9, abs=1e-9)
    else:
        assert math.isnan(found.hd95_mm)
        assert math.isnan(found.assd_mm)
    surface_dice = monai_surface_dice(prediction, reference, spacing_mm)
    assert found.surface_dice == pytest.approx(surface_dice, rel=1e-6, nan_ok=True)


def make_blob(rng: np.random.Generator, shape: tuple[int, ...]) -> Mask:
    """Smoothed noise above its 70th percentile: several objects, some of which touch the border."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), 2)
    return np.asarray(noise > np.quantile(noise, 0.7))


@pytest.mark.parametrize("shape", [(14, 17, 20), (30, 26), (3, 24, 25)])
@pytest.mark.parametrize("kind", ["blobs", "noise", "specks"])
def test_random_masks(shape: tuple[int, ...], kind: str) -> None:
    rng = np.random.default_rng(len(shape))
    for spacing_mm in ((1.0, 1.0, 1.0), (5.0, 0.7, 0.9)):
        if kind == "blobs":
            prediction, reference = make_blob(rng, shape), make_blob(rng, shape)
        else:
            prediction, reference = (rng.random(shape) < (0.5 if kind == "noise" else 0.004) for _ in range(2))
        assert_equals_others(prediction, reference, spacing_mm[-len(shape) :])


def degenerate_masks() -> dict[str, Mask]:
    shape = (7, 8, 9)
    masks = {name: np.zeros(shape, bool) for name in ("empty", "voxel", "corner", "box", "shell", "face", "scattered")}
    masks["full"] = np.ones(shape, bool)
    masks["voxel"][3, 4, 5] = True
    masks["corner"][0, 0, 0] = True
    masks["box"][2:5, 2:6, 3:7] = True
    masks["shell"][1:6, 1:7, 1:8] = True
    masks["shell"][2:5, 2:6, 2:7] = False
    masks["face"][0] = True
    masks["scattered"][[0, 0, 6, 3], [0, 7, 7, 3], [0, 8, 0, 3]] = True
    return masks


@pytest.mark.parametrize("name", degenerate_masks())
def test_degenerate_masks(name: str) -> None:
    reference = degenerate_masks()[name]
    for prediction in degenerate_masks().values():
        assert_equals_others(prediction, reference, (2.5, 0.8, 0.6))


def test_identical_masks() -> None:
    mask = make_blob(np.random.default_rng(0), (9, 10, 11))
    found = score(mask, mask, (3, 1, 1))
    assert (found.hd95_mm, found.assd_mm, found.surface_dice) == (0, 0, 1)


def test_known_distances() -> None:
    """Two planes 4 voxels of 1.5 mm apart; and a tolerance that is ten voxels of 0.17 mm but for rounding."""
    prediction, reference = np.zeros((2, 12, 5, 6), bool)
    prediction[2], reference[6] = True, True
    found = score(prediction, reference, (1.5, 1, 1))
    assert (found.hd95_mm, found.assd_mm, found.surface_dice) == pytest.approx((6, 6, 0))
    prediction[:], reference[:] = False, False
    for start in (0, 1):
        prediction[start], reference[start + 10] = True, True
        assert score(prediction, reference, (TOLERANCE_MM / 10, 1, 1)).surface_dice == 1
        prediction[start], reference[start + 10] = False, False


def test_one_slice_is_an_image() -> None:
    rng = np.random.default_rng(5)
    prediction, reference = make_blob(rng, (20, 24)), make_blob(rng, (20, 24))
    flat = score(prediction, reference, (0.7, 0.9))
    assert flat.hd95_mm == pytest.approx(binary.hd95(prediction, reference, (0.7, 0.9)))
    for axis in range(3):
        spacing_mm = [0.7, 0.9]
        spacing_mm.insert(axis, 5.0)
        found = score(np.expand_dims(prediction, axis), np.expand_dims(reference, axis), spacing_mm)
        assert [getattr(found, name) for name in METRICS] == [getattr(flat, name) for name in METRICS]
    # A single voxel, and a single row of them.
    voxel = np.ones((1, 1, 1), bool)
    assert score(voxel, voxel, (1, 1, 1)).surface_dice == 1
    row = np.array([1, 1, 0, 0, 1], bool).reshape(1, 5, 1)
    assert score(row, row[:, ::-1], (1, 2, 1)).hd95_mm == pytest.approx(binary.hd95(row[0, :, 0], row[0, ::-1, 0], 2))


def test_neither_mirroring_nor_padding_nor_the_order_of_axes_changes_anything() -> None:
    rng = np.random.default_rng(6)
    prediction, reference = make_blob(rng, (10, 12, 14)), make_blob(rng, (10, 12, 14))
    prediction[0, 0, 0] = True
    spacing_mm = (2.5, 0.8, 0.7)
    expected = [getattr(score(prediction, reference, spacing_mm), name) for name in METRICS]
    changed = {
        "mirrored": (prediction[::-1, :, ::-1], reference[::-1, :, ::-1], spacing_mm),
        "padded": (
            np.pad(prediction, ((2, 0), (9, 1), (0, 30))),
            np.pad(reference, ((2, 0), (9, 1), (0, 30))),
            spacing_mm,
        ),
        "transposed": (prediction.transpose(2, 0, 1), reference.transpose(2, 0, 1), (0.7, 2.5, 0.8)),
    }
    for name, arguments in changed.items():
        found = score(*arguments)
        assert [getattr(found, metric) for metric in METRICS] == pytest.approx(expected, rel=1e-9), name


def test_prediction_and_reference_may_change_places() -> None:
    rng = np.random.default_rng(7)
    prediction, reference = make_blob(rng, (10, 12, 14)), make_blob(rng, (10, 12, 14))
    first, second = score(prediction, reference, (2, 1, 1)), score(reference, prediction, (2, 1, 1))
    symmetric = ("dice", "iou", "hd95_mm", "assd_mm", "surface_dice", "lesion_f1")
    assert [getattr(first, name) for name in symmetric] == pytest.approx([getattr(second, name) for name in symmetric])
    assert first.precision == second.recall
    assert first.lesion_precision == second.lesion_recall


def test_a_stray_voxel_far_away_is_measured_where_it_is() -> None:
    """Empty planes between objects are left out of the work, not out of the distances."""
    reference, prediction = np.zeros((2, 60, 70, 80), bool)
    reference[20:30, 20:32, 20:35] = True
    prediction[21:31, 20:32, 19:35] = True
    prediction[[0, 59, 59, 2], [0, 69, 3, 2], [0, 79, 77, 0]] = True
    assert_equals_others(prediction, reference, (3.0, 0.8, 0.7))
    assert score(prediction, reference, (3.0, 0.8, 0.7)).n_predicted_lesions == 5
