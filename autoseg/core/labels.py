"""Which classes a dataset has, and how the values in its files relate to the network's channels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import DatasetError


@dataclass(frozen=True, kw_only=True)
class LabelSpec:
    """The classes of a dataset. Background is class 0 and has the value 0 in every file.

    Class `i + 1` of the network is called `names[i]` and has the value `values[i]` in the files, so values need not be
    consecutive and come back as they were.

    Attributes:
        names: of the foreground classes.
        values: of the foreground classes in the files, positive, all different.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.values) or not self.names:
            raise DatasetError(
                f"labels: found {len(self.names)} names and {len(self.values)} values, expected at least one name, "
                "each with its value"
            )
        if any(not 0 < value < 2**16 for value in self.values):
            raise DatasetError(f"labels: values are {list(self.values)}, expected whole numbers from 1 to 65535")
        if len(set(self.values)) != len(self.values) or len(set(self.names)) != len(self.names):
            raise DatasetError(
                f"labels: {dict(zip(self.names, self.values, strict=True))} names a label or a value twice"
            )

    @property
    def n_classes(self) -> int:
        """Channels of the network's output: the foreground classes and the background."""
        return len(self.names) + 1

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every value."""
        return np.dtype(np.uint8 if max(self.values) < 256 else np.uint16)

    def values_to_classes(self, label: NDArray) -> NDArray:
        """File values to classes 0..K.

        Args:
            label: (Z, Y, X), integers, of which every one is 0 or in `values`.

        Returns:
            Same shape, uint8 (uint16 for more than 255 classes).
        """
        table = np.zeros(max(self.values) + 1, class_dtype(self.n_classes))
        table[list(self.values)] = np.arange(1, self.n_classes)
        # Slice by slice: numpy makes indices of eight bytes per voxel of what it looks up at once.
        classes = np.empty(label.shape, table.dtype)
        for source, target in zip(label, classes, strict=True):
            target[...] = table[source]
        return classes

    def classes_to_values(self, classes: NDArray) -> NDArray:
        """Classes 0..K to file values, in `dtype`. The inverse of `values_to_classes`."""
        return np.array((0, *self.values), self.dtype)[classes]


def class_dtype(n_classes: int) -> type[np.unsignedinteger]:
    """The smallest type that holds classes 0 to `n_classes` - 1 of this many: uint8, or uint16."""
    return np.uint8 if n_classes <= 256 else np.uint16


def mask_of(label: NDArray, values: Sequence[int]) -> NDArray[np.bool_]:
    """Where any of the values is. One after the other, because `isin` makes indices of eight bytes per voxel."""
    return functools.reduce(np.logical_or, (label == value for value in values))
