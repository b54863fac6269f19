"""Channels on the grid of another one."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from autoseg.core.geometry import Geometry, make_geometry
from autoseg.data.regrid import resample_onto


def grid(shape: tuple[int, int, int], affine: NDArray) -> Geometry:
    """Of a file with the axes (x, y, z)."""
    return make_geometry(shape[::-1], affine, header_spacing_mm=np.linalg.norm(affine[:3, :3], axis=0))


def ramp(geometry: Geometry, direction: tuple[float, float, float]) -> NDArray[np.float32]:
    """(1, Z, Y, X): world coordinates along a direction (x, y, z)."""
    z, y, x = np.indices(geometry.shape)
    world = np.tensordot(geometry.canonical_affine, np.stack([x, y, z, np.ones_like(x)]), 1)[:3]
    return np.tensordot(np.array(direction), world, 1)[None].astype(np.float32)


def test_a_linear_image_stays_linear_on_any_grid() -> None:
    angle = np.deg2rad(20)
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    turned[:3, 3] = 4.0, 3.0, 2.5
    source, target = grid((12, 16, 18), np.diag([1.0, 1.0, 1.5, 1.0])), grid((5, 6, 7), turned)
    for direction in ((1.0, 0.0, 0.0), (0.2, -0.5, 0.8)):
        found = resample_onto(ramp(source, direction), source, target)
        np.testing.assert_allclose(found, ramp(target, direction), atol=1e-4)


def test_no_rim_is_lost_where_both_cover_the_same() -> None:
    coarse = np.diag([2.0, 2.0, 2.0, 1.0])
    fine = np.eye(4)
    fine[:3, 3] = -0.5
    image = np.full((2, 4, 4, 4), 7.0, np.float32)
    found = resample_onto(image, grid((4, 4, 4), coarse), grid((8, 8, 8), fine))
    assert (found == 7).all()


@pytest.mark.parametrize("shift", [6.0, -6.0])
def test_outside_the_image_there_is_nothing(shift: float) -> None:
    moved = np.eye(4)
    moved[0, 3] = shift
    image = np.ones((1, 4, 4, 4), np.float32)
    assert not resample_onto(image, grid((4, 4, 4), np.eye(4)), grid((4, 4, 4), moved)).any()


def test_a_mirrored_file_lies_where_its_affine_says() -> None:
    flipped = np.diag([-1.0, 1.0, 1.0, 1.0])
    flipped[0, 3] = 3.0
    image = np.arange(64, dtype=np.float32).reshape(1, 4, 4, 4)
    np.testing.assert_allclose(resample_onto(image, grid((4, 4, 4), flipped), grid((4, 4, 4), np.eye(4))), image)
