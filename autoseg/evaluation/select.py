"""Which configuration or ensemble predicts: the best out-of-fold Dice, and within noise the cheaper one.

Isensee et al., Nature Methods 2021, choose the best mean Dice over configurations and their pairwise ensembles. A
difference that cross-validation cannot tell from none is no reason to compute more, so here the cheapest candidate wins
that is not worse beyond the noise. Of a handful of cases the noise is not known, and the best mean Dice wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autoseg.evaluation.intervals import MIN_CASES, bootstrap_interval
from autoseg.evaluation.selection import Candidate, Comparison, Selection


def mean_of_labels(dice: NDArray[np.float64]) -> float:
    """Mean over labels of their means over cases, (n_cases, n_labels); NaN does not count."""
    return float(_case_shares(dice).mean())


def interval_of_labels(dice: NDArray[np.float64]) -> tuple[float, float]:
    """The 95% bootstrap interval of `mean_of_labels`, over cases."""
    return bootstrap_interval(_case_shares(dice))


def compare(candidate: NDArray[np.float64], against: NDArray[np.float64]) -> tuple[float, float, float]:
    """The gain of a candidate over another one on the same cases, and its 95% bootstrap interval.

    Args:
        candidate: Dice (n_cases, n_labels); NaN where the reference does not have the label.
        against: the same of the other.
    """
    shares = _case_shares(candidate - against)
    low, high = bootstrap_interval(shares)
    return float(shares.mean()), low, high


def _case_shares(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n_cases,) whose mean is the mean over labels of the means over cases, whichever cases have which labels.

    A share is that mean, and how far the case moves the means of the labels that it has: so a case without a label
    says nothing about it, and resampling shares varies as resampling cases does.
    """
    known = np.isfinite(values)
    with_cases = known.any(axis=0)
    if not with_cases.any():
        return np.full(len(values), np.nan)
    known, values = known[:, with_cases], values[:, with_cases]
    of_label = known.sum(axis=0)
    means = np.where(known, values, 0.0).sum(axis=0) / of_label
    moved = np.where(known, values - means, 0.0) / of_label
    result: NDArray[np.float64] = means.mean() + moved.sum(axis=1) * len(values) / len(means)
    return result


def select(
    candidates: Sequence[Candidate], dice: Mapping[str, NDArray[np.float64]], *, missing: Mapping[str, str]
) -> Selection:
    """Chooses one of the candidates.

    Args:
        candidates: at least one.
        dice: of each candidate, by its name, (n_cases, n_labels) of the same cases; NaN where the reference does not
            have the label.
        missing: configurations that could not be compared, and why.
    """
    by_cost = sorted(candidates, key=lambda known: (known.cost, known.name))
    best = max(by_cost, key=lambda known: known.mean_dice)
    n_cases = len(dice[best.name])
    cheaper_ones = by_cost[: by_cost.index(best)]
    comparisons = []
    chosen = best
    for cheaper in cheaper_ones if n_cases >= MIN_CASES else ():
        gain, low, high = compare(dice[best.name], dice[cheaper.name])
        is_better = low > 0
        comparisons.append(
            Comparison(candidate=best.name, against=cheaper.name, gain=gain, low=low, high=high, better=is_better)
        )
        if not is_better:
            chosen = cheaper
            break
    if len(candidates) == 1:
        why = f"{chosen.name} is the only one that is trained on all folds"
    elif chosen is best:
        why = f"{chosen.name} has the highest mean Dice, beyond noise of all that are cheaper"
        if not cheaper_ones:
            why = f"{chosen.name} has the highest mean Dice, and nothing is cheaper"
        elif not comparisons:
            why = f"{chosen.name} has the highest mean Dice; {n_cases} cases are too few to tell what is noise"
    else:
        last = comparisons[-1]
        why = (
            f"{best.name} has the highest mean Dice, but only {last.gain:.4f} more than {chosen.name} (95% interval "
            f"{last.low:.4f} to {last.high:.4f}), which is within noise, and {chosen.name} is cheaper"
        )
    return Selection(
        chosen=chosen.name,
        candidates=tuple(by_cost),
        comparisons=tuple(comparisons),
        missing=dict(missing),
        why=why,
    )
