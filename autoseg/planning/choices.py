"""What a user decides instead of the planner, and how it is typed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from autoseg.core.errors import PlanError
from autoseg.planning.plan import CONFIGURATIONS, suggest
from autoseg.planning.presets import find_preset

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the planner takes as given; it derives the rest.

    Attributes:
        preset: a name in `autoseg.planning.presets.PRESETS`.
        gpu_memory_gib: of the GPU to plan for; None for the preset's own.
        configurations: which to plan; None for all that make sense.
        spacing_mm: of the grid of full resolution, along the scans' (z, y, x); None to choose.
        patch_sizes: in voxels, by configuration, in the plan's axes (through-plane axis first).
        batch_size: of every configuration that `batch_sizes` does not name.
        batch_sizes: by configuration.
    """

    preset: str = "unet"
    gpu_memory_gib: float | None = None
    configurations: tuple[str, ...] | None = None
    spacing_mm: tuple[float, float, float] | None = None
    patch_sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    batch_size: int | None = None
    batch_sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        find_preset(self.preset)
        if self.configurations is not None and not self.configurations:
            raise PlanError(f"no configuration is named; choose some of {', '.join(CONFIGURATIONS)}, or all")
        for name in (*(self.configurations or ()), *self.patch_sizes, *self.batch_sizes):
            if name not in CONFIGURATIONS:
                raise PlanError(f"there is no configuration '{name}'; {suggest(name, CONFIGURATIONS)}")
        if self.gpu_memory_gib is not None and not 0 < self.gpu_memory_gib < math.inf:
            raise PlanError(f"--gpu-memory is {self.gpu_memory_gib:g} GiB, expected more than 0")
        if self.spacing_mm is not None and not all(0 < edge_mm < math.inf for edge_mm in self.spacing_mm):
            raise PlanError(f"--spacing is {self.spacing_mm} mm, expected three positive numbers (z, y, x)")
        for name, patch_size in self.patch_sizes.items():
            n_axes = 2 if name == "2d" else 3
            if len(patch_size) != n_axes or min(patch_size) < 1:
                raise PlanError(
                    f"--patch-size of {name} is {list(patch_size)}, expected {n_axes} whole numbers of at least 1"
                )
        for batch_size in (self.batch_size, *self.batch_sizes.values()):
            if batch_size is not None and batch_size < 1:
                raise PlanError(f"--batch-size is {batch_size}, expected at least 1")

    @property
    def named(self) -> frozenset[str]:
        """The configurations that the user speaks of."""
        return frozenset((*(self.configurations or ()), *self.patch_sizes, *self.batch_sizes))

    def batch_size_of(self, configuration: str) -> int | None:
        """The batch size that the user has set for a configuration."""
        return self.batch_sizes.get(configuration, self.batch_size)


def parse_choices(
    *,
    preset: str = "unet",
    gpu_memory_gib: float | None = None,
    configurations: Sequence[str] = (),
    spacing: str | None = None,
    patch_sizes: Sequence[str] = (),
    batch_sizes: Sequence[str] = (),
) -> Choices:
    """Choices as they are typed on a command line.

    Args:
        preset: its name.
        gpu_memory_gib: of the GPU to plan for.
        configurations: names, also several in one text with commas between; "all" or none at all leaves them open.
        spacing: "3,0.8,0.8" in mm (z, y, x), or one number for all axes.
        patch_sizes: "64,192,192" for 3d_fullres, "512,512" for 2d, "3d_lowres=96,96,96" for any other.
        batch_sizes: "4" for every configuration, "2d=12" for one.

    Raises:
        PlanError: something is not of that form.
    """
    names = split_names(configurations)
    everywhere, named = _parse_batch_sizes(batch_sizes)
    return Choices(
        preset=preset,
        gpu_memory_gib=gpu_memory_gib,
        configurations=None if not configurations or "all" in names else names,
        spacing_mm=None if spacing is None else _parse_spacing(spacing),
        patch_sizes=_parse_patch_sizes(patch_sizes),
        batch_size=everywhere,
        batch_sizes=named,
    )


def split_names(texts: Sequence[str]) -> tuple[str, ...]:
    """Names that are typed one by one or with commas between them, each once."""
    return tuple(dict.fromkeys(name.strip() for text in texts for name in text.split(",") if name.strip()))


def _parse_spacing(text: str) -> tuple[float, float, float]:
    values = _numbers(text, float, option="--spacing", example="3,0.8,0.8 or 1.5")
    if len(values) not in (1, 3):
        raise PlanError(f"--spacing: found '{text}', expected three numbers (z, y, x) or one for all axes")
    return (values[0], values[len(values) // 2], values[-1])


def _parse_patch_sizes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    sizes = {}
    for text in texts:
        name, _, numbers = text.rpartition("=")
        values = tuple(_numbers(numbers, int, option="--patch-size", example="64,192,192 or 2d=512,512"))
        sizes[name.strip() or ("2d" if len(values) == 2 else "3d_fullres")] = values
    return sizes


def _parse_batch_sizes(texts: Sequence[str]) -> tuple[int | None, dict[str, int]]:
    everywhere: int | None = None
    named: dict[str, int] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        values = _numbers(number, int, option="--batch-size", example="4 or 2d=12")
        if len(values) != 1:
            raise PlanError(f"--batch-size: found '{text}', expected for instance 4 or 2d=12")
        if name:
            named[name.strip()] = values[0]
        else:
            everywhere = values[0]
    return everywhere, named


def _numbers(text: str, kind: Callable[[str], T], *, option: str, example: str) -> list[T]:
    """Numbers with commas or an x between them."""
    try:
        return [kind(part) for part in text.lower().replace("x", ",").split(",")]
    except ValueError as error:
        raise PlanError(f"{option}: found '{text}', expected for instance {example}") from error
