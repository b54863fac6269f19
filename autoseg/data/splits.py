"""Which cases train and which validate, fold by fold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoseg.core.errors import DatasetError
from autoseg.data.dataset import Case

DEFAULT_N_FOLDS = 5
# The seed and the order of the published method, so that fold 0 here is fold 0 there.
SPLIT_SEED = 12345


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Case ids of one fold.

    Attributes:
        training: sorted.
        validation: sorted; every case validates in exactly one fold, on a network that has not seen its group. Where
            there is one single group, it does both.
    """

    training: tuple[str, ...]
    validation: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The folds of a dataset, made once at plan time so that folds that train side by side agree."""

    folds: tuple[Fold, ...]


def make_splits(cases: Sequence[Case], *, n_folds: int = DEFAULT_N_FOLDS) -> Splits:
    """Shuffled folds of nearly equal size; cases of one group stay together.

    Args:
        cases: of the dataset.
        n_folds: at most this many; a dataset of fewer groups gets one fold per group.

    Raises:
        DatasetError: fewer than two folds.
    """
    if n_folds < 2:
        raise DatasetError(f"found {n_folds} folds, expected at least 2: each validates on what the others train on")
    groups = sorted({case.group for case in cases})
    if len(groups) < 2:
        everything = tuple(sorted(case.id for case in cases))
        return Splits(folds=(Fold(training=everything, validation=everything),))
    order = np.arange(len(groups))
    np.random.RandomState(SPLIT_SEED).shuffle(order)
    fold_of_group = {
        groups[index]: fold
        for fold, part in enumerate(np.array_split(order, min(n_folds, len(groups))))
        for index in part
    }
    folds = []
    for fold in range(min(n_folds, len(groups))):
        validation = tuple(sorted(case.id for case in cases if fold_of_group[case.group] == fold))
        training = tuple(sorted(case.id for case in cases if fold_of_group[case.group] != fold))
        folds.append(Fold(training=training, validation=validation))
    return Splits(folds=tuple(folds))


def parse_folds(text: str, *, n_folds: int) -> tuple[int, ...]:
    """Fold numbers from "0..4", "0,2", "3" or "all".

    Args:
        text: what the user typed.
        n_folds: how many folds there are.

    Raises:
        DatasetError: not of that form, or a fold that does not exist.
    """
    if text.strip() == "all":
        return tuple(range(n_folds))
    folds: list[int] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        if not first.isdecimal() or (dots and not last.isdecimal()) or int(last or first) < int(first):
            raise DatasetError(f"found the folds '{text}', expected for instance 0..{n_folds - 1}, 0,1, 1 or all")
        if int(last or first) >= n_folds:
            raise DatasetError(
                f"found the folds '{text}', expected folds from 0 to {n_folds - 1}: the plan has {n_folds}"
            )
        folds += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(folds))
