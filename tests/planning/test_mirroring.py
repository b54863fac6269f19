"""Which axes may be mirrored, and what becomes of labels with a side."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autoseg.core.labels import LabelSpec
from autoseg.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint
from autoseg.planning.mirroring import plan_mirroring
from autoseg.planning.plan import Plan
from autoseg.planning.planner import make_plan

PAIR = ("kidney_left", "liver", "kidney_right")
ALONE = ("appendix_right", "liver")


def make(names: tuple[str, ...], axis_order: tuple[int, int, int] = (0, 1, 2)) -> Plan:
    """A plan for isotropic cases with these labels."""
    shape = (80, 80, 80)
    case = CaseFingerprint(case="c", shape=shape, spacing_mm=(1.0,) * 3, cropped_shape=shape, label_volumes_ml=())
    channel = ChannelFingerprint(
        name="MR", mean=1.0, std=1.0, minimum=0.0, maximum=2.0, median=1.0, percentile_00_5=0.0, percentile_99_5=2.0
    )
    fingerprint = Fingerprint(cases=(case,), channels=(channel,), median_cropped_fraction=1.0)
    labels = LabelSpec(names=names, values=tuple(range(1, len(names) + 1)))
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
