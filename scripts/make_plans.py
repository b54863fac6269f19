"""Makes the ready-made plans of well-known datasets from published facts about them.

    python scripts/make_plans.py [--out plans] [--only NAME]

Published are the smallest, the median and the largest size and spacing of a dataset, not those of each case. The cases
of its fingerprint are therefore drawn, by the same rule on every machine:

- Along each axis, evenly spaced quantiles of a distribution that is log-linear from the smallest to the median and from
  there to the largest, so that the median over the cases is exactly the published one.
- Which case gets which quantile is a fixed permutation, one for z and one for y and x together, so that y and x are
  equal where their figures are.
- The case with the n-th finest spacing along an axis has the n-th most voxels along it: thick slices go with few of
  them, coarse pixels with small matrices. So the field of view in mm stays plausible, as it would not if a case could
  have both the most and the thickest slices.

No image was read, and nothing was measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, floor
from pathlib import Path

from known_datasets import KNOWN_DATASETS, KnownDataset, Spread, Spreads

from autoseg.core.labels import LabelSpec
from autoseg.core.runtime import derive_seed
from autoseg.core.serialize import atomic_path, write_json
from autoseg.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint
from autoseg.planning.grid import COARSE_AXIS_PERCENTILE
from autoseg.planning.plan import Plan
from autoseg.planning.planner import make_plan
from autoseg.planning.ready import ReadyPlan

PLANS = Path(__file__).resolve().parents[1] / "plans"
N_FOLDS = 5
MAX_CASES = 300
"""More would make the files long, and the plans hardly different."""

NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class ThinSlices:
    """How thin the thin slices of a dataset are, by which the planner goes where the median slice is thick.

    Attributes:
        spacing_mm: 10th percentile of the spacing along z: what nnU-Net resamples this dataset to.
        source: of this figure.
    """

    spacing_mm: float
    source: str


_MONAI = "github.com/Project-MONAI/tutorials, modules/dynunet_pipeline/task_params.py"
_PRINTED = "an nnU-Net plan of the dataset that is printed in public repositories"

THIN_SLICES: dict[str, ThinSlices] = {
    "msd_prostate": ThinSlices(spacing_mm=3.6, source=_MONAI),
    "msd_pancreas": ThinSlices(spacing_mm=2.5, source=_MONAI),
    "msd_hepatic_vessel": ThinSlices(spacing_mm=1.5, source=_MONAI),
    "msd_spleen": ThinSlices(spacing_mm=1.6, source=_MONAI),
    "msd_colon": ThinSlices(spacing_mm=3.0, source=_MONAI),
    "acdc": ThinSlices(spacing_mm=5.0, source=_PRINTED),
    "kits19": ThinSlices(spacing_mm=1.0, source=f"borrowed from KiTS23, {_PRINTED}"),
    "kits23": ThinSlices(spacing_mm=1.0, source=_PRINTED),
}

TOO_WEAK: dict[str, str] = {
    "amos22_ct": "the ranges are estimated, among them the z spacing's, which decides the grid",
    "cvc_clinicdb": "all cases are equal, and the batch depends on there being 612, more than are drawn",
}
"""Datasets without a plan, and why."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the ready-made plans from published facts.")
    parser.add_argument(
        "--out", type=Path, default=PLANS, help="folder to write to (default: plans/ of the repository)"
    )
    chosen = [known for known in KNOWN_DATASETS if known.name not in TOO_WEAK]
    names = [known.name for known in chosen]
    parser.add_argument("--only", choices=names, metavar="NAME", help="only this plan; the README stays as it is")
    arguments = parser.parse_args()
    made = [(known, make_ready_plan(known)) for known in chosen if arguments.only in (None, known.name)]
    for known, ready in made:
        write_json(arguments.out / f"{known.name}.json", ready)
    if arguments.only is None:
        with atomic_path(arguments.out / "README.md") as temporary:
            temporary.write_text(describe([(known, ready.plan) for known, ready in made]), encoding="utf-8")


def make_ready_plan(known: KnownDataset) -> ReadyPlan:
    """Draws the fingerprint of a dataset and plans it with the default choices."""
    fingerprint = draw_fingerprint(known)
    labels = LabelSpec(names=tuple(known.labels), values=tuple(known.labels.values()))
    plan = make_plan(fingerprint, labels, dataset=known.name, n_folds=N_FOLDS)
    # Without autoseg's version, so that a release does not change every file.
    provenance = {key: value for key, value in plan.provenance.items() if key != "autoseg"}
    return ReadyPlan(
        title=known.title,
        source=known.source,
        note=_note(known),
        fingerprint=fingerprint,
        plan=replace(plan, provenance=provenance),
    )


def draw_fingerprint(known: KnownDataset) -> Fingerprint:
    """A fingerprint whose medians are the published ones; the rule is told at the top of this file."""
    n_cases = min(known.n_cases, MAX_CASES)
    through = _permutation(n_cases, known.name, "z")
    in_plane = _permutation(n_cases, known.name, "yx")
    order = (through, in_plane, in_plane)
    thin = THIN_SLICES.get(known.name)
    spacings = [
        [round(value, 4) for value in spread_out(spread, n_cases, tenth=thin.spacing_mm if thin and not axis else None)]
        for axis, spread in enumerate(known.spacing_mm)
    ]
    shapes, cropped = _sizes(known.shape, n_cases), _sizes(known.cropped_shape or known.shape, n_cases)
    cases = []
    for case in range(n_cases):
        z, y, x = (ranks[case] for ranks in order)
        # Sizes count from the largest down: the finest spacing has the most voxels.
        shape = (shapes[0][-1 - z], shapes[1][-1 - y], shapes[2][-1 - x])
        cases.append(
            CaseFingerprint(
                case=f"drawn_{case + 1:03}",
                shape=shape,
                spacing_mm=(spacings[0][z], spacings[1][y], spacings[2][x]),
                cropped_shape=(
                    min(cropped[0][-1 - z], shape[0]),
                    min(cropped[1][-1 - y], shape[1]),
                    min(cropped[2][-1 - x], shape[2]),
                ),
                label_volumes_ml=(),
            )
        )
    return Fingerprint(cases=tuple(cases), channels=_channels(known), median_cropped_fraction=known.cropped_fraction)


def spread_out(spread: Spread, n: int, *, tenth: float | None = None) -> list[float]:
    """Evenly spaced quantiles of a piecewise log-linear distribution.

    Args:
        spread: the smallest, the median and the largest value.
        n: how many.
        tenth: the 10th percentile, where it is known.

    Returns:
        Ascending values. Their median is exactly `spread.median`, and their 10th percentile exactly `tenth`.
    """
    knots = [(0.0, spread.low), (0.5, spread.median), (1.0, spread.high)]
    if tenth is not None:
        knots.insert(1, (COARSE_AXIS_PERCENTILE / 100, tenth))
    values = [_interpolate(knots, index / max(n - 1, 1)) for index in range(n)]
    for quantile, value in knots[1:-1]:
        # Both of the two between which the percentile is interpolated.
        position = quantile * (n - 1)
        values[floor(position)] = values[ceil(position)] = value
    return values


def _interpolate(knots: list[tuple[float, float]], quantile: float) -> float:
    """The value at a quantile, log-linear between knots of (quantile, value)."""
    (start, low), (end, high) = next(pair for pair in pairwise(knots) if quantile <= pair[1][0])
    return low * (high / low) ** ((quantile - start) / (end - start))


def _sizes(spreads: Spreads, n: int) -> list[list[int]]:
    return [[round(value) for value in spread_out(spread, n)] for spread in spreads]


def _permutation(n: int, *names: str) -> list[int]:
    """A permutation of 0..n-1 that is the same on every machine and with every version of every library."""
    return sorted(range(n), key=lambda index: derive_seed(*names, index))


def _channels(known: KnownDataset) -> tuple[ChannelFingerprint, ...]:
    if known.intensities is None:
        return tuple(
            ChannelFingerprint(
                name=name,
                mean=NAN,
                std=NAN,
                minimum=NAN,
                maximum=NAN,
                median=NAN,
                percentile_00_5=NAN,
                percentile_99_5=NAN,
            )
            for name in known.channels
        )
    return tuple(
        ChannelFingerprint(
            name=name,
            mean=found.mean,
            std=found.std,
            minimum=NAN if found.minimum is None else found.minimum,
            maximum=NAN if found.maximum is None else found.maximum,
            median=NAN if found.median is None else found.median,
            percentile_00_5=found.percentile_00_5,
            percentile_99_5=found.percentile_99_5,
        )
        for name, found in zip(known.channels, known.intensities, strict=True)
    )


def _note(known: KnownDataset) -> str:
    parts = [known.note]
    if thin := THIN_SLICES.get(known.name):
        parts.append(
            f"10th percentile of the spacing along z: {thin.spacing_mm:g} mm, to which nnU-Net resamples "
            f"({thin.source})."
        )
    drawn = f"{MAX_CASES} of the {known.n_cases}" if known.n_cases > MAX_CASES else f"all {known.n_cases}"
    parts.append(
        f"The spread over the cases is drawn, for {drawn} cases, between the smallest, the median and the largest "
        "value: no case is a real one, only the medians are those of the dataset. What is null was not published."
    )
    return " ".join(parts)


def describe(plans: list[tuple[KnownDataset, Plan]]) -> str:
    """The page about all plans, as Markdown."""
    rows = "\n".join(_row(known, plan) for known, plan in plans)
    return f"""# Ready-made plans

| Plan | Dataset | Modality | Cases | Configuration | Spacing (mm) | Patch | Batch |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

The configuration is the recommended one; each file has them all, with the reason of every decision. Spacing and patch
are in the plan's axis order, through-plane axis first.

To take grids, patches, batches and networks from one of them, while sizes and normalization come from your own scans:

    autoseg plan DATASET --like plans/msd_liver.json

Medians are published figures (each file names its sources), and the spread over the cases is drawn between the smallest
and the largest value: these plans are starting points and golden tests, not measurements.

Made by `python scripts/make_plans.py`; to be run again when the rules of planning change.
"""


def _row(known: KnownDataset, plan: Plan) -> str:
    chosen = plan.configuration(plan.recommended)
    spacing = " x ".join(f"{edge_mm:.4g}" for edge_mm in chosen.spacing_mm)
    patch = " x ".join(map(str, chosen.patch_size))
    modality = ", ".join(known.channels)
    cells = (
        f"[{known.name}]({known.name}.json)",
        known.title,
        modality,
        str(known.n_cases),
        chosen.name,
        spacing,
        patch,
        str(chosen.batch_size),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
