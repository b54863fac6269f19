"""Patches for training: which ones, and reading them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.core.errors import TrainingError
from autoseg.core.runtime import derive_seed
from autoseg.preprocessing.store import PreprocessedCase
from autoseg.training.augment import AugmentConfig, AugmentParameters, draw_parameters, read_size
from autoseg.training.cascade import perturb

T = TypeVar("T")

MAX_REDRAWS = 10
MIN_CONTENT_FRACTION = 0.02
"""Part of a patch whose values must differ from its usual one, in some channel, so that it is not blank."""
MIN_CASES_OF_CLASS = 5
MIN_PART_OF_CASES = 0.1
DROP_PROBABILITY = 0.25
N_TYPICAL = 1000
"""So many voxels tell the usual value."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Patches, not augmented yet: all of a batch, or the part of it that a process has.

    Attributes:
        images: (N, C, [Z,] Y, X) float16 as stored, or float32. Several batches wait, so they are kept small.
        classes: (N, [Z,] Y, X) uint8 or int32 as stored, or int64.
        cases: where each patch is from.
        cases_of_all: where each patch of the whole batch is from.
        augmentation: what is to be done to them; what was read is then larger than the patch where that needs it.
        known: (N, n) bool, which of the network's outputs were annotated in each patch; None for all in all.
        absent: (N, C) bool, channels that a patch is to be without; None for none in any.
        n_labels: of a cascade, where `classes` holds reference + n_labels * the class that the first stage has found,
            so that augmentation moves both as one; `part_classes` takes them apart. None without a first stage.
    """

    images: Tensor
    classes: Tensor
    cases: tuple[str, ...]
    cases_of_all: tuple[str, ...]
    augmentation: AugmentParameters | None
    known: Tensor | None = None
    absent: Tensor | None = None
    n_labels: int | None = None

    def part_classes(self, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Images, with what the first stage of a cascade has found as their last channel, and classes.

        Args:
            images: (N, C, *patch), of this batch, augmented or not.
            classes: (N, *patch) int64, of both stages.
        """
        if self.n_labels is None:
            return images, classes
        found = torch.div(classes, self.n_labels, rounding_mode="floor")
        return torch.cat([images, found.unsqueeze(1).to(images.dtype)], dim=1), classes % self.n_labels


@dataclass(frozen=True, kw_only=True)
class CasePool:
    """Cases to draw from.

    Attributes:
        cases: all of them.
        cases_with: the classes that patches are centred on and at least one case has, and the cases that have each.
    """

    cases: tuple[PreprocessedCase, ...]
    cases_with: dict[int, tuple[PreprocessedCase, ...]]

    @classmethod
    def of(cls, cases: Sequence[PreprocessedCase], *, centred_on: Collection[int] | None = None) -> CasePool:
        """The pool of these cases, with these of their classes; None for all foreground."""
        classes = sorted({class_index for case in cases for class_index in case.classes})
        if centred_on is not None:
            classes = [class_index for class_index in classes if class_index in centred_on]
        having = {class_index: tuple(case for case in cases if class_index in case.classes) for class_index in classes}
        return cls(cases=tuple(cases), cases_with=having)


def draw_case_then_class(pool: CasePool, rng: np.random.Generator) -> tuple[PreprocessedCase, int | None]:
    """A case, every one with equal chance, then one of its classes evenly; None where it has none.

    A class that one case in a hundred has is centred on in less than one foreground-centred patch in a hundred. The
    rule of nnU-Net (Isensee et al., Nature Methods 2021).
    """
    case = _pick(pool.cases, rng)
    classes = [class_index for class_index in case.classes if class_index in pool.cases_with]
    return case, _pick(classes, rng) if classes else None


def draw_class_then_case(pool: CasePool, rng: np.random.Generator) -> tuple[PreprocessedCase, int | None]:
    """A class evenly from those that any case has, then a case that has it; any case and None where there is none.

    A rare lesion is centred on as often as the liver. The few cases that have it are then seen more often than others;
    lest they are known by heart, a class that fewer than `MIN_CASES_OF_CLASS` have, or than `MIN_PART_OF_CASES` of all,
    is drawn less often.
    """
    if not pool.cases_with:
        return _pick(pool.cases, rng), None
    usual = min(max(MIN_CASES_OF_CLASS, MIN_PART_OF_CASES * len(pool.cases)), max(map(len, pool.cases_with.values())))
    while True:
        class_index = _pick(tuple(pool.cases_with), rng)
        having = pool.cases_with[class_index]
        if len(having) >= usual or rng.random() < len(having) / usual:
            return _pick(having, rng), class_index


def _pick(items: Sequence[T], rng: np.random.Generator) -> T:
    return items[int(rng.integers(len(items)))]


SAMPLING: dict[str, Callable[[CasePool, np.random.Generator], tuple[PreprocessedCase, int | None]]] = {
    "published": draw_case_then_class,
    "balanced": draw_class_then_case,
}
"""How a foreground-centred patch finds its case and its class, by name."""


class PatchTransform(Protocol):
    """Changes patches on the CPU while they are loaded."""

    @property
    def read_size(self) -> tuple[int, ...]:
        """Of the region it wants around each patch."""

    def __call__(self, images: NDArray, classes: NDArray, *, seed: int) -> tuple[NDArray, NDArray]:
        """Patches of what was read, (N, C, *read_size) and (N, *read_size); the same for the same seed."""

    def mirror_outputs(self, of_outputs: Tensor, *, seed: int) -> Tensor:
        """What belongs to each output of the network, (N, n), as it is in the patches of that seed."""


class PatchSampler:
    """Draws batches of patches. A batch depends on its number alone, so training can resume anywhere.

    Each sample of it has its own random numbers, so several processes can read a part each and have the whole batch.

    A patch lies inside its case. Along axes where the case is smaller it holds all of it, in any place: a case that is
    always seen in the same one is soon known by heart. Outside the case there is zero and background. The first
    samples of each batch are of any case and any place that is not blank, or where not all of a case is annotated,
    centred on a voxel that is; the last are centred on a voxel of a class, which `SAMPLING` finds.
    """

    def __init__(
        self,
        cases: Sequence[PreprocessedCase],
        *,
        patch_size: tuple[int, ...],
        batch_size: int,
        foreground_fraction: float,
        seed: int | str,
        augmentation: AugmentConfig | None = None,
        transform: PatchTransform | None = None,
        sampling: str = "published",
        centred_on: Collection[int] | None = None,
        optional_channels: Sequence[int] = (),
        n_labels: int | None = None,
        perturbs: bool = False,
        samples: Sequence[int] | None = None,
    ) -> None:
        """Prepares drawing; reads nothing.

        Args:
            cases: to draw from.
            patch_size: ([Z,] Y, X): what the network gets.
            batch_size: patches per batch.
            foreground_fraction: part of the batch, at its end, that is centred on foreground, rounded to whole
                samples. Where that would be none, or all, in every batch, it is one more in as many batches as make
                the fraction.
            seed: of every draw.
            augmentation: what the batch will be augmented with, drawn here so that just the voxels it needs are read.
            transform: augments here and now instead.
            sampling: a name in `SAMPLING`.
            centred_on: classes that are foreground; None for all but the background.
            optional_channels: that some cases lack: each is left out of a patch by a chance of `DROP_PROBABILITY`,
                though never all that the case has, so that the network learns to do without.
            n_labels: how many values a label map can have, where cases have a first stage, see `Batch`.
            perturbs: change that as a worse first stage might have done, see `autoseg.training.cascade`.
            samples: of each batch that are read, by number; None for all.

        Raises:
            TrainingError: the sampling is unknown.
        """
        if sampling not in SAMPLING:
            raise TrainingError(f"sampling '{sampling}' is unknown; known are {', '.join(SAMPLING)}")
        self._pool = CasePool.of(cases, centred_on=centred_on)
        self._draw_foreground = SAMPLING[sampling]
        # A 2D patch is one voxel thick.
        self._patch_size = patch_size
        self._patch = (1, *patch_size)[-3:]
        self._augmentation = augmentation
        self._transform = transform
        self._batch_size = batch_size
        self._samples = range(batch_size) if samples is None else tuple(samples)
        self._foreground_fraction = foreground_fraction
        self._seed = seed
        self._optional = tuple(optional_channels)
        self._n_labels, self._perturbs = n_labels, perturbs

    def batch(self, number: int) -> Batch:
        """Draws and reads the batch of that number."""
        augmentation = self._draw_augmentation(number)
        read = (1, *self._read_size(augmentation))[-3:]
        images, classes, drawn = [], [], []
        for sample in self._samples:
            case, class_index, rng = self._draw_case(number, sample)
            start = self._draw_place(case, class_index, rng)
            start = tuple(s - (r - p) // 2 for s, r, p in zip(start, read, self._patch, strict=True))
            images.append(read_region(case.image, start, read))
            classes.append(self._read_classes(case, start, read, rng))
            drawn.append(case)
        image, label = np.stack(images), np.stack(classes)
        if label.dtype != np.uint8:
            # torch can do little with uint16.
            label = label.astype(np.int32)
        if len(self._patch_size) == 2:
            image, label = image[:, :, 0], label[:, 0]
        if self._transform is not None:
            image, label = self._augment(image.astype(np.float32), label.astype(np.int64), number)
        return Batch(
            images=torch.from_numpy(image),
            classes=torch.from_numpy(label),
            cases=tuple(case.id for case in drawn),
            cases_of_all=tuple(self._draw_case(number, sample)[0].id for sample in range(self._batch_size)),
            augmentation=augmentation,
            known=self._known_outputs(drawn, augmentation, number),
            absent=self._draw_absent(drawn, number),
            n_labels=self._n_labels,
        )

    def _draw_case(self, number: int, sample: int) -> tuple[PreprocessedCase, int | None, np.random.Generator]:
        """The case of a sample, the class that it is centred on, and what draws the rest of it."""
        rng = np.random.default_rng(derive_seed("patches", self._seed, number, sample))
        if sample >= self._batch_size - self._count_foreground(number):
            return *self._draw_foreground(self._pool, rng), rng
        return _pick(self._pool.cases, rng), None, rng

    def _augment(self, images: NDArray, classes: NDArray, number: int) -> tuple[NDArray, NDArray]:
        """Transforms each patch with the seed of its sample."""
        assert self._transform is not None
        patches, patch_classes = zip(
            *(
                self._transform(image[None], wanted[None], seed=self._augmentation_seed(number, sample))
                for image, wanted, sample in zip(images, classes, self._samples, strict=True)
            ),
            strict=True,
        )
        return np.concatenate(patches), np.concatenate(patch_classes)

    def _known_outputs(
        self, cases: Sequence[PreprocessedCase], augmentation: AugmentParameters | None, number: int
    ) -> Tensor | None:
        """See `Batch.known`."""
        of_cases = [case.stored.known for case in cases]
        n_outputs = next((len(known) for known in of_cases if known is not None), None)
        if n_outputs is None:
            return None
        known = torch.tensor([(True,) * n_outputs if of_case is None else of_case for of_case in of_cases])
        if augmentation is not None:
            return augmentation.mirror_outputs(known)
        if self._transform is None:
            return known
        seeds = (self._augmentation_seed(number, sample) for sample in self._samples)
        rows = zip(known.split(1), seeds, strict=True)
        return torch.cat([self._transform.mirror_outputs(row, seed=seed) for row, seed in rows])

    def _augmentation_seed(self, number: int, sample: int) -> int:
        return derive_seed("augment", self._seed, number, sample)

    def _read_classes(
        self, case: PreprocessedCase, start: Sequence[int], size: Sequence[int], rng: np.random.Generator
    ) -> NDArray:
        """Of the reference; of a cascade, together with those that the first stage has found."""
        label = read_region(case.label, start, size)
        if self._n_labels is None:
            return label
        assert case.previous is not None
        found = read_region(case.previous, start, size)
        if self._perturbs:
            found = perturb(found, rng)
        return label.astype(np.int32) + self._n_labels * found.astype(np.int32)

    def _read_size(self, augmentation: AugmentParameters | None) -> tuple[int, ...]:
        if self._transform is not None:
            return self._transform.read_size
        return self._patch_size if augmentation is None else read_size(self._patch_size, augmentation)

    def _count_foreground(self, number: int) -> int:
        """How many samples of this batch are centred on foreground."""
        n_foreground = self._batch_size - round(self._batch_size * (1 - self._foreground_fraction))
        if 0 < n_foreground < self._batch_size:
            return n_foreground
        # Rounding leaves none or all, as in batches of one: then no patch of the whole training would be centred, or
        # each. The draw has its own generator, so that patches that are not centred are the same as without it.
        rng = np.random.default_rng(derive_seed("centred", self._seed, number))
        least, more = divmod(self._batch_size * self._foreground_fraction, 1)
        return int(least) + int(rng.random() < more)

    def _draw_absent(self, cases: Sequence[PreprocessedCase], number: int) -> Tensor | None:
        """See `Batch.absent`."""
        if not self._optional and not any(case.stored.absent for case in cases):
            return None
        absent = torch.zeros(len(cases), cases[0].image.shape[0], dtype=torch.bool)
        for row, case, sample in zip(absent, cases, self._samples, strict=True):
            rng = np.random.default_rng(derive_seed("channels", self._seed, number, sample))
            row[list(case.stored.absent)] = True
            dropped = [channel for channel in self._optional if not row[channel] and rng.random() < DROP_PROBABILITY]
            if len(dropped) < int((~row).sum()):
                row[dropped] = True
        return absent

    def _draw_augmentation(self, number: int) -> AugmentParameters | None:
        if self._augmentation is None:
            return None
        parameters = draw_parameters(
            n_samples=self._batch_size,
            n_channels=self._pool.cases[0].image.shape[0],
            n_axes=len(self._patch_size),
            config=self._augmentation,
            generator=torch.Generator().manual_seed(derive_seed("augment", self._seed, number)),
        )
        return parameters.select(self._samples)

    def _draw_place(self, case: PreprocessedCase, class_index: int | None, rng: np.random.Generator) -> tuple[int, ...]:
        """Where the patch starts; drawn again where it would be blank."""
        start = self._draw_start(case, class_index, rng)
        has_choice = any(size > patch for size, patch in zip(case.label.shape, self._patch, strict=True))
        if class_index is None and has_choice:
            for _ in range(MAX_REDRAWS):
                if not is_blank(read_region(case.image, start, self._patch)):
                    break
                start = self._draw_start(case, None, rng)
        return start

    def _draw_start(self, case: PreprocessedCase, class_index: int | None, rng: np.random.Generator) -> tuple[int, ...]:
        shape = case.label.shape
        bounds = [(min(0, size - patch), max(0, size - patch)) for size, patch in zip(shape, self._patch, strict=True)]
        positions = case.annotated if class_index is None else case.foreground(class_index)
        if len(positions):
            voxel = positions[int(rng.integers(len(positions)))]
            wanted = [int(v) - patch // 2 for v, patch in zip(voxel, self._patch, strict=True)]
        else:
            wanted = [int(rng.integers(low, high + 1)) for low, high in bounds]
        return tuple(min(max(low, start), high) for start, (low, high) in zip(wanted, bounds, strict=True))


def is_blank(image: NDArray) -> bool:
    """Whether nearly all values of each channel (C, Z, Y, X) are one and the same.

    Nothing can be learned there, and where all are the same, instance norm divides by a deviation of zero, so that its
    gradient is many times that of any other patch.
    """
    flat = image.reshape(len(image), -1)
    n_voxels = flat.shape[1]
    usual = np.median(flat[:, :: max(1, n_voxels // N_TYPICAL)], axis=1, keepdims=True)
    return bool(np.count_nonzero(flat != usual, axis=1).max() < MIN_CONTENT_FRACTION * n_voxels)


def read_region(array: NDArray, start: Sequence[int], size: Sequence[int]) -> NDArray:
    """Reads a region of the last three axes that may reach beyond the array; zero there.

    Args:
        array: (..., Z, Y, X), memory-mapped or not.
        start: of the region, may be negative.
        size: of the region.

    Returns:
        (..., *size), a copy.
    """
    result = np.zeros((*array.shape[:-3], *size), array.dtype)
    source: list[Any] = [Ellipsis]
    target: list[Any] = [Ellipsis]
    for begin, length, limit in zip(start, size, array.shape[-3:], strict=True):
        low, high = max(0, begin), min(limit, begin + length)
        if low >= high:
            return result
        source.append(slice(low, high))
        target.append(slice(low - begin, high - begin))
    result[tuple(target)] = array[tuple(source)]
    return result
