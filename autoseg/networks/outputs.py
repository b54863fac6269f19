"""What the channels of a network's output mean: classes that exclude each other, or regions that may overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from autoseg.core.labels import LabelSpec

CERTAIN_LOGIT = 100.0
"""Of what is known without looking: more than a network says."""

BACKGROUND_LOGIT = 20.0
"""Of what a network finds nothing in, as it says of air itself: where such a tile overlaps another, both count."""


class Outputs:
    """From logits to classes and probabilities.

    Classes exclude each other: the largest logit wins, probabilities are a softmax. Regions do not: one counts where
    its logit is above zero, its probability is a sigmoid, and the class of a voxel follows from all regions that it is
    of, see `LabelSpec.class_of_regions`.

    Attributes:
        n: channels.
        n_classes: that voxels are decided to be of, with the background.
        has_regions: whether the channels are regions.
        ignore: class of voxels that nobody has annotated; None where all are.
    """

    def __init__(self, n_classes: int, labels: LabelSpec | None = None) -> None:
        """Of exclusive classes, so many with the background; or of the regions that labels have."""
        self.n_classes = n_classes
        self.has_regions = labels is not None and bool(labels.regions)
        self.ignore = n_classes if labels is not None and labels.ignore is not None else None
        self.n = n_classes
        if labels is not None and self.has_regions:
            self.n = len(labels.regions)
            tables = (
                torch.from_numpy(labels.memberships()),
                torch.from_numpy(labels.class_of_regions().astype(np.int64)),
            )
            self._tables = {torch.device("cpu"): tables}

    @classmethod
    def of(cls, labels: LabelSpec) -> Outputs:
        """Of a network for these labels."""
        return cls(labels.n_classes, labels)

    @property
    def empty_logits(self) -> tuple[float, ...]:
        """Of a voxel that is background for sure."""
        return (-BACKGROUND_LOGIT,) * self.n if self.has_regions else (BACKGROUND_LOGIT, *[0.0] * (self.n - 1))

    def decide(self, logits: Tensor, dim: int = 0) -> Tensor:
        """The class of each voxel, int64; `dim`, of size `n`, is gone. At a tie the lowest class wins."""
        return self._look_up(logits > 0, dim) if self.has_regions else logits.argmax(dim=dim)

    def decide_rows(self, logits: Tensor) -> NDArray[np.int64]:
        """`decide` for logits (N, n) of single voxels, as numpy."""
        if self.has_regions or logits.device.type != "cpu":
            return self.decide(logits, dim=1).cpu().numpy()
        # numpy looks for the largest with vector instructions, torch one by one.
        return logits.numpy().argmax(axis=1)

    def decide_probabilities(self, probability: Tensor, dim: int = 0) -> Tensor:
        """`decide` where probabilities are given."""
        return self._look_up(probability > 0.5, dim) if self.has_regions else probability.argmax(dim=dim)

    def probabilities(self, logits: Tensor, dim: int = 0) -> Tensor:
        """Of each channel, the same shape."""
        return logits.sigmoid() if self.has_regions else logits.softmax(dim=dim)

    def entropy(self, probability: Tensor) -> Tensor:
        """Of probabilities (n, ...), from 0 to 1: the mean over regions, or that of all classes together."""
        entropy = torch.special.entr(probability).sum(dim=0)
        if not self.has_regions:
            return entropy / math.log(max(2, self.n))
        return (entropy + torch.special.entr(1 - probability).sum(dim=0)) / (self.n * math.log(2))

    def members(self, classes: Tensor) -> Tensor:
        """Which channels each voxel is of: (n, *classes.shape) bool, from classes, int64."""
        if not self.has_regions:
            return F.one_hot(classes, self.n).movedim(-1, 0).bool()
        members, _ = self._tables_on(classes.device)
        return members[:, classes]

    def log_likelihood(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Logarithm of the probability that these classes have, (N,), from logits (n, N) and classes (N,) int64."""
        if not self.has_regions:
            return logits.log_softmax(dim=0).gather(0, classes[None])[0]
        return F.logsigmoid(torch.where(self.members(classes), logits, -logits)).sum(dim=0)

    def log_confidence(self, logits: Tensor) -> Tensor:
        """Logarithm of the probability of what is decided, (N,), from logits (n, N)."""
        if not self.has_regions:
            return logits.log_softmax(dim=0).amax(dim=0)
        return F.logsigmoid(logits.abs()).sum(dim=0)

    def without_unknown(self, logits: Tensor, known: Sequence[bool], dim: int = 0) -> Tensor:
        """Logits as of a network that knows some outputs only: what others have is background.

        Args:
            logits: `dim` of size `n`.
            known: for each output; the background of exclusive classes always is.
            dim: of the outputs.
        """
        unknown = [index for index, is_known in enumerate(known) if not is_known]
        index = torch.tensor(unknown, dtype=torch.int64, device=logits.device)
        result = logits.index_fill(dim, index, -CERTAIN_LOGIT)
        if not self.has_regions:
            outside = logits.index_select(dim, torch.tensor([0, *unknown], device=logits.device))
            result.select(dim, 0).copy_(outside.float().logsumexp(dim=dim))
        return result

    def _look_up(self, is_of: Tensor, dim: int) -> Tensor:
        combination = sum(of_region.long() << index for index, of_region in enumerate(is_of.unbind(dim)))
        assert isinstance(combination, Tensor)
        _, class_of_regions = self._tables_on(is_of.device)
        return class_of_regions[combination]

    def _tables_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The regions (n, classes) that each class is of, and the class of each combination of them."""
        if device not in self._tables:
            members, class_of_regions = self._tables[torch.device("cpu")]
            self._tables[device] = members.to(device), class_of_regions.to(device)
        return self._tables[device]
