"""Which axes may be mirrored, and what becomes of labels with a side."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fingerprints import make_channel_fingerprint, make_fingerprint

from autoseg.core.labels import LabelSpec, Region
from autoseg.data.listings import structure_labels
from autoseg.planning.mirroring import explain_mirroring, find_sides_of, plan_mirroring
from autoseg.planning.plan import Plan
from autoseg.planning.planner import make_plan

PAIR = ("kidney_left", "liver", "kidney_right")
ALONE = ("appendix_right", "liver")


def make(
    names: tuple[str, ...], axis_order: tuple[int, int, int] = (0, 1, 2), *, labels: LabelSpec | None = None
) -> Plan:
    """A plan for isotropic cases with these labels."""
    scan = ((80, 80, 80), (1.0, 1.0, 1.0))
    fingerprint = make_fingerprint(scan, channels=(make_channel_fingerprint("MR"),), label_volumes_ml=())
    labels = labels or LabelSpec(names=names, values=tuple(range(1, len(names) + 1)))
    return replace(make_plan(fingerprint, labels, dataset="d", n_folds=5), axis_order=axis_order)


@pytest.mark.parametrize(
    ("axis_order", "side_3d", "side_2d"),
    [((0, 1, 2), 2, 1), ((1, 0, 2), 2, 1), ((2, 0, 1), 0, None), ((1, 2, 0), 1, 0)],
)
def test_left_and_right_is_the_last_canonical_axis(
    axis_order: tuple[int, int, int], side_3d: int, side_2d: int | None
) -> None:
    plan = make(PAIR, axis_order)
    full, flat = (plan_mirroring(plan, plan.configuration(name)) for name in ("3d_fullres", "2d"))
    assert (full.axes, full.side_axis, full.opposite) == ((0, 1, 2), side_3d, (0, 3, 2, 1))
    assert (flat.axes, flat.side_axis) == ((0, 1), side_2d)
    alone = make(ALONE, axis_order)
    full, flat = (plan_mirroring(alone, alone.configuration(name)) for name in ("3d_fullres", "2d"))
    assert set(full.axes) == {0, 1, 2} - {side_3d}
    assert set(flat.axes) == {0, 1} - {side_2d}
    assert full.side_axis is None


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (PAIR, "kidney_left and kidney_right change places"),
        (ALONE, "left and right are not mirrored, because nothing mirrors appendix_right"),
        (("liver",), "no label has a side"),
    ],
)
def test_the_plan_says_which(names: tuple[str, ...], text: str) -> None:
    (reason,) = [reason.text for reason in make(names).reasons if reason.subject == "mirroring"]
    assert text in reason


LUNGS = ("left lung", "right lung", "tumour")
LEFT, RIGHT, TUMOUR = LUNGS


def of(*combinations: frozenset[str]) -> LabelSpec:
    """Three structures that overlap so, of which the lungs are opposite."""
    return structure_labels(LUNGS, combinations)


def test_classes_of_regions_change_places_with_what_their_regions_become() -> None:
    labels = of(frozenset([LEFT, TUMOUR]), frozenset([RIGHT, TUMOUR]))
    assert labels.names[3:] == ("left lung + tumour", "right lung + tumour")
    sides = find_sides_of(labels)
    assert (sides.opposite, sides.unpaired) == ((0, 2, 1, 3, 5, 4), ())
    plan = make((), labels=labels)
    mirroring = plan_mirroring(plan, plan.configuration("3d_fullres"))
    assert (mirroring.axes, mirroring.side_axis) == ((0, 1, 2), 2)
    assert mirroring.opposite == (0, 2, 1, 3, 5, 4)
    assert mirroring.opposite_outputs == (1, 0, 2)
    assert "left lung and right lung change places" in explain_mirroring(labels)


def test_a_mirrored_class_is_of_the_mirrored_regions() -> None:
    labels = of(frozenset([LEFT, TUMOUR]), frozenset([RIGHT, TUMOUR]), frozenset(LUNGS))
    sides = find_sides_of(labels)
    members = labels.memberships()
    for index, other in enumerate(sides.opposite):
        assert sides.opposite[other] == index
        assert members[:, other].tolist() == members[[1, 0, 2], index].tolist()


def test_a_combination_that_has_no_counterpart_is_not_mirrored() -> None:
    labels = of(frozenset([LEFT, TUMOUR]))
    assert find_sides_of(labels).unpaired == ("left lung with tumour",)
    plan = make((), labels=labels)
    mirroring = plan_mirroring(plan, plan.configuration("3d_fullres"))
    assert (mirroring.axes, mirroring.side_axis) == ((0, 1), None)
    assert "nothing mirrors left lung with tumour" in explain_mirroring(labels)


def test_classes_of_the_same_regions_stay_where_their_regions_do() -> None:
    """Two values that are of one region alone are one to the network, and no side makes one of the other."""
    labels = LabelSpec(
        names=("a", "b", "c"),
        values=(1, 2, 3),
        regions=(Region(name="whole", values=(1, 2, 3), written=1), Region(name="core", values=(3,), written=3)),
    )
    sides = find_sides_of(labels)
    assert (sides.opposite, sides.unpaired) == ((0, 1, 2, 3), ())


@pytest.mark.parametrize("names", [PAIR, LUNGS])
def test_what_nobody_has_annotated_stays_that_in_a_mirror(names: tuple[str, ...]) -> None:
    spec = LabelSpec(names=names, values=(1, 2, 3)) if names == PAIR else structure_labels(names, [frozenset(names)])
    labels = replace(spec, ignore=9)
    plan = make((), labels=labels)
    opposite = plan_mirroring(plan, plan.configuration("3d_fullres")).opposite
    assert opposite[-1] == labels.n_classes
    assert sorted(opposite) == list(range(labels.n_stored))
