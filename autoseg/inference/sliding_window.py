"""Sliding-window prediction: tiles x mirroring x networks, in memory that does not grow with the volume.

Isensee et al., Nature Methods 2021: tiles overlap by half, a Gaussian favours their centres, mirrored copies are
averaged.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoseg.core.errors import PredictionError, first_line
from autoseg.core.faults import describe_no_memory, is_out_of_memory
from autoseg.core.geometry import axis_first
from autoseg.core.runtime import autocast_dtype
from autoseg.networks.build import channels_last
from autoseg.networks.outputs import Outputs

logger = logging.getLogger(__name__)

# Enough to keep a processor busy, little enough that the activations of a batch stay small. On the CPU measured to be
# the quickest by `scripts/bench_prediction.py batch`: beyond, activations leave the cache.
MAX_BATCH_VOXELS = {"cpu": 2**17, "mps": 2**20, "cuda": 2**23}
# Sums over tiles up to this size are kept in float32, larger ones in float16, which has three digits less.
MAX_FULL_PRECISION_BYTES = 2**30
# Of the memory for sums on the device: images up to this size are brought there whole.
MAX_IMAGE_FRACTION = 0.25
Place = tuple[slice, slice, slice]
"""A box of a volume, (z, y, x)."""


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How a volume is covered.

    Attributes:
        patch_size: of a tile, ([Z,] Y, X); two axes tile each slice of a volume by itself.
        step_fraction: distance of neighbouring tiles, as a fraction of the patch, over 0 and at most 1.
        mirror_axes: axes of the patch over which mirrored copies are averaged; 0 is its first axis.
        side_axis: the one of them that runs from left to right; in copies that are mirrored along it, channels with a
            side have changed places.
        opposite: the channel of the output that each one becomes then; empty where all stay.
        opposite_previous: of a cascade, the class that each one in the last channel of the input becomes then.
    """

    patch_size: tuple[int, ...]
    step_fraction: float = 0.5
    mirror_axes: tuple[int, ...] = ()
    side_axis: int | None = None
    opposite: tuple[int, ...] = ()
    opposite_previous: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.step_fraction <= 1:
            raise ValueError(f"step_fraction is {self.step_fraction}, expected more than 0 and at most 1")

    @property
    def tile(self) -> tuple[int, ...]:
        """The patch in three axes; a 2D patch is one voxel thick."""
        return (1, *self.patch_size)[-3:]

    @property
    def mirrorings(self) -> list[tuple[int, ...]]:
        """Every combination of the mirrored axes, first none at all."""
        sizes = range(len(self.mirror_axes) + 1)
        return [axes for size in sizes for axes in itertools.combinations(self.mirror_axes, size)]


class CompiledNetwork:
    """A network that is compiled when it is first run; where that fails it runs as it is, after one warning.

    It is compiled for the largest batch that it has seen, to which smaller ones are filled up: for each size anew would
    take minutes, and for any size is slower.
    """

    def __init__(self, network: nn.Module) -> None:
        """Compiles nothing yet."""
        self._network, self._largest = network, 0
        self._forward: Callable[[Tensor], Tensor] | None = torch.compile(network, dynamic=False)

    def __call__(self, images: Tensor) -> Tensor:
        """The network's output."""
        if self._forward is not None:
            n_images = len(images)
            self._largest = max(self._largest, n_images)
            try:
                filled = torch.cat([images, images[:1].expand(self._largest - n_images, *images.shape[1:])])
                return self._forward(filled.contiguous(memory_format=channels_last(images.ndim - 2)))[:n_images]
            except torch.OutOfMemoryError:
                # Fewer are to be tried, and not filled up to as many again.
                self._largest = 0
                raise
            except Exception as error:  # whatever goes wrong in a compiler, its back end or a missing tool
                self._forward = None
                logger.warning("the network could not be compiled and runs as it is, slower (%s)", first_line(error))
        logits: Tensor = self._network(images)
        return logits


class SlidingWindow:
    """Networks that look at a volume tile by tile. Safe to use from several threads.

    The logits of a whole volume never exist: tiles advance along one axis, and a row of the volume, a slice across that
    axis, is given out and forgotten as soon as no later tile reaches it.
    """

    def __init__(
        self,
        networks: Sequence[Callable[[Tensor], Tensor]],
        config: WindowConfig,
        *,
        n_outputs: int,
        device: torch.device,
        max_device_bytes: float = math.inf,
        empty_logits: Sequence[float] | None = None,
    ) -> None:
        """Runs nothing yet.

        Args:
            networks: in evaluation mode, on the device.
            config: how volumes are covered.
            n_outputs: channels of the networks' output.
            device: of the networks.
            max_device_bytes: for the sums over tiles; larger ones are kept in the memory of the machine.
            empty_logits: of each channel where no tile was looked at; None for exclusive classes, the first of which is
                the background.
        """
        self.networks, self.config, self.n_outputs, self.device = tuple(networks), config, n_outputs, device
        self._empty_logits = empty_logits or Outputs(n_outputs).empty_logits
        self._max_device_bytes = max_device_bytes
        self._tiles_per_batch = max(1, MAX_BATCH_VOXELS[device.type] // math.prod(config.patch_size))

    def sums_bytes(self, shape: Sequence[int], *, axis: int, n_groups: int = 1) -> int:
        """Memory that the sums over tiles take.

        Args:
            shape: (Z, Y, X) of the volume.
            axis: along which the tiles advance.
            n_groups: of networks that are kept apart.
        """
        padded = [max(size, patch) for size, patch in zip(shape, self.config.tile, strict=True)]
        padded[axis] = self.config.tile[axis]
        n_values = n_groups * self.n_outputs * math.prod(padded)
        return _sums_type(n_values).itemsize * n_values

    def choose_axis(self, shape: Sequence[int]) -> int:
        """The axis along which tiles should advance for the smallest sums, in a volume of this shape (Z, Y, X)."""
        return min(range(3), key=lambda axis: self.sums_bytes(shape, axis=axis))

    def sweep(
        self,
        image: Tensor,
        *,
        axis: int = 0,
        separate: bool = False,
        is_empty: Callable[[Place], bool] = lambda place: False,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Logits of a volume, averaged over networks, mirrorings and overlapping tiles, row by row.

        Args:
            image: (C, Z, Y, X) float32 in the network's axes, on any device.
            axis: along which the tiles advance; 0 is Z.
            separate: keep the networks apart instead of averaging them.
            is_empty: whether a box of the image is nothing but background; such tiles are not looked at.

        Yields:
            Rows, a slice of that axis, from the first to the last, and their logits (K, n, A, B): float16 or float32,
            n rows along `axis`, A and B the other axes in their order. Where the networks are kept apart it is
            (F * K, n, A, B), those of the first network first.

        Raises:
            PredictionError: a single tile needs more memory than the device has.
        """
        padded, inner = _pad(image, self.config.tile)
        padded = self._bring(padded)
        order = axis_first(axis)
        weight = gaussian_weight(self.config.patch_size).reshape(self.config.tile).permute(order).to(self.device)
        axes = zip(padded.shape[1:], self.config.tile, strict=True)
        along = [tile_starts(size, patch, self.config.step_fraction) for size, patch in axes]
        swept = itertools.product(*(along[index] for index in order))
        starts = [tuple(start[order.index(index)] for index in range(3)) for start in swept]
        offsets = [part.start for part in inner]
        empty = [is_empty(_box(start, self.config.tile, offsets, image.shape[1:])) for start in starts]
        n_values = self.n_outputs * (len(self.networks) if separate else 1)
        plane = tuple(padded.shape[1 + index] for index in order[1:])
        n_sums = n_values * self.config.tile[axis] * math.prod(plane)
        dtype = _sums_type(n_sums)
        sums = _Sums(
            n_values,
            plane,
            edges=sorted({edge for start in along[axis] for edge in (start, start + self.config.tile[axis])}),
            dtype=dtype,
            device=self.device if dtype.itemsize * n_sums <= self._max_device_bytes else torch.device("cpu"),
            empty_logits=tuple(self._empty_logits) * (n_values // self.n_outputs),
        )
        rows, first, second = (inner[index] for index in order)

        def complete(before: int) -> Iterator[tuple[slice, Tensor]]:
            for start, logits in sums.complete(before):
                low, high = max(start, rows.start), min(start + logits.shape[1], rows.stop)
                if low < high:
                    yield (
                        slice(low - rows.start, high - rows.start),
                        logits[:, low - start : high - start, first, second],
                    )
                del logits

        looked_at = [start for start, is_without in zip(starts, empty, strict=True) if not is_without]
        predicted = self._predict_tiles(padded, looked_at, separate=separate)
        for start, is_without in zip(starts, empty, strict=True):
            yield from complete(start[axis])
            swept_start = (start[order[0]], start[order[1]], start[order[2]])
            if is_without:
                sums.add_empty(swept_start, weight)
            else:
                sums.add(swept_start, next(predicted).permute(0, *(1 + index for index in order)), weight)
        # It holds on to its last batch.
        del predicted
        yield from complete(padded.shape[1 + axis])

    def _bring(self, image: Tensor) -> Tensor:
        """The image on the device, where there is room; otherwise each tile is cut out where it is, and waited for."""
        if image.nbytes > MAX_IMAGE_FRACTION * self._max_device_bytes:
            return image
        try:
            return image.to(self.device)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        torch.cuda.empty_cache()
        return image

    def _predict_tiles(self, image: Tensor, starts: Sequence[tuple[int, ...]], *, separate: bool) -> Iterator[Tensor]:
        """The logits (K, Z, Y, X) of each tile, float32; tiles and mirrored copies share batches."""
        mirrorings = self.config.mirrorings
        jobs = [(start, axes) for start in starts for axes in mirrorings]
        collected: Tensor | None = None
        n_collected = first = 0
        while first < len(jobs):
            part = jobs[first : first + self._tiles_per_batch]
            logits = self._try_batch(image, part, separate=separate)
            if logits is None:
                continue
            first += len(part)
            for copy in logits:
                # In place: with a hundred classes, each copy of a tile's logits is a gigabyte.
                collected = copy if collected is None else collected.add_(copy)
                n_collected += 1
                if n_collected == len(mirrorings):
                    yield collected.div_(n_collected).reshape(-1, *self.config.tile)
                    collected, n_collected = None, 0

    def _try_batch(
        self, image: Tensor, jobs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], *, separate: bool
    ) -> list[Tensor] | None:
        """Logits (K, *patch) of tiles, mirrored back; None where they are too many, and fewer are to be taken."""
        n_axes = len(self.config.patch_size)
        try:
            # Each tile goes to the device once, and is mirrored there.
            cut = {
                start: _tile(image, start, self.config.tile, n_axes).to(self.device)
                for start in dict.fromkeys(start for start, _ in jobs)
            }
            tiles = torch.stack([self._mirror(cut[start], axes) for start, axes in jobs])
            groups = self._run(tiles.contiguous(memory_format=channels_last(n_axes)), separate=separate)
            logits = groups[0] if len(groups) == 1 else torch.cat(groups, dim=1)
            return [self._mirror_back(logits[number], axes) for number, (_, axes) in enumerate(jobs)]
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(jobs) == 1:
                if self.device.type == "cpu":
                    raise PredictionError(describe_no_memory(error)) from error
                raise PredictionError(
                    f"{self.device} has not enough memory for one tile of {self.config.patch_size} voxels; end what "
                    "else is running there, or use --device cpu"
                ) from error
        self._tiles_per_batch = max(1, len(jobs) // 2)
        logger.info("%s is short of memory: %d tiles at a time from now on", self.device, self._tiles_per_batch)
        torch.cuda.empty_cache()
        return None

    def _run(self, tiles: Tensor, *, separate: bool) -> list[Tensor]:
        """Logits (N, K, *patch) float32: of each network, or their mean."""
        precision = autocast_dtype(tiles.device)
        # Not around the whole sweep: what torch wraps a generator in holds on to the rows it gave out last.
        with torch.no_grad(), torch.autocast(tiles.device.type, dtype=precision, enabled=precision is not None):
            if separate:
                return [network(tiles).float() for network in self.networks]
            total: Tensor = self.networks[0](tiles).float()
            for network in self.networks[1:]:
                total += network(tiles)
        return [total.div_(len(self.networks))] if len(self.networks) > 1 else [total]

    def _mirror(self, tile: Tensor, axes: Sequence[int]) -> Tensor:
        """A tile (C, *patch) for the network."""
        tile = _flip(tile, axes)
        if self.config.side_axis not in axes or not self.config.opposite_previous:
            return tile
        opposite = torch.tensor(self.config.opposite_previous, device=tile.device)
        return torch.cat([tile[:-1], opposite[tile[-1:].long()].to(tile.dtype)])

    def _mirror_back(self, logits: Tensor, axes: Sequence[int]) -> Tensor:
        """Of one tile, (K, *patch); of several networks, one after the other."""
        logits = _flip(logits, axes)
        if self.config.side_axis not in axes or not self.config.opposite:
            return logits
        return logits.unflatten(0, (-1, self.n_outputs))[:, list(self.config.opposite)].flatten(0, 1)


class _Sums:
    """Weighted sums over tiles, for the rows that tiles still reach.

    Rows between two edges, places where a tile begins or ends, are one band: a tile covers a band whole or not at all.
    """

    def __init__(
        self,
        n_values: int,
        plane: tuple[int, ...],
        *,
        edges: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        empty_logits: Sequence[float],
    ) -> None:
        self._n_values, self._plane, self._empty_logits = n_values, plane, empty_logits
        self._bands = list(itertools.pairwise(edges))
        self._open: dict[int, tuple[Tensor, Tensor]] = {}
        self._dtype, self._device = dtype, device

    def add(self, start: tuple[int, int, int], logits: Tensor, weight: Tensor) -> None:
        """Adds a tile, (V, n, A, B), that begins at `start` of the rows and of the other two axes; changes it."""
        logits = logits.mul_(weight)
        for own, covered, _ in self._cover(start, weight):
            covered += logits[:, own].to(covered.device)

    def add_empty(self, start: tuple[int, int, int], weight: Tensor) -> None:
        """Adds a tile that is background for sure, as `add` does."""
        for _, covered, part in self._cover(start, weight):
            if len(set(self._empty_logits)) == 1:
                covered += self._empty_logits[0] * part
            else:
                for of_channel, logit in zip(covered, self._empty_logits, strict=True):
                    if logit:
                        of_channel += logit * part

    def _cover(self, start: tuple[int, int, int], weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Counts the weight of a tile; of each band, its rows in the tile, the sums there, and the weight there."""
        n_rows, size_a, size_b = weight.shape
        place = (slice(start[1], start[1] + size_a), slice(start[2], start[2] + size_b))
        for first, last in self._bands:
            if start[0] <= first and last <= start[0] + n_rows:
                own = slice(first - start[0], last - start[0])
                total, weights = self._band(first, last)
                part = weight[own].to(weights.device)
                weights[:, place[0], place[1]] += part
                yield own, total[:, :, place[0], place[1]], part

    def complete(self, before: int) -> Iterator[tuple[int, Tensor]]:
        """The first row and the means (V, n, A, B) of each band that ends at `before` or earlier; it is forgotten."""
        while self._bands and self._bands[0][1] <= before:
            first, last = self._bands.pop(0)
            total, weights = self._band(first, last)
            del self._open[first]
            for row in range(last - first):
                # Row by row: dividing half precision by float32 makes a float32 copy on the way.
                total[:, row] /= weights[row]
            yield first, total
            # Not kept until the next band is complete: it can be gigabytes. So it is wherever rows are handed on.
            del total

    def _band(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        if first not in self._open:
            try:
                self._open[first] = self._allocate(first, last)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                logger.info("%s is short of memory: tiles are summed in the memory of the machine", self._device)
                self._device = torch.device("cpu")
                self._open = {row: (total.cpu(), weights.cpu()) for row, (total, weights) in self._open.items()}
                torch.cuda.empty_cache()
                self._open[first] = self._allocate(first, last)
        return self._open[first]

    def _allocate(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        shape = (last - first, *self._plane)
        # Classes last in memory, as networks in channels-last layout write them and as restoring reads them.
        total = torch.zeros((*shape, self._n_values), dtype=self._dtype, device=self._device).permute(3, 0, 1, 2)
        return total, torch.zeros(shape, device=self._device)


def tile_starts(size: int, patch: int, step_fraction: float) -> list[int]:
    """Where tiles start along an axis: evenly spread, the first at 0, the last at the end."""
    if size <= patch:
        return [0]
    # At least a voxel, else the slices of a volume that is tiled in 2D would be predicted twice.
    n_steps = math.ceil((size - patch) / max(1.0, patch * step_fraction))
    return [round(index * (size - patch) / n_steps) for index in range(n_steps + 1)]


def gaussian_weight(patch_size: Sequence[int]) -> Tensor:
    """Weights of a tile's voxels: a Gaussian about its centre with sigma = patch / 8, never zero; largest value 1."""
    weight = torch.ones(())
    for size in patch_size:
        offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
        axis = torch.exp(-0.5 * (offsets / (size / 8)) ** 2)
        weight = weight.unsqueeze(-1) * axis
    weight = weight / weight.max()
    # Below float16's normal range a voxel that only tile corners see would lose its digits.
    return weight.clamp_min(1e-4).float()


def _sums_type(n_values: int) -> torch.dtype:
    return torch.float32 if 4 * n_values <= MAX_FULL_PRECISION_BYTES else torch.float16


def predict_logits(image: Tensor, networks: Sequence[nn.Module], *, n_outputs: int, config: WindowConfig) -> Tensor:
    """Logits of a whole volume at once; see `SlidingWindow.sweep`.

    Args:
        image: (C, Z, Y, X) float32 on the device of the networks, in the network's axes.
        networks: in evaluation mode.
        n_outputs: channels of their output.
        config: how the volume is covered.

    Returns:
        (K, Z, Y, X) float32 on the same device.
    """
    window = SlidingWindow(networks, config, n_outputs=n_outputs, device=image.device)
    return torch.cat([logits.float() for _, logits in window.sweep(image)], dim=1)


def _pad(image: Tensor, tile: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """Pads (C, Z, Y, X) with zeros to at least a tile, evenly on both sides; and where the volume is in it."""
    padding: list[int] = []
    inner = []
    for size, patch in zip(image.shape[1:], tile, strict=True):
        missing = max(0, patch - size)
        padding = [missing // 2, missing - missing // 2, *padding]
        inner.append(slice(missing // 2, missing // 2 + size))
    return nn.functional.pad(image, padding), tuple(inner)


def _box(start: Sequence[int], tile: Sequence[int], offsets: Sequence[int], shape: Sequence[int]) -> Place:
    """The part of a tile that is in the volume, whose first voxel is at `offsets` of the padded one."""
    z, y, x = (
        slice(max(0, begin - offset), max(0, min(size, begin - offset + length)))
        for begin, length, offset, size in zip(start, tile, offsets, shape, strict=True)
    )
    return z, y, x


def _tile(image: Tensor, start: Sequence[int], tile: Sequence[int], n_axes: int) -> Tensor:
    window = (slice(begin, begin + size) for begin, size in zip(start, tile, strict=True))
    cut = image[(slice(None), *window)]
    return cut if n_axes == 3 else cut.squeeze(1)


def _flip(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """Mirrors spatial axes of (C, [Z,] Y, X)."""
    return tensor.flip([axis + 1 for axis in axes]) if axes else tensor
