"""Which axes of a patch may be mirrored, and what mirroring does to its labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoseg.core.errors import list_some
from autoseg.core.labels import LabelSpec
from autoseg.core.sides import Sides, find_sides, is_nameless
from autoseg.planning.plan import ConfigurationPlan, Plan

# Of the canonical axes (Z, Y, X), which run to the head, to the front and to the right.
LEFT_RIGHT = 2


@dataclass(frozen=True, kw_only=True)
class Mirroring:
    """How patches of a configuration may be mirrored.

    Attributes:
        axes: of the patch; 0 is its first axis.
        side_axis: the one of `axes` that runs from left to right; None where none does.
        opposite: the class that each class of a preprocessed label map becomes when `side_axis` is mirrored.
        opposite_outputs: the channel that each channel of the network's output becomes.
    """

    axes: tuple[int, ...]
    side_axis: int | None
    opposite: tuple[int, ...]
    opposite_outputs: tuple[int, ...]


def plan_mirroring(plan: Plan, configuration: ConfigurationPlan) -> Mirroring:
    """All axes, but for left and right where labels have a side without a counterpart.

    Args:
        plan: knows the labels and the axis order.
        configuration: of the plan.
    """
    sides = find_sides_of(plan.labels)
    n_axes = configuration.n_axes
    # A 2D patch lacks the through-plane axis, which is the first.
    axis = plan.axis_order.index(LEFT_RIGHT) - (3 - n_axes)
    side_axis = axis if axis >= 0 else None
    axes = tuple(range(n_axes))
    if sides.unpaired and side_axis is not None:
        axes, side_axis = tuple(other for other in axes if other != side_axis), None
    outputs = find_sides(plan.labels.structures).opposite
    return Mirroring(
        axes=axes,
        side_axis=side_axis,
        # What nobody has annotated stays that.
        opposite=(*sides.opposite, *range(plan.labels.n_classes, plan.labels.n_stored)),
        opposite_outputs=tuple(other - 1 for other in outputs[1:]) if plan.labels.regions else outputs,
    )


def find_sides_of(labels: LabelSpec) -> Sides:
    """What mirroring left and right does to the classes; where there are regions, it is their names that tell.

    A class of the regions "left lung" and "tumour" becomes the one of "right lung" and "tumour"; where there is none,
    these regions count as unpaired.
    """
    sides = find_sides(labels.structures)
    if not labels.regions:
        return sides
    members = labels.memberships()
    mirrored = members[[other - 1 for other in sides.opposite[1:]]]
    opposite, unpaired = [], list(sides.unpaired)
    for index, wanted in enumerate(mirrored.T):
        known = np.flatnonzero((members == wanted[:, None]).all(axis=0))
        if not known.size:
            own = (region.name for region, is_of in zip(labels.regions, members[:, index], strict=True) if is_of)
            unpaired.append(" with ".join(own))
        # Of several that are of the same regions any will do: they are one to the network.
        opposite.append(index if index in known or not known.size else int(known[0]))
    return Sides(opposite=tuple(opposite), unpaired=tuple(unpaired))


def explain_mirroring(labels: LabelSpec) -> str:
    """Why it is done so, for the plan."""
    sides = find_sides_of(labels)
    nameless = [name for name in sides.unpaired if is_nameless(name)]
    if nameless:
        return (
            f"left and right are not mirrored, because the names of {list_some(nameless, most=4)} do not tell which of "
            "them mirror each other; with names such as 'kidney left' and 'kidney right' they are"
        )
    if sides.unpaired:
        return (
            f"left and right are not mirrored, because nothing mirrors {list_some(sides.unpaired, most=4)}; other "
            "axes are, where the recipe mirrors"
        )
    if sides.has_pairs:
        names = labels.structures
        pairs = [
            f"{names[number - 1]} and {names[other - 1]}"
            for number, other in enumerate(find_sides(names).opposite)
            if number < other
        ]
        return f"where left and right are mirrored, so are the labels: {list_some(pairs, most=4)} change places"
    return "no label has a side, so that all axes may be mirrored"
