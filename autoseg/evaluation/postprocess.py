"""Which steps of post-processing help, decided on out-of-fold label maps.

Isensee et al., Nature Methods 2021, supplement: keeping only the largest component, of all foreground and then of each
class, is adopted where it lowers no class' cross-validated Dice and raises the mean. Here each label may also lose
components under a volume, and have its holes filled.

The Dice that decides, here and between candidates, differs from that of an evaluation: where a label is not in the
reference it is 1 for nothing predicted and 0 for anything, so that false alarms count too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.core.geometry import joint_box, label_components
from autoseg.core.labels import mask_of
from autoseg.core.runtime import map_threads, n_cpus
from autoseg.core.steps import FOREGROUND, HOLES, LARGEST, SMALL, Step
from autoseg.evaluation.intervals import MIN_CASES, bootstrap_interval
from autoseg.evaluation.metrics import count_labels, count_mask
from autoseg.evaluation.scores import Target
from autoseg.evaluation.selection import StepDecision
from autoseg.inference.postprocess import apply_steps, components_to_keep

SIZE_QUANTILES = (0.0, 0.05, 0.1, 0.25)
SIZE_FRACTION = 0.5
"""Half of these quantiles of the volumes of reference components of a label are tried as the volume below which
components are removed: what is found too small must not be lost."""

MIN_GAIN = 1e-4
"""Of the mean Dice: what is less is not worth a step."""

BYTES_PER_VOXEL = 16
"""Of both label maps of a case, and of what is made of them to try steps."""

NO_GAIN = f"it does not raise the mean Dice by {MIN_GAIN:g}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """A case to try post-processing on.

    Attributes:
        prediction: (Z, Y, X) label values.
        reference: likewise.
        voxel_ml: volume of a voxel.
        ignored: (Z, Y, X), where nobody has annotated anything; None for nowhere.
        unknown: targets that were not looked for in the reference.
    """

    prediction: NDArray
    reference: NDArray
    voxel_ml: float
    ignored: NDArray[np.bool_] | None = None
    unknown: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, eq=False)
class Postprocessed:
    """What was decided, and what it does to the cases.

    Attributes:
        steps: adopted, in order.
        decisions: all that were tried, adopted or not; of several for one label the best.
        raw_dice: (n_cases, n_targets) without any step.
        dice: the same with the steps.
    """

    steps: tuple[Step, ...]
    decisions: tuple[StepDecision, ...]
    raw_dice: NDArray[np.float64]
    dice: NDArray[np.float64]


def decide_steps(
    cases: Sequence[str],
    load: Callable[[str], Pair],
    targets: Sequence[Target],
    *,
    needed_gib: Callable[[str], float] = lambda case: 0.0,
) -> Postprocessed:
    """Tries steps on all cases and adopts those that help.

    Args:
        cases: names, at least one.
        load: reads one; called several times for each, from several threads.
        targets: labels or regions.
        needed_gib: memory that one takes, `BYTES_PER_VOXEL` for each voxel.
    """
    values = tuple(sorted({value for target in targets for value in target.values}))
    whole = (Step(kind=LARGEST, target=FOREGROUND, values=values),) if len(targets) > 1 else ()

    def first_look(case: str) -> tuple[NDArray, list[NDArray]]:
        pair = load(case)
        return _count(pair, [(), whole][: 1 + len(whole)], targets), _component_volumes(pair, targets)

    text = "post-processing of all labels together"
    looks = map_threads(first_look, cases, n_threads=n_cpus(), description=text, needed_gib=needed_gib)
    counts = np.stack([counted for counted, _ in looks])
    steps: tuple[Step, ...] = ()
    decisions = []
    if whole:
        decisions.append(_decide_whole(whole[0], counts))
        steps = whole if decisions[0].adopted else ()
    volumes = [np.concatenate([found[index] for _, found in looks]) for index in range(len(targets))]
    options = [
        _options(target, volumes_ml) if _stands_alone(target, targets) else [()]
        for target, volumes_ml in zip(targets, volumes, strict=True)
    ]

    def second_look(case: str) -> list[NDArray]:
        pair = load(case)
        begun = replace(pair, prediction=apply_steps(pair.prediction, steps, voxel_ml=pair.voxel_ml))
        parts = zip(_cut_out(_squeezed(begun), targets), targets, options, strict=True)
        return [count_options(part, target, tried) for part, target, tried in parts]

    text = "post-processing of each label"
    found = map_threads(second_look, cases, n_threads=n_cpus(), description=text, needed_gib=needed_gib)
    final = []
    for index, tried in enumerate(options):
        of_label = np.stack([of_case[index] for of_case in found])
        if len(tried) == 1:
            final.append(of_label[:, 0])
            continue
        chosen, best = _decide_label(tried, of_label)
        decisions += chosen
        steps += tried[best]
        final.append(of_label[:, best])
    return Postprocessed(
        steps=steps,
        decisions=tuple(decisions),
        raw_dice=_dice(counts[:, 0]),
        dice=_dice(np.stack(final, axis=1)),
    )


def _count(pair: Pair, tried: Sequence[Sequence[Step]], targets: Sequence[Target]) -> NDArray[np.int64]:
    """(n_tried, n_targets, 3): voxels of each target in both, predicted, in the reference; -1 where it is not known."""
    values = sorted({value for target in targets for value in target.values})
    result = np.zeros((len(tried), len(targets), 3), np.int64)
    for of_tried, steps in zip(result, tried, strict=True):
        label = apply_steps(pair.prediction, steps, voxel_ml=pair.voxel_ml)
        if pair.ignored is not None:
            label = np.where(pair.ignored, 0, label)
        single = dict(zip(values, count_labels(label, pair.reference, values), strict=True))
        for row, target in zip(of_tried, targets, strict=True):
            if len(target.values) == 1:
                counts = single[target.values[0]]
            else:
                counts = count_mask(mask_of(label, target.values), mask_of(pair.reference, target.values))
            is_unknown = target.name in pair.unknown
            row[:] = -1 if is_unknown else (counts.overlap, counts.predicted, counts.reference)
    return result


def count_options(pair: Pair, target: Target, tried: Sequence[Sequence[Step]]) -> NDArray[np.int64]:
    """What steps make of one target, as if each were done; components are looked for once for all of them.

    Args:
        pair: a case, or the box around the target in both of its label maps.
        target: that all steps are of.
        tried: at most one step that removes components, and then perhaps one that fills holes.

    Returns:
        (n_tried, 3): voxels of the target in both, predicted, in the reference; -1 where it is not known.
    """
    if target.name in pair.unknown:
        return np.full((len(tried), 3), -1, np.int64)
    predicted, reference = mask_of(pair.prediction, target.values), mask_of(pair.reference, target.values)
    known = np.ones_like(predicted) if pair.ignored is None else ~pair.ignored
    components, n = label_components(predicted)
    sizes = np.bincount(components.ravel(), minlength=n + 1)[1:]
    known_sizes = sizes if pair.ignored is None else np.bincount(components[known], minlength=n + 1)[1:]
    overlaps = np.bincount(components[reference & known], minlength=n + 1)[1:]
    boxes = ndimage.find_objects(components)

    def fill(kept: NDArray[np.bool_]) -> tuple[int, int]:
        """Voxels of holes that the target gets, those of the reference and all."""
        box = joint_box([boxes[index] for index in np.flatnonzero(kept)])
        if not box:
            return 0, 0
        mask = np.concatenate([[False], kept])[components[box]]
        free = (pair.prediction[box] == 0) | predicted[box]
        holes = ndimage.binary_fill_holes(mask) & ~mask & free & known[box]
        return int(np.count_nonzero(holes & reference[box])), int(np.count_nonzero(holes))

    result = np.zeros((len(tried), 3), np.int64)
    filled: dict[bytes, tuple[int, int]] = {}
    for row, steps in zip(result, tried, strict=True):
        kept = np.ones(n, bool)
        for step in steps:
            if step.kind != HOLES:
                kept = components_to_keep(sizes, step, voxel_ml=pair.voxel_ml)
                continue
            # Often several rules keep the same components.
            if kept.tobytes() not in filled:
                filled[kept.tobytes()] = fill(kept)
            row[:2] += filled[kept.tobytes()]
        row += (overlaps[kept].sum(), known_sizes[kept].sum(), np.count_nonzero(reference))
    return result


def _squeezed(pair: Pair) -> Pair:
    """Without axes of length 1, as `apply_steps` has it: a slice by itself is an image, in which holes are closed."""
    if max(pair.prediction.shape) == 1:
        return pair
    ignored = None if pair.ignored is None else pair.ignored.squeeze()
    return replace(pair, prediction=pair.prediction.squeeze(), reference=pair.reference.squeeze(), ignored=ignored)


def _cut_out(pair: Pair, targets: Sequence[Target]) -> Iterator[Pair]:
    """The box that holds each target in both label maps; all are found in one pass."""
    largest = max(value for target in targets for value in target.values)
    found = [ndimage.find_objects(label, max_label=largest) for label in (pair.prediction, pair.reference)]
    for target in targets:
        boxes = [box for of_map in found for value in target.values if (box := of_map[value - 1]) is not None]
        box = joint_box(boxes) or (slice(0, 1),) * pair.prediction.ndim
        ignored = None if pair.ignored is None else pair.ignored[box]
        yield replace(pair, prediction=pair.prediction[box], reference=pair.reference[box], ignored=ignored)


def _component_volumes(pair: Pair, targets: Sequence[Target]) -> list[NDArray[np.float64]]:
    """Volumes in ml of the components of each target in the reference."""
    volumes: list[NDArray[np.float64]] = []
    for part, target in zip(_cut_out(pair, targets), targets, strict=True):
        components, _ = label_components(mask_of(part.reference, target.values))
        volumes.append((np.bincount(components.ravel())[1:] * pair.voxel_ml).astype(np.float64))
    return volumes


def _options(target: Target, volumes_ml: NDArray[np.float64]) -> list[tuple[Step, ...]]:
    """What to try for a target: first nothing, then what does least."""
    rules: list[tuple[Step, ...]] = [()]
    if volumes_ml.size:
        sizes_ml = sorted({float(f"{size:.3g}") for size in SIZE_FRACTION * np.quantile(volumes_ml, SIZE_QUANTILES)})
        rules += [
            (Step(kind=SMALL, target=target.name, values=target.values, min_ml=size),) for size in sizes_ml if size > 0
        ]
    rules.append((Step(kind=LARGEST, target=target.name, values=target.values),))
    if len(target.values) > 1:
        return rules
    fill = Step(kind=HOLES, target=target.name, values=target.values)
    return [*rules, *((*rule, fill) for rule in rules)]


def _stands_alone(target: Target, targets: Sequence[Target]) -> bool:
    """Whether what is removed of a target is of no other one."""
    return not any(set(other.values) & set(target.values) for other in targets if other is not target)


def _dice(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of counts (..., 3); 1 where the label is neither in the reference nor predicted, NaN where that is not known."""
    overlap, predicted, reference = np.moveaxis(counts, -1, 0)
    total = predicted + reference
    return np.where(total < 0, np.nan, np.where(total > 0, 2 * overlap / np.maximum(total, 1), 1.0))


def _decide_whole(step: Step, counts: NDArray[np.int64]) -> StepDecision:
    """By the rule of Isensee et al.; counts (n_cases, 2, n_targets, 3), without the step and with it."""
    dice = _dice(counts)
    gains = dice[:, 1] - dice[:, 0]
    of_labels, of_cases = _known_mean(gains, axis=0), _known_mean(gains, axis=1)
    lowered = int((of_labels < 0).sum())
    adopted = lowered == 0 and of_labels.mean() > MIN_GAIN and len(gains) >= MIN_CASES
    why = "it lowers the Dice of no label and raises the mean" if adopted else NO_GAIN
    if lowered:
        why = f"it lowers the Dice of {lowered} of {len(of_labels)} labels"
    return _decision(step, of_cases, adopted=adopted, why=why)


def _decide_label(tried: Sequence[tuple[Step, ...]], counts: NDArray[np.int64]) -> tuple[list[StepDecision], int]:
    """The steps of the best option with a decision each, and which option it is; counts (n_cases, n_tried, 3)."""
    dice = _dice(counts)
    is_known = np.isfinite(dice).all(axis=1)
    dice = dice[is_known] if is_known.any() else np.zeros_like(dice[:1])
    means = _known_mean(dice, axis=0)
    # The first of equals: that which does least.
    best = int(np.argmax(means[1:] > means[1:].max() - MIN_GAIN)) + 1
    gains = dice[:, best] - dice[:, 0]
    low, _ = bootstrap_interval(gains)
    adopted = bool(gains.mean() > MIN_GAIN and low >= 0 and len(gains) >= MIN_CASES)
    why = "it raises the mean Dice" if adopted else NO_GAIN
    if gains.mean() > MIN_GAIN and not adopted:
        why = "its gain is within noise"
    shown = tried[best] if gains.mean() > MIN_GAIN else tried[best][:1]
    return [_decision(step, gains, adopted=adopted, why=why) for step in shown], best if adopted else 0


def _known_mean(values: NDArray[np.float64], *, axis: int) -> NDArray[np.float64]:
    """Over what is known; 0 where nothing is."""
    known = np.isfinite(values)
    total: NDArray[np.float64] = np.where(known, values, 0.0).sum(axis=axis) / np.maximum(known.sum(axis=axis), 1)
    return total


def _decision(step: Step, gains: NDArray[np.float64], *, adopted: bool, why: str) -> StepDecision:
    low, high = bootstrap_interval(gains)
    return StepDecision(step=step, adopted=adopted, gain=float(gains.mean()), low=low, high=high, why=why)
