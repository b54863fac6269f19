"""From rows of logits, as they become complete, to whole volumes on the scan's grid."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.core.geometry import axis_first
from autoseg.core.labels import class_dtype
from autoseg.inference.restore import GridChange, restore_rows
from autoseg.networks.outputs import Outputs
from autoseg.preprocessing.preprocess import CaseRecord, place_in_scan
from autoseg.preprocessing.resample import resample_logits

FULL = 255
"""What stands for 1 in maps of probability and uncertainty."""


def change_along(record: CaseRecord, axis: int) -> GridChange:
    """The way from the network's grid to the scan's, with another axis first.

    Args:
        record: of the scan.
        axis: that becomes the first; the others keep their order.
    """
    order = axis_first(axis)
    nearest = None if record.nearest_axis is None else order.index(record.nearest_axis)
    source, target = (
        (shape[order[0]], shape[order[1]], shape[order[2]]) for shape in (record.shape, record.cropped_shape)
    )
    return GridChange(source=source, target=target, nearest_axis=nearest)


def ready_rows(swept: Iterable[tuple[slice, Tensor]], change: GridChange) -> Iterator[tuple[slice, Tensor, int]]:
    """The scan's rows that can be made from what has come, each once, in order.

    Args:
        swept: rows of the network's grid and their logits (K, n, A, B), from `SlidingWindow.sweep`.
        change: between the two grids.

    Yields:
        Rows of the scan; logits with all rows that they need; and which row of the network's grid is the first there.
    """
    lower = change.axes[0].lower
    last: Tensor | None = None
    done = 0
    for rows, logits in swept:
        complete = change.rows_complete(rows.stop)
        # The first of them lie between the last row that came before and the first of these.
        joint = min(max(done, int(np.searchsorted(lower, rows.start))), complete)
        if last is not None and done < joint:
            # A device that ran out of memory meanwhile has handed its sums to another one.
            yield slice(done, joint), torch.cat([last.to(logits.device), logits[:, :1]], dim=1), rows.start - 1
        if joint < complete:
            yield slice(joint, complete), logits, rows.start
        done = max(done, complete)
        last = logits[:, -1:].clone()
        del logits


def to_scan(
    logits: Tensor, change: GridChange, rows: slice, *, first_row: int, n_networks: int = 1
) -> Iterator[tuple[slice, Tensor]]:
    """Logits on the scan's grid, a few rows at a time.

    Args:
        logits: (F * K, n, A, B) of F networks; see `ready_rows`.
        change: between the two grids.
        rows: of the scan.
        first_row: of the network's grid that `logits` begins with.
        n_networks: F.

    Yields:
        Rows of the scan and their logits (F, K, n, A, B) float32.
    """
    slabs = resample_logits(
        logits,
        change.target,
        nearest_axis=change.nearest_axis,
        rows=rows,
        first_row=first_row,
        n_rows=change.source[0],
    )
    for part, values in slabs:
        yield part, values.unflatten(0, (n_networks, -1))


def in_step(streams: Sequence[Iterator[tuple[slice, Tensor]]]) -> Iterator[tuple[slice, list[Tensor]]]:
    """The same rows of several streams, which may part them differently.

    Args:
        streams: all rows in order, each once, and their values (..., n, A, B).

    Yields:
        Rows, and their values in every stream.
    """
    held = [next(stream, None) for stream in streams]
    while known := [item for item in held if item is not None]:
        start, stop = known[0][0].start, min(rows.stop for rows, _ in known)
        yield slice(start, stop), [values[..., : stop - start, :, :] for _, values in known]
        held = [
            next(stream, None) if rows.stop == stop else (slice(stop, rows.stop), values[..., stop - start :, :, :])
            for (rows, values), stream in zip(known, streams, strict=True)
        ]


class LabelMap:
    """The class of every voxel of a scan, from logits row by row."""

    def __init__(self, record: CaseRecord, *, axis: int, outputs: Outputs) -> None:
        """An empty one.

        Args:
            record: of the scan.
            axis: of the network's grid, along which rows follow one another.
            outputs: what the channels of the logits mean.
        """
        self._record, self._axis, self._change = record, axis, change_along(record, axis)
        self._outputs = outputs
        self._classes = np.empty(self._change.target, class_dtype(outputs.n_classes))

    def add(self, rows: slice, logits: Tensor, first_row: int) -> None:
        """Decides some rows, from logits (K, n, A, B); see `ready_rows`."""
        self._classes[rows] = restore_rows(logits, self._change, rows, first_row=first_row, outputs=self._outputs)

    def set(self, rows: slice, classes: Tensor) -> None:
        """Some rows, (n, A, B), that are decided already."""
        self._classes[rows] = classes.cpu().numpy()

    def whole(self) -> NDArray:
        """(Z, Y, X) canonical, uint8 or uint16; background outside the crop."""
        return place_in_scan(np.moveaxis(self._classes, 0, self._axis), self._record)


class SoftMaps:
    """Probabilities and uncertainty at every voxel of a scan, from logits row by row. uint8, where 255 stands for 1."""

    def __init__(
        self,
        record: CaseRecord,
        *,
        axis: int,
        outputs: Outputs,
        probabilities: bool,
        uncertainty: bool,
        scratch: Path | None = None,
    ) -> None:
        """Empty ones.

        Args:
            record: of the scan.
            axis: of the network's grid, along which rows follow one another.
            outputs: what the channels of the logits mean.
            probabilities: keep one of each channel.
            uncertainty: keep the entropy, and how much the networks disagree.
            scratch: a folder for a file of the probabilities; None keeps them in memory.
        """
        self._record, self._axis, self._change = record, axis, change_along(record, axis)
        self._outputs = outputs
        self._probabilities: NDArray[np.uint8] | None = None
        if probabilities:
            shape = (outputs.n, *self._change.target)
            self._probabilities = (
                np.empty(shape, np.uint8) if scratch is None else _map_file(scratch / "probabilities.npy", shape)
            )
        self._entropy, self._disagreement = (
            np.empty(self._change.target, np.uint8) if uncertainty else None for _ in range(2)
        )

    def add(self, rows: slice, groups: Sequence[Tensor]) -> None:
        """Fills some rows.

        Args:
            rows: of the scan.
            groups: logits (F, K, n, A, B) of F networks, for each configuration: networks of one average logits,
                configurations probabilities.
        """
        probability = mean_probability(groups, self._outputs)
        if self._probabilities is not None:
            self._probabilities[:, rows] = _to_uint8(probability)
        if self._entropy is not None and self._disagreement is not None:
            self._entropy[rows] = _to_uint8(self._outputs.entropy(probability))
            decided = self._outputs.decide_probabilities(probability)
            votes = (self._outputs.decide(of_networks, dim=1).to(decided.device) for of_networks in groups)
            others = torch.cat([vote != decided for vote in votes])
            self._disagreement[rows] = _to_uint8(others.float().mean(dim=0))

    def probability(self, channel: int) -> NDArray[np.uint8]:
        """Of one channel, (Z, Y, X) canonical; outside the crop it is the background for sure."""
        assert self._probabilities is not None
        whole = self._place(self._probabilities[channel])
        if channel == 0 and not self._outputs.has_regions:
            outside = np.ones(whole.shape, bool)
            outside[self._record.crop.slices] = False
            whole[outside] = FULL
        return whole

    def entropy(self) -> NDArray[np.uint8]:
        """Of the mean's probabilities, (Z, Y, X) canonical: 0 where one class is sure, 255 where all are alike."""
        assert self._entropy is not None
        return self._place(self._entropy)

    def disagreement(self) -> NDArray[np.uint8]:
        """The part of the networks that would decide otherwise than their mean does, (Z, Y, X) canonical."""
        assert self._disagreement is not None
        return self._place(self._disagreement)

    def _place(self, swept: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return place_in_scan(np.moveaxis(swept, 0, self._axis), self._record)


def make_soft_maps(
    record: CaseRecord,
    *,
    axis: int,
    outputs: Outputs,
    probabilities: bool,
    uncertainty: bool,
    scratch: Path | None,
) -> SoftMaps | None:
    """Empty maps of what is asked for, see `SoftMaps`; None where nothing is."""
    if not probabilities and not uncertainty:
        return None
    return SoftMaps(
        record,
        axis=axis,
        outputs=outputs,
        probabilities=probabilities,
        uncertainty=uncertainty,
        scratch=scratch,
    )


def mean_probability(groups: Sequence[Tensor], outputs: Outputs) -> Tensor:
    """(K, n, A, B): networks of one configuration average logits, configurations probabilities.

    Args:
        groups: logits (F, K, n, A, B) of F networks, for each configuration.
        outputs: what their channels mean.
    """
    total = outputs.probabilities(groups[0].mean(dim=0))
    for of_networks in groups[1:]:
        # Members may keep their sums on different devices.
        total += outputs.probabilities(of_networks.mean(dim=0)).to(total.device)
    return total.div_(len(groups))


def _to_uint8(values: Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = (values * FULL).round().clamp(0, FULL).to(torch.uint8).cpu().numpy()
    return array


def _map_file(file: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A new file as an array. A disk that gets full would kill whoever writes to the map.

    Raises:
        OSError: there is not enough room.
    """
    if prod(shape) > shutil.disk_usage(file.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
    return np.lib.format.open_memmap(file, "w+", np.uint8, shape)
