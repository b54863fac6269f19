"""What a training has written of its epochs."""

from __future__ import annotations

from autoseg.training.record import EpochFigures


def make_epochs(n: int, *, n_labels: int = 1) -> list[EpochFigures]:
    """Of 250 steps and ten seconds each; losses fall and Dice rises with every one."""
    return [
        EpochFigures(
            epoch=epoch,
            iteration=250 * epoch,
            time_s=10.0 * epoch,
            train_loss=1 / epoch,
            validation_loss=1 / epoch,
            validation_dice=1 - 1 / epoch,
            smoothed_dice=1 - 1 / epoch,
            class_dice=(0.5,) * n_labels,
            learning_rate=0.01,
            step_s=0.1,
            data_wait_fraction=0.0,
        )
        for epoch in range(1, n + 1)
    ]
