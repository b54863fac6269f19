"""A model folder made by hand, and what a predictor makes of arrays in any orientation."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from label_specs import make_kidneys, make_kidneys_of_regions
from numpy.typing import NDArray
from scipy import ndimage
from tiny_plans import make_network, make_tiny_configuration, make_tiny_plan

from autoseg.core.errors import PredictionError
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import write_json
from autoseg.inference.arrays import canonical_image
from autoseg.inference.model import read_model
from autoseg.inference.predictor import Predictor, window_config
from autoseg.inference.sliding_window import predict_logits
from autoseg.networks.build import build_network
from autoseg.planning.plan import Plan
from autoseg.training.checkpoint import save_weights
from autoseg.training.folds import trained_folds
from autoseg.training.record import FoldFiles, TrainingRecord

LABELS = LabelSpec(names=("vessel", "organ"), values=(3, 117))
PAIR = make_kidneys(3, 117)
PAIR_OF_REGIONS = make_kidneys_of_regions(3, 117, both=9)
PATCH = (8, 12, 12)
SPACING_MM = (2.5, 0.8, 1.1)
RECORD = TrainingRecord(
    autoseg="0",
    torch="0",
    device="cpu",
    precision="float32",
    recipe="fast",
    seed=0,
    batch_size=2,
    mirrored=True,
    training_cases=(),
    validation_cases=(),
)
SHAPE = (9, 16, 13)


def make_plan(n_axes: int = 3, *, n_channels: int = 1, labels: LabelSpec = LABELS) -> Plan:
    configuration = make_tiny_configuration(
        PATCH[-n_axes:],
        spacing_mm=(2.0, 1.0, 1.0)[-n_axes:],
        median_shape=(10.0, 12.0, 14.0)[-n_axes:],
        largest_shape=(11.0, 16.0, 16.0)[-n_axes:],
    )
    return make_tiny_plan(configuration, labels=labels, channels=[f"MR{index}" for index in range(n_channels)])


def make_model(folder: Path, plan: Plan, *, folds: tuple[int, ...] = (0,)) -> Path:
    """A model whose every fold has other random weights."""
    write_json(folder / "plan.json", plan)
    for fold in folds:
        files = FoldFiles(folder=folder / f"fold_{fold}")
        save_weights(files.weights, make_network(plan, seed=fold))
        write_json(files.training, RECORD)
    return folder


def make_model_of_one_class(folder: Path, plan: Plan) -> Path:
    """A model that finds the first class wherever it looks."""
    make_model(folder, plan)
    network = build_network(plan.configuration(plan.recommended).network, n_channels=1, n_outputs=plan.labels.n_outputs)
    torch.nn.init.zeros_(network.get_parameter("heads.0.weight"))
    with torch.no_grad():
        network.get_parameter("heads.0.bias")[:2] = torch.tensor([0.0, 1.0])
    save_weights(FoldFiles(folder=folder / "fold_0").weights, network)
    return folder


def make_image(shape: tuple[int, ...] = SHAPE, *, seed: int = 0) -> NDArray[np.float32]:
    """Smooth noise with a border of zeros on one side, so that there is something to crop."""
    noise = np.random.default_rng(seed).normal(size=shape)
    image = ndimage.gaussian_filter(noise, [0] * (len(shape) - 3) + [1, 1.5, 1.5]).astype(np.float32)
    image[..., :2] = 0
    return image


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "grid", make_plan(), folds=(0, 2))


@pytest.fixture(scope="module")
def predictor(model: Path) -> Predictor:
    return Predictor(model, device="cpu", folds=[0])


def test_mirrored_copies_are_averaged_where_every_fold_was_trained_on_such(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "grid", make_plan(), folds=(0, 1))
    assert Predictor(folder, device="cpu").mirroring
    write_json(FoldFiles(folder=folder / "fold_1").training, replace(RECORD, mirrored=False))
    assert not Predictor(folder, device="cpu").mirroring
    assert Predictor(folder, device="cpu", folds=[0]).mirroring
    assert Predictor(folder, device="cpu", mirroring=True).mirroring


@pytest.mark.parametrize("labels", [PAIR, PAIR_OF_REGIONS], ids=["classes", "regions"])
def test_a_mirrored_image_gives_the_mirrored_map_with_the_sides_changed(tmp_path: Path, labels: LabelSpec) -> None:
    """Of any network, one of random weights too: it sees every mirrored copy of a tile."""
    predictor = Predictor(make_model(tmp_path / "grid", make_plan(labels=labels)), device="cpu", mirroring=True)
    image = np.random.default_rng(0).normal(size=PATCH).astype(np.float32)
    label = predictor.predict(image, spacing_mm=(2, 1, 1))
    mirrored = predictor.predict(image[..., ::-1], spacing_mm=(2, 1, 1))[..., ::-1]
    assert set(np.unique(label)) == {0, *labels.values}
    swapped = np.where(label == 3, 117, np.where(label == 117, 3, label))
    assert (mirrored == swapped).mean() > 0.999
    assert (mirrored != label).mean() > 0.1


@pytest.mark.parametrize("labels", [PAIR, PAIR_OF_REGIONS], ids=["classes", "regions"])
def test_in_a_cascade_what_the_first_stage_has_found_changes_sides_too(labels: LabelSpec) -> None:
    plan = make_plan(labels=labels)
    configuration = replace(plan.configuration("3d_fullres"), previous="3d_lowres")
    window = window_config(plan, configuration)
    torch.manual_seed(0)
    n_previous, n_outputs = labels.n_classes - 1, labels.n_outputs
    network = build_network(configuration.network, n_channels=1, n_outputs=n_outputs, n_previous=n_previous).eval()
    image, found = torch.randn(1, *PATCH), torch.randint(labels.n_classes, (1, *PATCH))
    swapped = torch.tensor([0, 2, 1, 3])[found]
    direct, mirrored, unswapped = (
        predict_logits(both, [network], n_outputs=n_outputs, config=window)
        for both in (
            torch.cat([image, found]),
            torch.cat([image, swapped]).flip(3),
            torch.cat([image, found]).flip(3),
        )
    )
    sides = [1, 0] if labels.regions else [0, 2, 1]
    torch.testing.assert_close(mirrored.flip(3)[sides], direct, atol=2e-2, rtol=1e-2)
    assert not torch.allclose(unswapped.flip(3)[sides], direct, atol=0.1)


def test_left_and_right_are_not_mirrored_where_a_side_has_no_counterpart() -> None:
    plan = make_plan(labels=LabelSpec(names=("appendix right", "liver"), values=(1, 2)))
    window = window_config(plan, plan.configuration("3d_fullres"))
    assert window.mirror_axes == (0, 1)
    assert window.side_axis is None


@pytest.mark.parametrize("n_axes", [2, 3])
def test_label_map_has_the_images_shape_and_the_datasets_values(tmp_path: Path, n_axes: int) -> None:
    model = make_model(tmp_path / "grid", make_plan(n_axes))
    label = Predictor(model, device="cpu").predict(make_image(), spacing_mm=SPACING_MM)
    assert label.shape == SHAPE
    assert label.dtype == np.uint8
    assert set(np.unique(label)) == {0, 3, 117}
    assert not label[..., :2].any(), "outside the crop there is background"


def test_values_above_255_come_out_as_uint16(tmp_path: Path) -> None:
    plan = make_plan(labels=LabelSpec(names=("a", "b"), values=(7, 60_000)))
    label = Predictor(make_model(tmp_path / "grid", plan), device="cpu").predict(make_image(), spacing_mm=SPACING_MM)
    assert label.dtype == np.uint16
    assert set(np.unique(label)) == {0, 7, 60_000}


def oblique_affine(spacing_xyz: tuple[float, ...]) -> NDArray[np.float64]:
    """Turned by 20 and 10 degrees, columns in millimetres."""
    first, second = np.deg2rad(20), np.deg2rad(10)
    about_z = np.array([[np.cos(first), -np.sin(first), 0], [np.sin(first), np.cos(first), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(second), -np.sin(second)], [0, np.sin(second), np.cos(second)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag(spacing_xyz)
    affine[:3, 3] = (-12.5, 40.0, 7.75)
    return affine


def test_all_48_orientations_give_the_same_map(predictor: Predictor) -> None:
    """Axes exchanged and reversed, the affine with them: the same voxels of the patient get the same labels."""
    image = make_image()
    affine = oblique_affine(SPACING_MM[::-1])
    reference = predictor.predict(image, spacing_mm=SPACING_MM, affine=affine)
    assert set(np.unique(reference)) == {0, 3, 117}
    volume, expected = image.transpose(2, 1, 0), reference.transpose(2, 1, 0)
    seen = 0
    for order, flips in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        steps = tuple(slice(None, None, step) for step in flips)
        stored = volume.transpose(order)[steps]
        # From stored indices to those of the volume.
        back = np.zeros((4, 4))
        back[3, 3] = 1
        for stored_axis, (axis, step) in enumerate(zip(order, flips, strict=True)):
            back[axis, stored_axis] = step
            back[axis, 3] = 0 if step == 1 else stored.shape[stored_axis] - 1
        spacing_xyz = [SPACING_MM[::-1][axis] for axis in order]
        label = predictor.predict(stored.transpose(2, 1, 0), spacing_mm=spacing_xyz[::-1], affine=affine @ back)
        np.testing.assert_array_equal(label.transpose(2, 1, 0), expected.transpose(order)[steps], err_msg=f"{order}")
        seen += 1
    assert seen == 48


def test_without_an_affine_the_axes_are_canonical(predictor: Predictor) -> None:
    image = make_image()
    canonical = np.diag([*SPACING_MM[::-1], 1.0])
    first = predictor.predict(image, spacing_mm=SPACING_MM)
    np.testing.assert_array_equal(first, predictor.predict(image, spacing_mm=SPACING_MM, affine=canonical))
    mirrored = np.diag([-1.1, 0.8, 2.5, 1.0])
    other = predictor.predict(image[:, :, ::-1], spacing_mm=SPACING_MM, affine=mirrored)
    np.testing.assert_array_equal(first, other[:, :, ::-1])


def test_two_predictors_are_equal_and_leave_the_image_alone(model: Path, predictor: Predictor) -> None:
    image = make_image(seed=4)
    before = image.copy()
    first = predictor.predict(image, spacing_mm=SPACING_MM)
    second = Predictor(str(model), device="cpu", folds=(0,)).predict(image, spacing_mm=SPACING_MM)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float64, np.bool_])
def test_any_real_type_is_taken(predictor: Predictor, dtype: type) -> None:
    image: NDArray = np.random.default_rng(0).integers(0, 100, SHAPE).astype(dtype)
    expected = predictor.predict(image.astype(np.float32), spacing_mm=SPACING_MM)
    np.testing.assert_array_equal(predictor.predict(image, spacing_mm=SPACING_MM), expected)
    np.testing.assert_array_equal(predictor.predict(image[None], spacing_mm=SPACING_MM), expected)


def test_folds_are_averaged_as_logits(model: Path) -> None:
    """All trained folds unless some are named; the mean of both is neither of them."""
    image = make_image(seed=1)
    both = Predictor(model, device="cpu")
    assert both.folds == (0, 2)
    assert trained_folds(model) == (0, 2)
    maps = [
        Predictor(model, device="cpu", folds=folds).predict(image, spacing_mm=SPACING_MM)
        for folds in ([0], [2], [2, 0])
    ]
    together = both.predict(image, spacing_mm=SPACING_MM)
    assert (together != maps[0]).mean() > 0.01
    assert (together != maps[1]).mean() > 0.01
    np.testing.assert_array_equal(together, maps[2])


def test_threads_share_a_predictor(predictor: Predictor) -> None:
    images = [make_image((9, 16, 13 + index), seed=index) for index in range(6)]
    expected = [predictor.predict(image, spacing_mm=SPACING_MM) for image in images]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda image: predictor.predict(image, spacing_mm=SPACING_MM), images))
    for result, label in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, label)


def test_volume_smaller_than_the_patch_is_looked_at_in_the_middle_of_zeros(model: Path, predictor: Predictor) -> None:
    shape, spacing_mm = (1, 3, 4), (2, 1, 1)
    image = np.random.default_rng(0).normal(size=shape)
    canonical, geometry = canonical_image(image, predictor.plan.channels, spacing_mm=spacing_mm, affine=None)
    prepared = predictor.prepare(canonical, geometry)
    found = torch.cat([logits for _, logits in predictor.sweep(prepared, axis=0, separate=False)], dim=1)
    before = [(patch - size) // 2 for patch, size in zip(PATCH, shape, strict=True)]
    inside = (slice(None), *(slice(start, start + size) for start, size in zip(before, shape, strict=True)))
    padded = torch.zeros(1, *PATCH)
    padded[inside] = prepared.image
    window = window_config(predictor.plan, predictor.configuration)
    expected = predict_logits(padded, [read_model(model).read_fold(0).network], n_outputs=3, config=window)[inside]
    torch.testing.assert_close(found, expected)
    values = np.array([0, *predictor.plan.labels.values])
    label = predictor.predict(image, spacing_mm=spacing_mm)
    np.testing.assert_array_equal(label, values[expected.argmax(dim=0).numpy()])


def test_volume_of_zeros_is_background(tmp_path: Path) -> None:
    predictor = Predictor(make_model_of_one_class(tmp_path / "model", make_plan()), device="cpu")
    label = predictor.predict(np.zeros((2, 3, 4)), spacing_mm=SPACING_MM)
    assert label.shape == (2, 3, 4)
    assert not label.any()
    assert predictor.predict(make_image((2, 3, 4)), spacing_mm=SPACING_MM).any()


@pytest.mark.parametrize(
    ("scheme", "minimum", "finds_air"),
    [("ct", -20.0, False), ("ct", 0.0, True), ("ct", None, True), ("zscore", -20.0, True)],
    ids=["ct", "cut off there", "unknown", "zscore"],
)
def test_what_is_below_all_foreground_of_ct_is_background(
    tmp_path: Path, scheme: str, minimum: float | None, finds_air: bool
) -> None:
    plan = make_plan()
    (channel,) = plan.normalization
    scaled = replace(channel, scheme=scheme, mean=40.0, std=20.0, percentile_99_5=90.0, minimum=minimum)
    plan = replace(plan, normalization=(scaled,))
    folder = make_model_of_one_class(tmp_path / "model", plan)
    # Tiles are 12 wide and begin every 6 voxels: the first reach no voxel of the body.
    image = np.random.default_rng(0).normal(40, 20, (8, 12, 48)).astype(np.float32)
    image[..., :24] = -1000 + image[..., :24]
    label = Predictor(folder, device="cpu").predict(image, spacing_mm=SPACING_MM)
    assert (label[..., 24:] == plan.labels.values[0]).all()
    assert (label[..., :18] != 0).all() == finds_air
    assert (label[..., :18] == 0).all() != finds_air


def test_a_structure_of_zeros_is_looked_at(tmp_path: Path) -> None:
    """A tile lies in it as a whole; the zeros around the body are background all the same."""
    folder = make_model_of_one_class(tmp_path / "model", make_plan())
    image = np.ones((48, 48, 72), np.float32)
    image[8:40, 8:40, 8:40] = 0
    image[..., 48:] = 0
    image[0, 0, -1] = 1
    label = Predictor(folder, device="cpu").predict(image, spacing_mm=SPACING_MM)
    assert label[8:40, 8:40, 8:40].all()
    assert not label[24:, 24:, 64:].any()


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 13), (2, 9, 16, 13), (1, 1, 9, 16, 13), (0, 16, 13), (1, 9, 0, 13)])
def test_wrong_shape(predictor: Predictor, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        PredictionError, match=r"found an image of shape .*, expected \(1, Z, Y, X\) with the channels MR0"
    ):
        predictor.predict(np.ones(shape), spacing_mm=SPACING_MM)


def test_wrong_number_of_channels(tmp_path: Path) -> None:
    predictor = Predictor(make_model(tmp_path / "grid", make_plan(n_channels=2)), device="cpu")
    with pytest.raises(PredictionError, match=r"\(9, 16, 13\), expected \(2, Z, Y, X\) with the channels MR0, MR1"):
        predictor.predict(make_image(), spacing_mm=SPACING_MM)
    assert predictor.predict(make_image((2, *SHAPE)), spacing_mm=SPACING_MM).shape == SHAPE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite(predictor: Predictor, value: float) -> None:
    image = make_image()
    image[3, 4, 5] = value
    with pytest.raises(PredictionError, match="found voxels that are NaN or infinite, expected finite numbers"):
        predictor.predict(image, spacing_mm=SPACING_MM)


@pytest.mark.parametrize("dtype", [np.complex64, object, "U3"])
def test_voxels_that_are_not_numbers(predictor: Predictor, dtype: type) -> None:
    with pytest.raises(PredictionError, match=r"found voxels of type .*, expected real numbers"):
        predictor.predict(np.ones(SHAPE).astype(dtype), spacing_mm=SPACING_MM)


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0), (1.0, 0.0, 1.0), (1.0, -1.0, 1.0), (1.0, np.nan, 1.0), (1,) * 4])
def test_bad_spacing(predictor: Predictor, spacing_mm: tuple[float, ...]) -> None:
    with pytest.raises(PredictionError, match=r"found the spacing .* mm, expected three positive numbers \(z, y, x\)"):
        predictor.predict(make_image(), spacing_mm=spacing_mm)


def test_spacing_and_affine_that_disagree(predictor: Predictor) -> None:
    affine = np.diag([1.1, 0.8, 3.0, 1.0])
    with pytest.raises(PredictionError, match=r"expected \(3\.0, 0\.8, 1\.1\) mm as the affine has it"):
        predictor.predict(make_image(), spacing_mm=SPACING_MM, affine=affine)


@pytest.mark.parametrize("affine", [np.zeros((4, 4)), np.eye(3), np.full((4, 4), np.nan)])
def test_bad_affine(predictor: Predictor, affine: NDArray) -> None:
    with pytest.raises(PredictionError, match="expected a finite, invertible 4x4 matrix"):
        predictor.predict(make_image(), spacing_mm=SPACING_MM, affine=affine)


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(PredictionError, match=r"nowhere: found no plan\.json, expected the folder of a trained"):
        Predictor(tmp_path / "nowhere", device="cpu")


def test_missing_fold(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PredictionError, match="found the trained folds 0, 2, expected also 1, 4; run 'autoseg train'"):
        Predictor(model, device="cpu", folds=[0, 4, 1])
    untrained = make_model(tmp_path / "grid", make_plan(), folds=())
    with pytest.raises(PredictionError, match="found no trained fold; run 'autoseg train' first"):
        Predictor(untrained, device="cpu")
    # A fold that is being trained has no final weights yet.
    (untrained / "fold_0").mkdir()
    assert trained_folds(untrained) == ()
