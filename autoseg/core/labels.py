"""Which classes a dataset has, and how the values in its files relate to the network's channels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import DatasetError, list_some

MAX_REGIONS = 12
"""All combinations of so many regions are looked up in one table."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """Classes that are segmented as one structure. Regions may overlap: a voxel of a tumour's core is of the whole too.

    Attributes:
        name: of the region.
        values: in the files, that belong to it.
        written: the value of a voxel that is of this region and of no later one; one of `values`.
    """

    name: str
    values: tuple[int, ...]
    written: int


@dataclass(frozen=True, kw_only=True)
class LabelSpec:
    """The classes of a dataset. Background is class 0 and has the value 0 in every file.

    Class `i + 1` is called `names[i]` and has the value `values[i]` in the files, so values need not be consecutive and
    come back as they were. The network has one output for each class and the background, which exclude each other; or,
    where there are regions, one output for each region, which do not.

    Attributes:
        names: of the foreground classes.
        values: of the foreground classes in the files, positive, all different.
        regions: what is segmented instead of the classes, in the order in which they are written; empty where it is the
            classes themselves.
        ignore: value of voxels that nobody has annotated: nothing is learned there, and nothing is scored. In
            preprocessed label maps it is class `n_classes`. None where all voxels are annotated.
        one_file_each: the dataset has a mask file for each structure, and so have predictions.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    regions: tuple[Region, ...] = ()
    ignore: int | None = None
    one_file_each: bool = False

    def __post_init__(self) -> None:
        if len(self.names) != len(self.values) or not self.names:
            raise DatasetError(
                f"labels: found {len(self.names)} names and {len(self.values)} values, expected at least one name, "
                "each with its value"
            )
        if any(not 0 < value < 2**16 for value in self.values):
            wrong = [str(value) for value in self.values if not 0 < value < 2**16]
            raise DatasetError(f"labels: found the values {list_some(wrong)}, expected whole numbers from 1 to 65535")
        if len(set(self.values)) != len(self.values) or len(set(self.names)) != len(self.names):
            pairs = zip(self.names, self.values, strict=True)
            named = list_some([f"{name} = {value}" for name, value in pairs])
            raise DatasetError(f"labels: {named}: a name or a value is there twice")
        if self.ignore is not None and (self.ignore in self.values or not 0 < self.ignore < 2**16):
            raise DatasetError(
                f"labels: the value to ignore is {self.ignore}, expected one from 1 to 65535 that no label has"
            )
        self._check_regions()

    @classmethod
    def of_values(cls, values: Sequence[int]) -> LabelSpec:
        """Labels of which nothing but their values in the files is known."""
        return cls(names=tuple(f"label {value}" for value in values), values=tuple(values))

    def _check_regions(self) -> None:
        names = [region.name for region in self.regions]
        if len(set(names)) != len(names):
            raise DatasetError(f"regions: {list_some(names)} names a region twice")
        if len(names) > MAX_REGIONS:
            raise DatasetError(
                f"regions: found {len(names)}, expected at most {MAX_REGIONS}; merge some, or where each structure has "
                "a file and only few of them overlap, correct the masks so that no voxel is of two"
            )
        for region in self.regions:
            unknown = sorted(set(region.values) - set(self.values))
            if not region.values or unknown:
                expected = f"some of {list_some([str(value) for value in self.values])}"
                raise DatasetError(f"region '{region.name}': its values are {list(region.values)}, expected {expected}")
            if region.written not in region.values:
                raise DatasetError(
                    f"region '{region.name}': is written as {region.written}, expected one of its values "
                    f"{list(region.values)}"
                )

    @property
    def n_classes(self) -> int:
        """The foreground classes and the background."""
        return len(self.names) + 1

    @property
    def n_outputs(self) -> int:
        """Channels of the network's output."""
        return len(self.regions) or self.n_classes

    @property
    def structures(self) -> tuple[str, ...]:
        """Names of what is segmented: the regions, or else the foreground classes."""
        return tuple(self.structure_values)

    @property
    def structure_values(self) -> dict[str, tuple[int, ...]]:
        """The values in the files that belong to what is segmented, by its name."""
        if self.regions:
            return {region.name: region.values for region in self.regions}
        return {name: (value,) for name, value in zip(self.names, self.values, strict=True)}

    @property
    def all_values(self) -> tuple[int, ...]:
        """That the files may have besides 0."""
        return self.values if self.ignore is None else (*self.values, self.ignore)

    @property
    def n_stored(self) -> int:
        """How many different numbers a preprocessed label map may have: the classes, and one for what is ignored."""
        return self.n_classes + (self.ignore is not None)

    @property
    def foreground_classes(self) -> tuple[int, ...]:
        """Classes that the network tells from the background: of regions, those that one of them has."""
        if not self.regions:
            return tuple(range(1, self.n_classes))
        return tuple(index for index in np.flatnonzero(self.memberships().any(axis=0)).tolist() if index)

    def memberships(self) -> NDArray[np.bool_]:
        """(n_regions, n_classes): which classes each region has."""
        return np.array([[value in region.values for value in (0, *self.values)] for region in self.regions], bool)

    def class_of_regions(self) -> NDArray[np.uint16]:
        """(2**n_regions,): the class of a voxel by the regions that it is of; region i counts 2**i.

        It is the class that belongs to exactly these regions: of several, the one that the last of the regions is
        written as, or else the first. Where no class does, it is what the last of the regions is written as.
        """
        index_of = {value: index for index, value in enumerate((0, *self.values))}
        written = [index_of[region.written] for region in self.regions]
        bits = 1 << np.arange(len(self.regions))
        of_class = self.memberships().T @ bits
        table = np.zeros(2 ** len(self.regions), np.uint16)
        for pattern in range(1, len(table)):
            last = written[pattern.bit_length() - 1]
            exact = np.flatnonzero(of_class == pattern)
            table[pattern] = last if last in exact or not exact.size else exact[0]
        return table

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every value."""
        return np.dtype(np.uint8 if max(self.values) < 256 else np.uint16)

    def values_to_classes(self, label: NDArray) -> NDArray:
        """File values to classes 0..K.

        Args:
            label: (Z, Y, X), integers, of which every one is 0, in `values`, or to be ignored.

        Returns:
            Same shape, uint8 (uint16 for more than 255 classes).
        """
        table = np.zeros(max(self.all_values) + 1, class_dtype(self.n_stored))
        table[list(self.all_values)] = np.arange(1, self.n_stored)
        return _look_up(table, label)

    def classes_to_values(self, classes: NDArray) -> NDArray:
        """Classes 0..K to file values, in `dtype`. The inverse of `values_to_classes`."""
        return _look_up(np.array((0, *self.values), self.dtype), classes)


def _look_up(table: NDArray, indices: NDArray) -> NDArray:
    """`table[indices]`, slice by slice: numpy makes indices of eight bytes per voxel of what it looks up at once."""
    result = np.empty(indices.shape, table.dtype)
    for number, plane in enumerate(indices):
        result[number] = table[plane]
    return result


def class_dtype(n_classes: int) -> type[np.unsignedinteger]:
    """The smallest type that holds classes 0 to `n_classes` - 1 of this many: uint8, or uint16."""
    return np.uint8 if n_classes <= 256 else np.uint16


def mask_of(label: NDArray, values: Sequence[int]) -> NDArray[np.bool_]:
    """Where any of the values is. One after the other, because `isin` makes indices of eight bytes per voxel."""
    return functools.reduce(np.logical_or, (label == value for value in values))
