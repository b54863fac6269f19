"""The samplers of a training run: what it learns from, and what its progress is followed on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from autoseg.planning.mirroring import plan_mirroring
from autoseg.planning.plan import Plan
from autoseg.preprocessing.store import PreprocessedCase
from autoseg.training.augment import AugmentConfig
from autoseg.training.config import TrainConfig
from autoseg.training.patches import PatchSampler, PatchTransform
from autoseg.training.record import TrainingChoices


def training_sampler(
    cases: Sequence[PreprocessedCase],
    plan: Plan,
    choices: TrainingChoices,
    config: TrainConfig,
    *,
    seed: int,
    samples: Sequence[int] | None = None,
    augments: bool = True,
) -> PatchSampler:
    """Of patches to learn from.

    Args:
        cases: to train on.
        plan: its labels, channels and axes.
        choices: how they are drawn.
        config: how they are augmented.
        seed: of every draw.
        samples: of each batch that are read, by number; None for all.
        augments: False leaves the patches as they are.
    """
    augmentation: AugmentConfig | None = None
    transform: PatchTransform | None = None
    if augments and config.augment != "none":
        augmentation = _augmentation(plan, choices)
        if config.augment == "batchgenerators":
            from autoseg.training.augment_classic import ClassicAugmentation

            transform = ClassicAugmentation(choices.configuration.patch_size, augmentation)
            augmentation = None
    return PatchSampler(
        cases,
        patch_size=choices.configuration.patch_size,
        batch_size=choices.batch_size,
        foreground_fraction=choices.foreground_fraction,
        centred_on=plan.labels.foreground_classes,
        sampling=choices.sampling,
        optional_channels=plan.optional_indices,
        n_labels=_n_labels(plan, choices),
        perturbs=config.augment != "none",
        seed=f"training/{seed}",
        augmentation=augmentation,
        transform=transform,
        samples=samples,
    )


def validation_sampler(
    cases: Sequence[PreprocessedCase], plan: Plan, choices: TrainingChoices, *, seed: int
) -> PatchSampler:
    """Of patches to follow the progress on: comparable, whatever is trained on.

    Args:
        cases: to validate on.
        plan: its labels.
        choices: how large the patches and batches are.
        seed: of every draw.
    """
    return PatchSampler(
        cases,
        patch_size=choices.configuration.patch_size,
        batch_size=choices.batch_size,
        foreground_fraction=choices.foreground_fraction,
        centred_on=plan.labels.foreground_classes,
        n_labels=_n_labels(plan, choices),
        seed=f"validation/{seed}",
    )


def _n_labels(plan: Plan, choices: TrainingChoices) -> int | None:
    """See `autoseg.training.patches.Batch`."""
    return plan.labels.n_stored if choices.configuration.previous is not None else None


def _augmentation(plan: Plan, choices: TrainingChoices) -> AugmentConfig:
    """The published table, and which axes are mirrored."""
    configuration = choices.configuration
    config = AugmentConfig.for_patch(choices.planned_patch_size)
    if not choices.mirror:
        return dataclasses.replace(config, mirror_probability=0.0)
    mirroring = plan_mirroring(plan, configuration)
    opposite = mirroring.opposite
    if configuration.previous is not None:
        # Classes of both stages in one number, see `Batch`.
        n_labels, of_previous = len(opposite), opposite[: plan.labels.n_classes]
        opposite = tuple(own + n_labels * other for other in of_previous for own in opposite)
    return dataclasses.replace(
        config,
        mirror_axes=mirroring.axes,
        side_axis=mirroring.side_axis,
        opposite=opposite,
        opposite_outputs=mirroring.opposite_outputs,
    )
