"""Preprocessed cases of a few thousand voxels, made without files of scans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.core.geometry import Box, Geometry
from autoseg.preprocessing.preprocess import CaseRecord
from autoseg.preprocessing.store import PreprocessedCase, write_case


def make_record(shape: tuple[int, int, int]) -> CaseRecord:
    """Of a scan with voxels of 1 mm that is taken as it is: neither cropped, nor turned, nor resampled."""
    affine = tuple(tuple(row) for row in np.eye(4).tolist())
    return CaseRecord(
        geometry=Geometry(shape=shape, spacing_mm=(1.0, 1.0, 1.0), affine=affine, file_axcodes=("R", "A", "S")),
        crop=Box(start=(0, 0, 0), stop=shape),
        axis_order=(0, 1, 2),
        shape=shape,
        spacing_mm=(1.0, 1.0, 1.0),
        nearest_axis=None,
    )


def write_tiny_case(
    folder: Path, image: NDArray, label: NDArray, *, n_classes: int, known: tuple[bool, ...] | None = None
) -> PreprocessedCase:
    """Writes a case that was not resampled; see `write_case`."""
    z, y, x = label.shape
    write_case(folder, image, label, key="k", record=make_record((z, y, x)), n_classes=n_classes, known=known)
    return PreprocessedCase(folder)


def draw_ball_in_shell(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    *,
    centres: tuple[float, float],
    radii: tuple[float, float],
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A ball, class 1, in a shell, class 2, bright in noise.

    Args:
        rng: draws the place and the noise.
        shape: of the case.
        centres: from where to where the centre may be, along each axis.
        radii: of the ball, and of the shell around it.

    Returns:
        The image, (1, *shape) float32, and the label, (*shape) uint8.
    """
    distance = np.linalg.norm(np.indices(shape) - rng.uniform(*centres, (3, 1, 1, 1)), axis=0)
    label = np.where(distance < radii[0], 1, np.where(distance < radii[1], 2, 0)).astype(np.uint8)
    image = np.array([0.0, 2.0, 1.0])[label] + rng.normal(0, 0.3, shape)
    return image[None].astype(np.float32), label


def write_balls_in_shells(
    folder: Path,
    n: int,
    shape: tuple[int, int, int],
    *,
    centres: tuple[float, float],
    radii: tuple[float, float],
) -> list[PreprocessedCase]:
    """Writes `case_0`, `case_1` and so on; see `draw_ball_in_shell`."""
    rng = np.random.default_rng(0)
    drawn = [draw_ball_in_shell(rng, shape, centres=centres, radii=radii) for _ in range(n)]
    return [
        write_tiny_case(folder / f"case_{index}", image, label, n_classes=3)
        for index, (image, label) in enumerate(drawn)
    ]
