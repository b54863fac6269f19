"""From logits to the label map on the scan's grid, against a plain implementation in float64 written here."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_specs import OVERLAPPING
from numpy.typing import NDArray
from torch import Tensor

from autoseg.core.geometry import Box, make_geometry
from autoseg.core.labels import LabelSpec, Region
from autoseg.inference import restore
from autoseg.inference.restore import GridChange, interpolated_argmax, restore_rows
from autoseg.inference.volumes import LabelMap
from autoseg.networks.outputs import Outputs
from autoseg.preprocessing.preprocess import CaseRecord
from autoseg.preprocessing.resample import LINEAR, axis_matrix, resample_logits

Shape = tuple[int, int, int]
# Of the largest logit; two classes that are closer are at a tie, which rounding may decide.
TIE_FRACTION = 1e-6
SIZES = st.integers(1, 7)
SHAPES = st.tuples(SIZES, SIZES, SIZES)
TARGETS = st.tuples(*[st.integers(1, 12)] * 3)
NEAREST_AXES = st.sampled_from([None, 0, 1, 2])


pytestmark = pytest.mark.usefixtures("one_thread")


def interpolate_by_hand(logits: Tensor, shape: Shape, nearest_axis: int | None) -> NDArray[np.float64]:
    """(K, *shape) float64: along one axis after the other by the definition; borders repeat."""
    result = logits.double().numpy()
    for axis, n_out in enumerate(shape):
        n_in = result.shape[axis + 1]
        position = (np.arange(n_out) + 0.5) * n_in / n_out
        if axis == nearest_axis:
            result = result.take(np.minimum(position.astype(int), n_in - 1), axis + 1)
            continue
        position = np.clip(position - 0.5, 0, n_in - 1)
        below = np.floor(position).astype(int)
        weight = (position - below).reshape([-1 if other == axis else 1 for other in range(3)])
        above = np.minimum(below + 1, n_in - 1)
        result = (1 - weight) * result.take(below, axis + 1) + weight * result.take(above, axis + 1)
    return result


def check_argmax(classes: NDArray, logits: Tensor, shape: Shape, nearest_axis: int | None) -> None:
    """The classes are those with the largest logit, but for ties that rounding decides."""
    exact = interpolate_by_hand(logits, shape, nearest_axis)
    assert classes.shape == shape
    chosen = np.take_along_axis(exact, classes[None].astype(np.int64), axis=0)[0]
    largest = float(logits.abs().max())
    differing = classes != exact.argmax(axis=0)
    assert (exact.max(axis=0) - chosen)[differing].max(initial=0) <= TIE_FRACTION * largest


def random_logits(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def blocky_logits(n_classes: int, shape: Shape, seed: int = 0) -> Tensor:
    """As of a trained network: at nearly every voxel one class is far above the others, and they lie in blocks."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, n_classes, [-(-size // 3) for size in shape])
    label = coarse.repeat(3, 0).repeat(3, 1).repeat(3, 2)[: shape[0], : shape[1], : shape[2]]
    logits = rng.normal(size=(n_classes, *shape)).astype(np.float32)
    np.put_along_axis(logits, label[None], 8 + logits[:1], axis=0)
    return torch.from_numpy(logits)


def classes_last(logits: Tensor) -> Tensor:
    """The same logits, (K, Z, Y, X), with the classes last in memory."""
    return logits.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


@settings(max_examples=150, deadline=None)
@given(
    n_classes=st.integers(1, 6),
    shape=SHAPES,
    target=TARGETS,
    nearest_axis=NEAREST_AXES,
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    last=st.booleans(),
    blocky=st.booleans(),
    limits=st.sampled_from([(1, 1, 20), (400, 40, 90), (2**26, 2**22, 2**21)]),
    seed=st.integers(0, 99),
)
def test_the_largest_interpolated_logit_wins(
    n_classes: int,
    shape: Shape,
    target: Shape,
    nearest_axis: int | None,
    dtype: torch.dtype,
    last: bool,
    blocky: bool,
    limits: tuple[int, int, int],
    seed: int,
) -> None:
    made = blocky_logits(n_classes, shape, seed) if blocky else random_logits((n_classes, *shape), seed)
    logits = made.to(dtype)
    before = logits.clone()
    with pytest.MonkeyPatch.context() as patch:
        for name, limit in zip(("SLAB_BYTES", "SLAB_VOXELS", "CHUNK_LOGITS"), limits, strict=True):
            patch.setattr(restore, name, limit)
        classes = interpolated_argmax(classes_last(logits) if last else logits, target, nearest_axis=nearest_axis)
    assert classes.dtype == np.uint8
    check_argmax(classes, logits, target, nearest_axis)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("n_classes", [2, 40, 118])
@pytest.mark.parametrize("target", [(24, 30, 26), (9, 41, 13), (5, 8, 6), (12, 15, 13), (12, 40, 13)])
@pytest.mark.parametrize("blocky", [True, False])
def test_large_volumes_of_many_classes(target: Shape, n_classes: int, blocky: bool) -> None:
    shape = (12, 15, 13)
    logits = blocky_logits(n_classes, shape) if blocky else random_logits((n_classes, *shape))
    check_argmax(interpolated_argmax(logits, target, nearest_axis=None), logits, target, None)


@pytest.mark.parametrize("last", [True, False])
def test_threads_do_not_get_in_each_others_way(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = random_logits((20, 60, 16, 17))
    logits, target = classes_last(made) if last else made, (130, 29, 30)
    expected = interpolated_argmax(logits, target, nearest_axis=None)
    check_argmax(expected, logits, target, None)
    monkeypatch.setattr(restore, "SLAB_BYTES", 4 * 4 * 20 * 16 * 17)
    monkeypatch.setattr(restore, "CHUNK_LOGITS", 20_000)
    torch.set_num_threads(3)
    try:
        np.testing.assert_array_equal(interpolated_argmax(logits, target, nearest_axis=None), expected)
    finally:
        torch.set_num_threads(1)


def test_logits_in_training_and_in_inference_mode() -> None:
    logits = random_logits((3, 4, 5, 6))
    expected = interpolated_argmax(logits, (8, 10, 12), nearest_axis=None)
    with torch.inference_mode():
        made = logits.clone()
        np.testing.assert_array_equal(interpolated_argmax(made, (8, 10, 12), nearest_axis=None), expected)
    for other in (made, logits.clone().requires_grad_(), classes_last(logits).requires_grad_()):
        np.testing.assert_array_equal(interpolated_argmax(other, (8, 10, 12), nearest_axis=None), expected)


@settings(max_examples=100, deadline=None)
@given(n_in=st.integers(1, 300), n_out=st.integers(1, 300))
def test_a_voxel_is_a_convex_mean_of_two_neighbours_at_most(n_in: int, n_out: int) -> None:
    """What the whole module rests on."""
    matrix = axis_matrix(n_in, n_out, LINEAR).numpy()
    assert matrix.min() >= 0
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    columns = [np.flatnonzero(row) for row in matrix]
    assert all(len(found) <= 2 and found[-1] - found[0] <= 1 for found in columns)
    firsts = [found[0] for found in columns]
    assert firsts == sorted(firsts)


def test_agrees_with_the_resampled_logits() -> None:
    """Those that probabilities are made from."""
    logits = blocky_logits(7, (9, 8, 10))
    target = (14, 8, 23)
    expected = np.concatenate([slab.argmax(0).numpy() for _, slab in resample_logits(logits, target, nearest_axis=0)])
    np.testing.assert_array_equal(interpolated_argmax(logits, target, nearest_axis=0), expected)


# -- regions -----------------------------------------------------------------------------------------------------------

NESTED = LabelSpec(
    names=("oedema", "necrosis", "enhancing"),
    values=(1, 2, 3),
    regions=(
        Region(name="whole", values=(1, 2, 3), written=1),
        Region(name="core", values=(2, 3), written=2),
        Region(name="enhancing tumour", values=(3,), written=3),
    ),
)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.sampled_from([OVERLAPPING, NESTED]),
    shape=SHAPES,
    target=TARGETS,
    nearest_axis=NEAREST_AXES,
    limits=st.sampled_from([(1, 1, 20), (2**26, 2**22, 2**21)]),
    seed=st.integers(0, 99),
)
def test_regions_are_where_their_interpolated_logit_is_above_zero(
    labels: LabelSpec, shape: Shape, target: Shape, nearest_axis: int | None, limits: tuple[int, int, int], seed: int
) -> None:
    """But for logits so close to zero that rounding decides. Nested regions have nested logits."""
    logits = random_logits((len(labels.regions), *shape), seed)
    if labels is NESTED:
        logits = logits.sort(dim=0, descending=True).values
    exact = interpolate_by_hand(logits, target, nearest_axis)
    combination = sum((above.astype(int) << index for index, above in enumerate(exact > 0)), np.zeros(target, int))
    with pytest.MonkeyPatch.context() as patch:
        for name, limit in zip(("SLAB_BYTES", "SLAB_VOXELS", "CHUNK_LOGITS"), limits, strict=True):
            patch.setattr(restore, name, limit)
        classes = interpolated_argmax(logits, target, nearest_axis=nearest_axis, outputs=Outputs.of(labels))
    assert classes.dtype == np.uint8
    is_sure = (np.abs(exact) > TIE_FRACTION * float(logits.abs().max())).all(axis=0)
    np.testing.assert_array_equal(classes[is_sure], labels.class_of_regions()[combination][is_sure])


def test_regions_that_meet_between_two_voxels_overlap_there_or_leave_a_gap() -> None:
    """An arg-max would put one border between them, wherever the logits cross."""
    overlap = torch.tensor([[3.0, -1.0], [-1.0, 3.0]]).reshape(2, 1, 1, 2)
    outputs = Outputs.of(OVERLAPPING)
    classes = interpolated_argmax(overlap, (1, 1, 16), nearest_axis=None, outputs=outputs)
    assert classes.ravel().tolist() == [1] * 6 + [3] * 4 + [2] * 6
    apart = interpolated_argmax(overlap.flip(3).neg(), (1, 1, 16), nearest_axis=None, outputs=outputs)
    assert apart.ravel().tolist() == [1] * 6 + [0] * 4 + [2] * 6


# -- answers known by hand ---------------------------------------------------------------------------------------------


def test_a_class_that_is_largest_at_no_corner_wins_between_them() -> None:
    logits = torch.tensor([[10.0, 0], [9, 9], [0, 10]]).reshape(3, 1, 1, 2)
    assert interpolated_argmax(logits, (1, 1, 10), nearest_axis=None).flatten().tolist() == [0] * 3 + [1] * 4 + [2] * 3


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_border_lies_where_the_logits_cross(axis: int) -> None:
    """0 and 1 cross 0.275 voxels after the first centre; each voxel of the target is a tenth of one of the source."""
    line = torch.tensor([[1.1, -2.9], [0, 0]])
    shape, target = [1, 1, 1], [1, 1, 1]
    shape[axis], target[axis] = 2, 20
    classes = interpolated_argmax(line.reshape(2, *shape), target, nearest_axis=None)
    # The target's voxel 7 has its centre 0.25 voxels of the source after the first one's, 8 has it at 0.35.
    assert classes.flatten().tolist() == [0] * 8 + [1] * 12
    nearest = interpolated_argmax(line.reshape(2, *shape), target, nearest_axis=axis)
    assert nearest.flatten().tolist() == [0] * 10 + [1] * 10


def test_every_kind_of_cell() -> None:
    """Each of the 256 ways in which two classes can lie at the corners, beside a third that is close everywhere."""
    height = torch.linspace(1, 2, 8).reshape(2, 2, 2)
    target = (5, 4, 3)
    for corners in itertools.product((0, 1), repeat=8):
        label = torch.tensor(corners).reshape(2, 2, 2)
        logits = torch.stack((height * (1 - label), height * label, 0.9 * height))
        classes = interpolated_argmax(logits, target, nearest_axis=None)
        check_argmax(classes, logits, target, None)
        assert (classes == corners[0]).all() == (len(set(corners)) == 1)


@pytest.mark.parametrize("n_classes", [2, 20, 59])
@pytest.mark.parametrize("target", [(12, 10, 8), (6, 20, 8), (12, 5, 4)])
def test_at_a_tie_the_lowest_class_wins(target: Shape, n_classes: int) -> None:
    """Every class twice. Whole numbers and weights of quarters leave no rounding, so it is equal to the last voxel."""
    once = np.random.default_rng(0).integers(0, 9, (n_classes, 6, 5, 4)).astype(np.float32)
    logits = torch.from_numpy(np.concatenate((once, once)))
    expected = interpolate_by_hand(logits, target, None).argmax(axis=0)
    np.testing.assert_array_equal(interpolated_argmax(logits, target, nearest_axis=None), expected)
    assert not interpolated_argmax(torch.ones_like(logits), target, nearest_axis=None).any()


def test_the_same_grid_is_the_plain_argmax() -> None:
    logits = random_logits((5, 4, 6, 3))
    expected = logits.argmax(dim=0).numpy()
    np.testing.assert_array_equal(interpolated_argmax(logits, (4, 6, 3), nearest_axis=None), expected)


@pytest.mark.parametrize(("n_classes", "dtype"), [(256, np.uint8), (257, np.uint16), (300, np.uint16)])
def test_more_than_256_classes_need_uint16(n_classes: int, dtype: type) -> None:
    logits = torch.zeros((n_classes, 2, 3, 2))
    logits[0] = 0.5
    logits[n_classes - 1, :, 1:] = 1
    classes = interpolated_argmax(logits, (4, 6, 4), nearest_axis=None)
    assert classes.dtype == dtype
    assert set(np.unique(classes)) == {0, n_classes - 1}
    assert (classes == n_classes - 1).all(axis=(0, 2)).tolist() == [False, False, True, True, True, True]


# -- rows --------------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    shape=SHAPES,
    target=TARGETS,
    nearest_axis=NEAREST_AXES,
    steps=st.lists(st.integers(1, 3), min_size=7, max_size=7),
    seed=st.integers(0, 99),
)
def test_rows_are_made_as_soon_as_theirs_are_known(
    shape: Shape, target: Shape, nearest_axis: int | None, steps: list[int], seed: int
) -> None:
    """As a window that sweeps along the first axis gives them: every row once, and equal to the whole bit for bit."""
    logits = random_logits((3, *shape), seed)
    change = GridChange(source=shape, target=target, nearest_axis=nearest_axis)
    assert change.rows_complete(0) == 0
    n_known = n_made = 0
    made = []
    for step in steps:
        n_known = min(shape[0], n_known + step)
        rows = slice(n_made, change.rows_complete(n_known))
        if rows.stop > rows.start:
            needed = change.rows_needed(rows)
            assert 0 <= needed.start < needed.stop <= n_known
            made.append(restore_rows(logits[:, needed], change, rows, first_row=needed.start))
            n_made = rows.stop
        if n_made < target[0]:
            assert change.rows_needed(slice(n_made, n_made + 1)).stop > n_known
    assert n_made == target[0]
    np.testing.assert_array_equal(np.concatenate(made), interpolated_argmax(logits, target, nearest_axis=nearest_axis))


@pytest.mark.parametrize(
    ("n_in", "n_out", "nearest_axis", "complete"),
    [
        (4, 4, None, [0, 1, 2, 3, 4]),
        # The target's centres lie at -0.25, 0.25, 0.75, 1.25 and so on, so three are below 1.
        (4, 8, None, [0, 0, 3, 5, 8]),
        (4, 8, 0, [0, 2, 4, 6, 8]),
        (4, 2, None, [0, 0, 1, 1, 2]),
        (1, 3, None, [0, 3]),
    ],
)
def test_which_rows_are_complete(n_in: int, n_out: int, nearest_axis: int | None, complete: list[int]) -> None:
    change = GridChange(source=(n_in, 2, 2), target=(n_out, 2, 2), nearest_axis=nearest_axis)
    assert [change.rows_complete(n_rows) for n_rows in range(n_in + 1)] == complete


def test_rows_come_from_more_than_is_needed_just_as_well() -> None:
    logits = random_logits((4, 9, 5, 6))
    change = GridChange(source=(9, 5, 6), target=(20, 7, 5), nearest_axis=None)
    whole = interpolated_argmax(logits, change.target, nearest_axis=None)
    np.testing.assert_array_equal(restore_rows(logits[:, 2:], change, slice(9, 13), first_row=2), whole[9:13])
    assert restore_rows(logits, change, slice(5, 5)).shape == (0, 7, 5)


# -- scans -------------------------------------------------------------------------------------------------------------


def make_record(axis_order: Shape, shape: Shape, *, nearest_axis: int | None = None) -> CaseRecord:
    """Of a scan of 10x7x9 voxels, of which 7x6x5 were kept, on a grid of some shape."""
    geometry = make_geometry((9, 7, 10), np.diag([1.3, 4.0, 0.9, 1]), header_spacing_mm=(1.3, 4.0, 0.9))
    crop = Box(start=(2, 0, 3), stop=(9, 6, 8))
    return CaseRecord(
        geometry=geometry,
        crop=crop,
        axis_order=axis_order,
        shape=shape,
        spacing_mm=(1, 1, 1),
        nearest_axis=nearest_axis,
    )


def restore_scan(logits: Tensor, record: CaseRecord) -> NDArray:
    labels = LabelMap(record, axis=0, outputs=Outputs(len(logits)))
    labels.add(slice(0, record.cropped_shape[0]), logits, 0)
    return labels.whole()


# (1, 2, 0) and (2, 0, 1) are not their own inverses: with the other four alone a wrong inverse would not show.
@pytest.mark.parametrize("order", list(itertools.permutations((0, 1, 2))))
def test_logits_on_the_scans_own_grid_come_back_exactly(order: Shape) -> None:
    expected = np.zeros((10, 7, 9), np.uint8)
    kept = (slice(2, 9), slice(0, 6), slice(3, 8))
    expected[kept] = np.random.default_rng(0).integers(0, 3, (7, 6, 5))
    on_grid = torch.from_numpy(expected[kept].transpose(order).astype(np.int64))
    depth, height, width = on_grid.shape
    record = make_record(order, (depth, height, width))
    logits = torch.nn.functional.one_hot(on_grid, 3).permute(3, 0, 1, 2).float()
    restored = restore_scan(logits, record)
    np.testing.assert_array_equal(restored, expected)
    assert restored.dtype == np.uint8


@pytest.mark.parametrize("nearest_axis", [None, 1])
def test_logits_on_another_grid_come_back_interpolated_within_the_crop(nearest_axis: int | None) -> None:
    logits = random_logits((4, 5, 3, 9))
    record = make_record((1, 2, 0), (5, 3, 9), nearest_axis=nearest_axis)
    restored = restore_scan(logits, record)
    inside = restored[2:9, 0:6, 3:8]
    check_argmax(inside.transpose(1, 2, 0), logits, (6, 5, 7), nearest_axis)
    assert np.count_nonzero(restored) == np.count_nonzero(inside) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    logits = blocky_logits(40, (12, 15, 13)).to(dtype)
    for target in ((24, 31, 20), (7, 30, 13)):
        check_argmax(interpolated_argmax(logits.cuda(), target, nearest_axis=None), logits, target, None)
