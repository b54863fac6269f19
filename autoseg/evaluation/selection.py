"""Which configuration or ensemble predicts, and what is done to its label maps: the decision and its reasons."""

from __future__ import annotations

from dataclasses import dataclass

from autoseg.core.errors import FormatError
from autoseg.core.serialize import later
from autoseg.core.steps import Step


@dataclass(frozen=True, kw_only=True)
class StepDecision:
    """A step that was tried on out-of-fold label maps.

    Attributes:
        step: what was tried.
        adopted: whether it is done from now on.
        gain: in the mean Dice over cases of its target (of all labels for the foreground).
        low, high: 95% bootstrap interval of the gain.
        why: in words.
    """

    step: Step
    adopted: bool
    gain: float
    low: float
    high: float
    why: str


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A configuration, or an ensemble of two.

    Attributes:
        configurations: names.
        models: the sha256 of each.
        mean_dice: out-of-fold, after post-processing: mean over labels of their mean over cases, where a label that is
            not in the reference counts 1 if nothing was predicted and 0 if anything was.
        raw_dice: the same before post-processing.
        label_dice: after post-processing, per label.
        cost: multiply-adds, in billions, that one fold takes for a case of median size, without mirrored copies.
        steps: of post-processing that are adopted, in order.
        decisions: all that were tried.
        interval: of `mean_dice`, 95% by bootstrap over cases; None where it was not computed.
    """

    configurations: tuple[str, ...]
    models: tuple[str, ...]
    mean_dice: float
    raw_dice: float
    label_dice: dict[str, float]
    cost: float
    steps: tuple[Step, ...]
    decisions: tuple[StepDecision, ...]
    interval: tuple[float, float] | None = later(None)

    @property
    def name(self) -> str:
        """Such as "3d_fullres" or "2d + 3d_fullres"."""
        return " + ".join(self.configurations)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The candidate with the highest mean Dice against a cheaper one.

    Attributes:
        candidate, against: names.
        gain: in mean Dice.
        low, high: 95% bootstrap interval of the gain, over the same cases.
        better: whether the gain is beyond noise, that is, whether the interval is above 0.
    """

    candidate: str
    against: str
    gain: float
    low: float
    high: float
    better: bool


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The decision, for `selection.json`.

    Attributes:
        chosen: name of the candidate that predicts.
        candidates: all that were compared, cheapest first.
        comparisons: of the best candidate with cheaper ones, the cheapest first, until one is within noise of it.
        missing: configurations of the plan that could not be compared, and why.
        why: in words.
    """

    chosen: str
    candidates: tuple[Candidate, ...]
    comparisons: tuple[Comparison, ...]
    missing: dict[str, str]
    why: str

    def __post_init__(self) -> None:
        if self.chosen not in [known.name for known in self.candidates]:
            listed = ", ".join(known.name for known in self.candidates)
            raise FormatError(f"'{self.chosen}' was chosen, which is none of the candidates {listed}")

    @property
    def candidate(self) -> Candidate:
        """The one that was chosen."""
        return next(known for known in self.candidates if known.name == self.chosen)
