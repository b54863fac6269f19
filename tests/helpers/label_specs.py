"""Labels with regions: nested, overlapping, and of two sides."""

from __future__ import annotations

from autoseg.core.labels import LabelSpec, Region

BRATS = LabelSpec(
    names=("necrosis", "oedema", "enhancing"),
    values=(1, 2, 4),
    regions=(
        Region(name="whole", values=(1, 2, 4), written=2),
        Region(name="core", values=(1, 4), written=1),
        Region(name="enhancing tumour", values=(4,), written=4),
    ),
)
OVERLAPPING = LabelSpec(
    names=("left", "right", "both"),
    values=(1, 2, 3),
    regions=(Region(name="left", values=(1, 3), written=1), Region(name="right", values=(2, 3), written=2)),
)


def make_kidneys(left: int, right: int) -> LabelSpec:
    return LabelSpec(names=("kidney left", "kidney right"), values=(left, right))


def make_kidneys_of_regions(left: int, right: int, both: int) -> LabelSpec:
    """The last value is of both kidneys."""
    return LabelSpec(
        names=("left alone", "right alone", "where they have grown together"),
        values=(left, right, both),
        regions=(
            Region(name="kidney left", values=(left, both), written=left),
            Region(name="kidney right", values=(right, both), written=right),
        ),
    )
