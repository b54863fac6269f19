"""How good a segmentation is likely to be, without a reference: folds that agree are mostly right.

Agreement of independently trained networks as a measure of failure: Lakshminarayanan et al., NeurIPS 2017; Jungo et
al., Frontiers in Neuroscience 2020.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from autoseg.networks.outputs import Outputs


@dataclass(frozen=True, kw_only=True)
class QualityModel:
    """How the agreement of folds tells the Dice that a segmentation would have: dice = intercept + slope * agreement.

    Attributes:
        intercept, slope: of the line, fitted on out-of-fold results.
        residual_std: of the Dice about the line, by the median absolute deviation.
        correlation: of agreement and Dice.
        low_dice: estimates below this are flagged.
        n_cases: that it was fitted on.
    """

    intercept: float
    slope: float
    residual_std: float
    correlation: float
    low_dice: float
    n_cases: int

    def estimate(self, agreement: float) -> float:
        """The Dice to expect, from 0 to 1; NaN where the agreement is NaN."""
        return min(1.0, max(0.0, self.intercept + self.slope * agreement)) if math.isfinite(agreement) else math.nan


class Agreement:
    """Mean Dice of networks with each other, from logits that come row by row."""

    def __init__(self, n_networks: int, outputs: Outputs, *, of: int | None = None) -> None:
        """Nothing is counted yet.

        Args:
            n_networks: at least two.
            outputs: what the channels of their logits mean.
            of: the network to compare with each other one, by position; None for all pairs.
        """
        self._n_networks, self._outputs, n_classes = n_networks, outputs, outputs.n_classes
        pairs = itertools.combinations(range(n_networks), 2)
        self._pairs = [pair for pair in pairs if of is None or of in pair]
        self._overlap = torch.zeros(len(self._pairs), n_classes, dtype=torch.int64)
        self._sizes = torch.zeros(n_networks, n_classes, dtype=torch.int64)

    def add(self, logits: Tensor) -> None:
        """Counts some rows, from logits (F * K, ...) of F networks; each voxel is to come once."""
        classes = self._outputs.decide(logits.unflatten(0, (self._n_networks, self._outputs.n)), dim=1)
        for size, of_network in zip(self._sizes, classes, strict=True):
            size += count_values(of_network, self._outputs.n_classes)
        for overlap, (first, second) in zip(self._overlap, self._pairs, strict=True):
            overlap += count_values(classes[first][classes[first] == classes[second]], self._outputs.n_classes)

    @property
    def is_of_nothing(self) -> bool:
        """Whether no network has found any foreground class."""
        return not bool(self._sizes[:, 1:].any())

    @property
    def value(self) -> float:
        """Mean over pairs of their mean Dice over the foreground classes that either has; 1 where none has any."""
        first, second = zip(*self._pairs, strict=True)
        sizes = self._sizes[list(first)] + self._sizes[list(second)]
        dice = 2 * self._overlap.double() / sizes
        return float(dice[:, 1:].nanmean(dim=1).nan_to_num(nan=1.0).mean())


def count_values(values: Tensor, n: int) -> Tensor:
    """How often 0 to n - 1 occur, (n,) int64 on the CPU."""
    return torch.bincount(values.flatten(), minlength=n).cpu()
