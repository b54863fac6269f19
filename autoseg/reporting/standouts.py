"""Predictions that stand out among others of the same kind, where there is no reference to compare them with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoseg.evaluation.intervals import robust_deviation
from autoseg.reporting.html import format_number

MIN_CASES = 8
"""Fewer cases do not tell what is usual."""

MAX_USUAL_Z = 3.5
"""Of a robust z-score, Iglewicz and Hoaglin, How to detect and handle outliers, 1993."""

MIN_DEVIATION = math.log(1.05)
"""Of logarithms of volumes: where all cases are nearly equal, differences of a few percent are still no reason."""

NEARLY_ALL = 0.9
MAX_TOLD = 4
FAILED, LOW_QUALITY, MISSING, UNUSUAL_VOLUME, WARNED = 5.0, 4.0, 3.0, 2.0, 1.0
"""How much each kind of reason counts: the highest of a case decides its place."""


@dataclass(frozen=True, kw_only=True)
class PredictedCase:
    """What is known of a case that was segmented.

    Attributes:
        case: its name.
        volumes_ml: of each label, by name.
        warnings: how the image differs from those of the training.
        error: why there is no label map; None where there is one.
        estimated_dice: that the folds' agreement tells; None where it tells nothing.
        is_flagged: whether that is low.
        seconds: that it took.
    """

    case: str
    volumes_ml: dict[str, float]
    warnings: tuple[str, ...]
    error: str | None
    estimated_dice: float | None
    is_flagged: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Standout:
    """A case that a person should look at.

    Attributes:
        case: its name.
        reasons: in words, the gravest first.
        gravity: orders cases.
    """

    case: str
    reasons: tuple[str, ...]
    gravity: float


def find_standouts(cases: Sequence[PredictedCase], names: Sequence[str]) -> list[Standout]:
    """Cases that failed, are likely to be bad, lack a label, have unusual volumes, or were warned of.

    A volume is unusual where its logarithm is more than `MAX_USUAL_Z` robust standard deviations (1.4826 times the
    median absolute deviation) from the median of the cases that have the label. A label is missing where at least
    `NEARLY_ALL` of the cases have it. Both need at least `MIN_CASES` cases.

    Args:
        cases: in any order, names all different.
        names: of the labels.

    Returns:
        The gravest first.
    """
    segmented = [case for case in cases if case.error is None]
    found: dict[str, list[tuple[float, str]]] = {case.case: _judge(case) for case in cases}
    scores = score_volumes(segmented, names)
    medians = {name: _median_ml(segmented, name) for name in names}
    for name, z_of in scores.items():
        is_usual = _is_usual(segmented, name)
        for case in segmented:
            z, volume_ml = z_of[case.case], case.volumes_ml.get(name, 0.0)
            if is_usual and not volume_ml > 0:
                found[case.case].append((MISSING, f"{name} is missing, which nearly all others have"))
            elif abs(z) > MAX_USUAL_Z:
                side = "large" if z > 0 else "small"
                found[case.case].append(
                    (
                        UNUSUAL_VOLUME + min(abs(z) / 100, 0.99),
                        f"{name} is unusually {side}: {format_number(volume_ml, n_digits=3)} ml (median "
                        f"{format_number(medians[name], n_digits=3)} ml, robust z {z:+.1f})",
                    )
                )
    standouts = []
    for name, reasons in found.items():
        if reasons:
            ordered = sorted(reasons, key=lambda reason: -reason[0])
            gravity = ordered[0][0] + 0.001 * min(len(ordered), 9)
            standouts.append(Standout(case=name, reasons=tuple(text for _, text in ordered), gravity=gravity))
    return sorted(standouts, key=lambda standout: (-standout.gravity, standout.case))


def tell_reasons(standout: Standout) -> str:
    """The reasons in a sentence; of many, the gravest."""
    shown = "; ".join(standout.reasons[:MAX_TOLD])
    n_more = len(standout.reasons) - MAX_TOLD
    return shown + (f"; and {n_more} more" if n_more > 0 else "")


def find_typical(cases: Sequence[PredictedCase], names: Sequence[str], *, n: int) -> list[PredictedCase]:
    """Cases that do not stand out, those with the most usual volumes first."""
    odd = {standout.case for standout in find_standouts(cases, names)}
    usual = [case for case in cases if case.case not in odd]
    scores = score_volumes(usual, names)

    def oddness(case: PredictedCase) -> float:
        known = [abs(z_of[case.case]) for z_of in scores.values() if math.isfinite(z_of[case.case])]
        return float(np.mean(known)) if known else math.inf

    # Those that have most labels show most.
    return sorted(usual, key=lambda case: (-_count_labels(case), oddness(case), case.case))[:n]


def score_volumes(cases: Sequence[PredictedCase], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Robust z-scores of the logarithms of volumes, by label and case; NaN where it has none, or too few cases do."""
    scores = {}
    for name in names:
        volumes_ml = np.array([case.volumes_ml.get(name, 0.0) for case in cases], np.float64)
        z = _robust_z(volumes_ml)
        scores[name] = dict(zip((case.case for case in cases), z.tolist(), strict=True))
    return scores


def _robust_z(volumes_ml: NDArray[np.float64]) -> NDArray[np.float64]:
    has_label = np.isfinite(volumes_ml) & (volumes_ml > 0)
    z = np.full(len(volumes_ml), np.nan)
    if has_label.sum() < MIN_CASES:
        return z
    logs = np.log(volumes_ml[has_label])
    from_median = logs - np.median(logs)
    deviation = max(robust_deviation(from_median), MIN_DEVIATION)
    z[has_label] = from_median / deviation
    return z


def _judge(case: PredictedCase) -> list[tuple[float, str]]:
    """What can be said of a case by itself."""
    if case.error is not None:
        return [(FAILED, f"it has no label map: {case.error}")]
    reasons = [(WARNED, warning) for warning in case.warnings]
    if case.is_flagged:
        estimate = case.estimated_dice
        is_known = estimate is not None and math.isfinite(estimate)
        expected = f": a Dice of {estimate:.2f} is to be expected" if is_known else ""
        lower = 1 - estimate if estimate is not None and is_known else 0.0
        reasons.append((LOW_QUALITY + 0.9 * lower, f"the folds agree little{expected}"))
    return reasons


def _is_usual(cases: Sequence[PredictedCase], name: str) -> bool:
    n = sum(case.volumes_ml.get(name, 0.0) > 0 for case in cases)
    return len(cases) >= MIN_CASES and n >= NEARLY_ALL * len(cases)


def _median_ml(cases: Sequence[PredictedCase], name: str) -> float:
    known = [volume for case in cases if (volume := case.volumes_ml.get(name, 0.0)) > 0]
    return float(np.median(known)) if known else math.nan


def _count_labels(case: PredictedCase) -> int:
    return sum(volume > 0 for volume in case.volumes_ml.values())
