"""From logits on the network's grid to the label map on the scan's: exactly the arg-max of the interpolated logits.

Linear interpolation takes a mean of the logits at the corners of a cell of the network's grid. A class that is largest
at every corner is therefore largest in the whole cell, and nearly everywhere that settles it. Only the voxels in the
other cells, those that a border runs through, are interpolated, a few at a time. So the logits of all classes never
exist on the scan's grid, and memory does not grow with it.

The same holds for every decision that is the same for a mean of logits where it is the same for each of them, such as
a threshold per region. (Where a voxel is of a combination of regions that no class has, it gets the class of another
combination; between corners of one class that had different combinations, that is taken as decided.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.core.labels import class_dtype
from autoseg.networks.outputs import Outputs
from autoseg.preprocessing.resample import LINEAR, NEAREST, axis_matrix

# What is worked on at once: bytes of logits on the network's grid, voxels of the scan, interpolated logits.
SLAB_BYTES = 64 * 2**20
SLAB_VOXELS = 2**22
CHUNK_LOGITS = 2**20
# How many slabs at the same time.
MAX_THREADS = 4
BUFFERS_BYTES = 256 * 2**20

Decide = Callable[[Tensor], NDArray[np.int64]]
"""The class of each row of logits (N, K)."""


@dataclass(frozen=True)
class _Axis:
    """Linear interpolation along one axis: every output voxel is a mean of at most two neighbours.

    Attributes:
        lower: (n_out,) int64, the first of the two, never falling.
        weight: (n_out,) float32, of the second; the first has the rest.
        step: from the first to the second; 0 where there is only one.
    """

    lower: NDArray[np.int64]
    weight: NDArray[np.float32]
    step: int


@lru_cache(maxsize=128)
def _make_axis(n_in: int, n_out: int, nearest: bool) -> _Axis:
    """The rows of `axis_matrix`, whose other entries are zero."""
    step = 0 if nearest or n_in in (1, n_out) else 1
    matrix = axis_matrix(n_in, n_out, NEAREST if nearest else LINEAR).numpy()
    lower = np.minimum((matrix > 0).argmax(axis=1), n_in - 1 - step)
    weight = matrix[np.arange(n_out), lower + 1] if step else np.zeros(n_out, np.float32)
    return _Axis(lower=lower, weight=weight, step=step)


@dataclass(frozen=True, kw_only=True)
class GridChange:
    """From the network's grid to the scan's. A row is a plane of the first axis.

    Attributes:
        source: (Z, Y, X) of the network's grid.
        target: (Z, Y, X) of the scan's grid, in the same axes.
        nearest_axis: an axis that takes the nearest voxel, see `choose_nearest_axis`; all others are interpolated.
    """

    source: tuple[int, int, int]
    target: tuple[int, int, int]
    nearest_axis: int | None

    @property
    def axes(self) -> list[_Axis]:
        """The interpolation along each axis."""
        sizes = enumerate(zip(self.source, self.target, strict=True))
        return [_make_axis(n_in, n_out, axis == self.nearest_axis) for axis, (n_in, n_out) in sizes]

    def rows_needed(self, rows: slice) -> slice:
        """The network's rows that some rows of the scan, at least one, are made from. Both have a start and a stop."""
        axis = self.axes[0]
        return slice(int(axis.lower[rows.start]), int(axis.lower[rows.stop - 1]) + axis.step + 1)

    def rows_complete(self, n_rows: int) -> int:
        """How many of the scan's rows can be made from the first `n_rows` rows of the network's."""
        axis = self.axes[0]
        return int(np.searchsorted(axis.lower, n_rows - axis.step))


def interpolated_argmax(
    logits: Tensor, shape: Sequence[int], *, nearest_axis: int | None, outputs: Outputs | None = None
) -> NDArray:
    """The class with the largest linearly interpolated logit at every voxel.

    The mean of the corners is taken in float32, in the order of the corners. At a tie the lowest class wins.

    Args:
        logits: (K, Z, Y, X), any floating type and device, finite. Fastest where K is last in memory, in float32.
        shape: (Z, Y, X) of the result.
        nearest_axis: an axis that takes the nearest voxel instead.
        outputs: see `restore_rows`.

    Returns:
        `shape`, uint8 (uint16 for more than 256 classes).
    """
    (depth, height, width), (z, y, x) = logits.shape[1:], shape
    change = GridChange(source=(depth, height, width), target=(z, y, x), nearest_axis=nearest_axis)
    return restore_rows(logits, change, slice(0, z), outputs=outputs)


def restore_rows(
    logits: Tensor, change: GridChange, rows: slice, *, first_row: int = 0, outputs: Outputs | None = None
) -> NDArray:
    """Some rows of `interpolated_argmax`, from no more of the logits than they need: the same voxels, bit for bit.

    Args:
        logits: (K, n, Y, X), consecutive rows of the network's grid, among them `change.rows_needed(rows)`.
        change: between the two grids.
        rows: of the scan's grid, with a start and a stop.
        first_row: of the network's grid in `logits`.
        outputs: what decides; None for exclusive classes.

    Returns:
        (rows, *change.target[1:]), uint8 (uint16 for more than 256 classes).
    """
    outputs = outputs or Outputs(logits.shape[0])
    decide = outputs.decide_rows
    classes = np.empty((rows.stop - rows.start, *change.target[1:]), class_dtype(outputs.n_classes))
    logits = logits.detach().permute(1, 2, 3, 0)
    is_ready = logits.dtype == torch.float32 and logits.is_contiguous()
    row_bytes = 4 * logits[0].numel()
    parts = list(_slabs(change, rows, row_bytes=row_bytes))
    needed = [change.rows_needed(part) for part in parts]
    n_most = max((span.stop - span.start for span in needed), default=1)
    n_threads = max(1, min(MAX_THREADS, torch.get_num_threads(), BUFFERS_BYTES // (n_most * row_bytes)))
    buffer_shape = (0 if is_ready else n_most, *logits.shape[1:])
    buffers = [logits.new_empty(buffer_shape, dtype=torch.float32) for _ in range(n_threads)]
    depth, height, width = change.axes

    @torch.inference_mode()
    def restore(part: slice, span: slice) -> None:
        slab = logits[span.start - first_row : span.stop - first_row]
        buffer = buffers.pop()
        if not is_ready:
            slab = buffer[: len(slab)].copy_(slab)
        here = _Axis(lower=depth.lower[part] - span.start, weight=depth.weight[part], step=depth.step)
        _restore_slab(slab, (here, height, width), classes[part.start - rows.start : part.stop - rows.start], decide)
        buffers.append(buffer)

    # torch's own threads wait for each other at every step; these don't, which counts where the processors are busy.
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(restore, parts, needed))
    return classes


def _slabs(change: GridChange, rows: slice, *, row_bytes: int) -> Iterator[slice]:
    """Parts of the scan's rows, each from few rows of the network's, at least as many as one row is made from."""
    axis = change.axes[0]
    n_source = max(1, SLAB_BYTES // row_bytes - axis.step)
    n_target = max(1, SLAB_VOXELS // (change.target[1] * change.target[2]))
    start = rows.start
    while start < rows.stop:
        reached = int(np.searchsorted(axis.lower, axis.lower[start] + n_source))
        stop = min(rows.stop, reached, start + n_target)
        yield slice(start, stop)
        start = stop


def _restore_slab(logits: Tensor, axes: Sequence[_Axis], classes: NDArray, decide: Decide) -> None:
    """Fills `classes`, (rows, Y, X), from logits (Z, Y, X, K) float32 contiguous."""
    table = logits.flatten(0, 2)
    lowest = highest = decide(table).astype(classes.dtype).reshape(logits.shape[:3])
    for number, axis in enumerate(axes):
        if axis.step:
            before = (slice(None),) * number
            first, second = (*before, slice(None, -1)), (*before, slice(1, None))
            lowest = np.minimum(lowest[first], lowest[second])
            highest = np.maximum(highest[first], highest[second])
    # Where all corners of a cell have one class it is the lowest of them; the other cells follow.
    classes[...] = _spread(lowest, axes)
    undecided = np.flatnonzero(_spread(lowest != highest, axes))
    n_voxels = max(1, CHUNK_LOGITS // table.shape[1])
    for start in range(0, len(undecided), n_voxels):
        voxels = undecided[start : start + n_voxels]
        corners, weights = _corners(np.unravel_index(voxels, classes.shape), axes, logits.shape)
        means = torch.nn.functional.embedding_bag(
            torch.from_numpy(corners).to(table.device),
            table,
            mode="sum",
            per_sample_weights=torch.from_numpy(weights).to(table.device),
        )
        classes.reshape(-1)[voxels] = decide(means)


def _spread(cells: NDArray, axes: Sequence[_Axis]) -> NDArray:
    """The value of the cell that each voxel lies in."""
    depth, height, width = (axis.lower for axis in axes)
    return cells.take(width, axis=2).take(height, axis=1).take(depth, axis=0)


def _corners(
    places: Sequence[NDArray[np.int64]], axes: Sequence[_Axis], shape: Sequence[int]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """What voxels are means of.

    Args:
        places: of the voxels, (N,) along each axis.
        axes: the interpolation along each axis.
        shape: (Z, Y, X, ...) of the network's grid.

    Returns:
        The corners of each voxel's cell as indices into the flattened grid, and their weights, (N, corners).
    """
    strides = (shape[1] * shape[2], shape[2], 1)
    first = sum(axis.lower[place] * stride for axis, place, stride in zip(axes, places, strides, strict=True))
    upper = [axis.weight[place] for axis, place in zip(axes, places, strict=True)]
    sides = [(1 - weight, weight) for weight in upper]
    offsets = list(itertools.product(*(range(axis.step + 1) for axis in axes)))
    corners = np.empty((len(places[0]), len(offsets)), np.int32)
    weights = np.empty(corners.shape, np.float32)
    for number, (z, y, x) in enumerate(offsets):
        corners[:, number] = first + (z * strides[0] + y * strides[1] + x)
        weights[:, number] = sides[0][z] * sides[1][y] * sides[2][x]
    return corners, weights
