"""Which axes of a patch may be mirrored, and what mirroring does to its labels."""

from __future__ import annotations

from dataclasses import dataclass

from autoseg.core.labels import LabelSpec
from autoseg.core.sides import find_sides
from autoseg.planning.plan import ConfigurationPlan, Plan

# Of the canonical axes (Z, Y, X), which run to the head, to the front and to the right.
LEFT_RIGHT = 2


@dataclass(frozen=True, kw_only=True)
class Mirroring:
    """How patches of a configuration may be mirrored.

    Attributes:
        axes: of the patch; 0 is its first axis.
        side_axis: the one of `axes` that runs from left to right; None where none does.
        opposite: the class that each class becomes when `side_axis` is mirrored.
    """

    axes: tuple[int, ...]
    side_axis: int | None
    opposite: tuple[int, ...]


def plan_mirroring(plan: Plan, configuration: ConfigurationPlan) -> Mirroring:
    """All axes, but for left and right where labels have a side without a counterpart.

    Args:
        plan: knows the labels and the axis order.
        configuration: of the plan.
    """
    sides = find_sides(plan.labels.names)
    n_axes = configuration.n_axes
    # A 2D patch lacks the through-plane axis, which is the first.
    axis = plan.axis_order.index(LEFT_RIGHT) - (3 - n_axes)
    side_axis = axis if axis >= 0 else None
    axes = tuple(range(n_axes))
    if sides.unpaired and side_axis is not None:
        axes, side_axis = tuple(other for other in axes if other != side_axis), None
    return Mirroring(axes=axes, side_axis=side_axis, opposite=sides.opposite)


def explain_mirroring(labels: LabelSpec) -> str:
    """Why it is done so, for the plan."""
    sides = find_sides(labels.names)
    if sides.unpaired:
        return (
            f"left and right are not mirrored, because nothing mirrors {_list_some(sides.unpaired)}; other axes are, "
            "where the recipe mirrors"
        )
    if sides.has_pairs:
        pairs = [
            f"{labels.names[number - 1]} and {labels.names[other - 1]}"
            for number, other in enumerate(sides.opposite)
            if number < other
        ]
        return f"where left and right are mirrored, so are the labels: {_list_some(pairs)} change places"
    return "no label has a side, so that all axes may be mirrored"


def _list_some(names: list[str] | tuple[str, ...], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
