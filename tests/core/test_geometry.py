"""Where voxels are, in all 48 orientations, against nibabel's answer."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest

from autoseg.core.errors import FormatError
from autoseg.core.geometry import (
    Box,
    Geometry,
    bounding_box,
    corner_distance_voxels,
    find_lowres_axis,
    from_canonical,
    inverse_order,
    is_anisotropic,
    make_geometry,
    permute3,
    resampled_shape,
    to_canonical,
)

ORIENTATIONS = [
    "".join(letters)
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for letters in itertools.product(*axes)  # one letter of each axis
]
SHAPE_IJK = (3, 4, 5)
SPACING_IJK = (0.7, 1.3, 4.0)


def rotation(axis: tuple[float, float, float], degrees: float) -> np.ndarray:
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def make_affine(axcodes: str, *, degrees: float = 0.0) -> np.ndarray:
    """From file indices to RAS+ mm: the file's axes point to `axcodes`, then everything is turned by `degrees`."""
    affine = np.eye(4)
    for file_axis, code in enumerate(axcodes):
        world = next(axis for axis, letters in enumerate(("RL", "AP", "SI")) if code in letters)
        affine[:3, file_axis] = 0.0
        affine[world, file_axis] = SPACING_IJK[file_axis] * (1 if code in "RAS" else -1)
    affine[:3, :3] = rotation((1, 2, 3), degrees) @ affine[:3, :3]
    affine[:3, 3] = (-31.5, 12.25, 700.125)
    return affine


def make(affine: np.ndarray, shape: tuple[int, ...] = SHAPE_IJK, spacing: tuple[float, ...] = SPACING_IJK) -> Geometry:
    return make_geometry(shape, affine, header_spacing_mm=spacing)


def test_there_are_48_orientations() -> None:
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_from_canonical_undoes_to_canonical(axcodes: str) -> None:
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    canonical = to_canonical(array, axcodes)
    assert np.array_equal(from_canonical(canonical, axcodes), array)
    assert np.array_equal(to_canonical(from_canonical(array, axcodes), axcodes), array)
    assert np.array_equal(to_canonical(array[0], axcodes), canonical[0]), "leading axes must not matter"
    assert np.shares_memory(canonical, array)


@pytest.mark.parametrize("degrees", [0.0, 11.0, 25.0])
@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_agrees_with_nibabel(axcodes: str, degrees: float) -> None:
    affine = make_affine(axcodes, degrees=degrees)
    array = np.arange(60, dtype=np.int16).reshape(SHAPE_IJK)
    geometry = make(affine)
    expected = nib.as_closest_canonical(nib.Nifti1Image(array, affine))
    assert geometry.file_axcodes == nib.aff2axcodes(affine)
    assert np.array_equal(to_canonical(array, geometry.file_axcodes), np.asarray(expected.dataobj).T)
    assert geometry.shape == expected.shape[::-1]
    assert geometry.file_shape == SHAPE_IJK
    np.testing.assert_allclose(geometry.canonical_affine, expected.affine, atol=1e-9)
    assert geometry.spacing_mm == pytest.approx(tuple(np.linalg.norm(expected.affine[:3, :3], axis=0)[::-1]))
    assert np.array_equal(geometry.affine, affine), "the file's affine is kept bit for bit"


def test_agrees_with_nibabel_on_any_rotation_and_shear() -> None:
    """Where each file axis is nearest to another direction; on the rest versions of nibabel differ."""
    rng = np.random.default_rng(3)
    n_compared = 0
    for _ in range(300):
        matrix = np.linalg.qr(rng.normal(size=(3, 3)))[0] @ np.diag(rng.uniform(0.3, 6.0, 3))
        affine = np.eye(4)
        affine[:3, :3] = matrix @ (np.eye(3) + np.triu(rng.uniform(-0.2, 0.2, (3, 3)), 1))
        directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        left, _, right = np.linalg.svd(directions)
        if len(set(np.abs(left @ right).argmax(axis=0))) == 3:
            n_compared += 1
            assert make(affine).file_axcodes == nib.aff2axcodes(affine)
    assert n_compared > 200


def test_two_file_axes_that_lean_to_one_direction_still_get_different_ones() -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0.8, 0.75, 0.0], [0.6, -0.66, 0.0], [0.0, 0.0, 1.0]])
    assert {code if code in "RAS" else {"L": "R", "P": "A", "I": "S"}[code] for code in make(affine).file_axcodes} == {
        "R",
        "A",
        "S",
    }


@pytest.mark.parametrize("axcodes", ORIENTATIONS[::5])
def test_canonical_affine_puts_every_voxel_where_the_file_has_it(axcodes: str) -> None:
    affine = make_affine(axcodes, degrees=20.0)
    geometry = make(affine)
    ids = np.arange(60).reshape(SHAPE_IJK)
    canonical = to_canonical(ids, geometry.file_axcodes)
    for i, j, k in np.ndindex(*SHAPE_IJK):
        ((z, y, x),) = np.argwhere(canonical == ids[i, j, k])
        np.testing.assert_allclose(geometry.canonical_affine @ [x, y, z, 1], affine @ [i, j, k, 1], atol=1e-9)


def test_spacing_comes_from_the_header_where_it_agrees_with_the_affine() -> None:
    affine = make_affine("LPS", degrees=17.0).astype(np.float32).astype(np.float64)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    assert tuple(lengths) != SPACING_IJK, "the rotation must leave rounding noise for this test to mean anything"
    assert make(affine, spacing=tuple(float(np.float32(value)) for value in SPACING_IJK)).spacing_mm == (4.0, 1.3, 0.7)


def test_spacing_comes_from_the_affine_where_the_header_says_something_else() -> None:
    affine = make_affine("SRA")  # i points to S, j to R, k to A
    assert make(affine, spacing=(1.0, 1.3, 9.0)).spacing_mm == (0.7, 4.0, 1.3)
    assert make(affine, spacing=(float("nan"), 0.0, 4.0)).spacing_mm == (0.7, 4.0, 1.3)


def test_isotropic_oblique_axes_stay_exactly_equal() -> None:
    affine = np.eye(4)
    affine[:3, :3] = (rotation((3, 1, 2), 33.0) * 9.0).astype(np.float32)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    assert len({round(length, 7) for length in lengths}) > 1, "the affine alone must not make them equal"
    assert make(affine, spacing=(9.0, 9.0, 9.0)).spacing_mm == (9.0, 9.0, 9.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda affine: affine.__setitem__((1, 1), np.nan),
        lambda affine: affine.__setitem__((0, 3), np.inf),
        lambda affine: affine.__setitem__((slice(0, 3), 2), 0.0),
        lambda affine: affine.__setitem__((slice(0, 3), 2), affine[:3, 1]),
    ],
    ids=["nan", "infinite", "zero column", "two equal columns"],
)
def test_unusable_affines_are_refused(change) -> None:  # type: ignore[no-untyped-def]
    affine = make_affine("RAS")
    change(affine)
    with pytest.raises(FormatError, match="expected a finite, invertible 4x4 matrix"):
        make(affine)


def test_microscopic_voxels_are_not_singular() -> None:
    micron = 1e-3
    geometry = make(np.diag([0.05 * micron, 0.05 * micron, 0.2 * micron, 1.0]), spacing=(5e-5, 5e-5, 2e-4))
    assert geometry.spacing_mm == pytest.approx((2e-4, 5e-5, 5e-5))


def test_voxel_volume() -> None:
    affine = make_affine("RAS")
    assert make(affine).voxel_volume_ml == pytest.approx(0.7 * 1.3 * 4.0 / 1000)
    # A tilted gantry moves each slice: their distance along the table is shorter than the edge of a voxel.
    affine[:3, 2] += 0.4 * affine[:3, 1]
    assert make(affine).voxel_volume_ml == pytest.approx(0.7 * 1.3 * 4.0 / 1000)


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "SRA", "IPL"])
def test_corner_distance_is_zero_for_another_storage_of_the_same_grid(axcodes: str) -> None:
    first = nib.Nifti1Image(np.zeros(SHAPE_IJK, np.uint8), make_affine("RAS", degrees=9.0))
    change = nib.orientations.ornt_transform(nib.io_orientation(first.affine), nib.orientations.axcodes2ornt(axcodes))
    second = first.as_reoriented(change)
    one = make(first.affine)
    other = make_geometry(second.shape, second.affine, header_spacing_mm=second.header.get_zooms())
    assert other.file_axcodes == tuple(axcodes)
    assert corner_distance_voxels(one, other) == pytest.approx(0.0, abs=1e-9)


def test_corner_distance_measures_shift_scale_and_flip() -> None:
    base = make(np.diag([1.0, 2.0, 4.0, 1.0]), spacing=(1, 2, 4))
    shifted = np.diag([1.0, 2.0, 4.0, 1.0])
    shifted[:3, 3] = (0.0, 0.3, 0.4)
    assert corner_distance_voxels(base, make(shifted, spacing=(1, 2, 4))) == pytest.approx(0.5)
    # The last of 5 slices is 4 steps away from the first, each 0.5 mm further than it should be.
    assert corner_distance_voxels(base, make(np.diag([1, 2, 4.5, 1]), spacing=(1, 2, 4.5))) == pytest.approx(2.0)
    halved = make(np.diag([0.5, 1.0, 2.0, 1.0]), spacing=(0.5, 1, 2))
    assert corner_distance_voxels(halved, base) == pytest.approx(2 * corner_distance_voxels(base, halved))
    assert corner_distance_voxels(base, make(np.diag([-1.0, 2.0, 4.0, 1.0]), spacing=(1, 2, 4))) == pytest.approx(2.0)


def test_bounding_box() -> None:
    mask = np.zeros((6, 7, 8), bool)
    assert bounding_box(mask) == Box(start=(0, 0, 0), stop=(6, 7, 8)), "the whole volume where nothing is True"
    mask[2, 3, 4] = True
    assert bounding_box(mask) == Box(start=(2, 3, 4), stop=(3, 4, 5))
    mask[5, 1, 4] = True
    box = bounding_box(mask)
    assert box == Box(start=(2, 1, 4), stop=(6, 4, 5))
    assert box.shape == (4, 3, 1)
    assert mask[(..., *box.slices)].shape == box.shape
    assert mask[(..., *box.slices)].sum() == mask.sum()


def test_resampled_shape() -> None:
    assert resampled_shape((10, 20, 30), (3.0, 1.0, 1.0), (1.0, 1.0, 2.0)) == (30, 20, 15)
    assert resampled_shape((1, 1, 7), (1.0, 5.0, 1.0), (9.0, 1.0, 1.0)) == (1, 5, 7)
    assert resampled_shape((160, 489, 393), (1.5, 0.9, 0.9), (1.5, 0.9, 0.9)) == (160, 489, 393)
    with pytest.raises(ValueError, match="argument"):
        resampled_shape((10, 20, 30), (1.0, 1.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_inverse_order_undoes_an_order(order: tuple[int, int, int]) -> None:
    assert permute3(permute3("zyx", order), inverse_order(order)) == ("z", "y", "x")


def test_permute3_reads_the_network_axes_from_the_volume() -> None:
    assert permute3((10, 20, 30), (2, 0, 1)) == (30, 10, 20)


def test_anisotropy() -> None:
    assert not is_anisotropic((3.0, 1.0, 1.0)), "the threshold itself is not above the threshold"
    assert is_anisotropic((3.1, 1.0, 1.0))
    assert find_lowres_axis((1.0, 5.0, 1.0)) == 1
    assert find_lowres_axis((1.0, 1.0, 1.0)) is None
    assert find_lowres_axis((5.0, 5.0, 1.0)) is None, "two coarse axes are not one"
