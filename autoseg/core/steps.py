"""Steps of post-processing: what is done to label maps after the network."""

from __future__ import annotations

from dataclasses import dataclass

from autoseg.core.errors import FormatError

LARGEST, SMALL, HOLES = "largest_component", "remove_small", "fill_holes"
FOREGROUND = "foreground"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of post-processing, done on the voxels of a target.

    Attributes:
        kind: "largest_component", "remove_small" or "fill_holes".
        target: name of the label or region, or "foreground" for all labels together.
        values: in the label maps, that are treated as one.
        min_ml: volume below which a component is removed; for "remove_small" alone.
    """

    kind: str
    target: str
    values: tuple[int, ...]
    min_ml: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in (LARGEST, SMALL, HOLES) or not self.values:
            raise FormatError(f"found the step {self.kind} of {self.values}, expected {LARGEST}, {SMALL} or {HOLES}")
        if (self.kind == SMALL) != (self.min_ml is not None) or (self.kind == HOLES and len(self.values) != 1):
            raise FormatError(f"the step {self.kind} of {self.target} does not fit its settings")

    def __str__(self) -> str:
        """In words."""
        if self.kind == LARGEST:
            return f"keep the largest component of {self.target}"
        return (
            f"fill holes of {self.target}" if self.kind == HOLES else f"remove {self.target} under {self.min_ml:g} ml"
        )
