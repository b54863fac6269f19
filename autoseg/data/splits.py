"""Which cases train and which validate, fold by fold."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from autoseg.core.errors import DatasetError, FormatError, Problem, list_some
from autoseg.core.serialize import read_json
from autoseg.data.case_values import describe_source, read_groups, read_rows, read_strata
from autoseg.data.dataset import Case

logger = logging.getLogger(__name__)

DEFAULT_N_FOLDS = 5
# The seed and the order of the published method, so that fold 0 here is fold 0 there.
SPLIT_SEED = 12345
NNUNET_FILE = "splits_final.json"

SHUFFLED = "shuffled, the cases of a group together"
ONE_GROUP = "there is one group only, which trains and validates"


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Case ids of one fold.

    Attributes:
        training: sorted.
        validation: sorted; on a network that has not seen their groups. Where there is one single group, it does both.
    """

    training: tuple[str, ...]
    validation: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The folds of a dataset, made once at plan time so that folds that train side by side agree.

    Attributes:
        folds: every case validates in exactly one, unless the user has said which cases validate.
        reason: how they were made.
    """

    folds: tuple[Fold, ...]
    reason: str = SHUFFLED

    @property
    def is_chosen(self) -> bool:
        """Whether anybody has said how to split."""
        return self.reason not in (SHUFFLED, ONE_GROUP)


@dataclass(frozen=True, kw_only=True)
class SplitChoices:
    r"""What a user says about the folds.

    Attributes:
        groups: what keeps cases together, in place of the dataset's own groups: "column:NAME" of the manifest, a CSV
            file with the columns case and group, or a regular expression with one group such as "(.+)_slice\d+", which
            is searched for in the case ids.
        stratify: a column of the manifest, or a CSV file with the columns case and value; folds get nearly as many
            cases of each value.
        validation: a file with the cases of the only validation, one id per line, or a CSV file with the column case.
        splits: nnU-Net's `splits_final.json`, or the `splits.json` of another work folder.
    """

    groups: str | None = None
    stratify: str | None = None
    validation: Path | str | None = None
    splits: Path | str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("stratify", "validation", "splits") if getattr(self, name) is not None]
        if len(given) > 1:
            raise DatasetError(
                f"found {' and '.join(f'--{name}' for name in given)}, expected one of them: each says which cases "
                "validate; leave out the others"
            )


def split_dataset(
    cases: Sequence[Case], choices: SplitChoices | None = None, *, n_folds: int | None = None, folder: Path
) -> tuple[tuple[Case, ...], Splits]:
    """The folds that a user asks for, checked.

    Args:
        cases: of the dataset.
        choices: what the user says; a `splits_final.json` in the dataset's folder counts where nothing is said.
        n_folds: of a cross-validation; None for `DEFAULT_N_FOLDS`, or for what the file says.
        folder: of the dataset.

    Returns:
        The cases with the groups that were asked for, and the folds.

    Raises:
        DatasetError: a file cannot be read or does not fit the cases, or a network would validate on what it has
            learned from; all offenders are listed.
    """
    choices = choices or SplitChoices()
    told = []
    if choices.groups is not None:
        group_of = read_groups(cases, choices.groups)
        cases = [replace(case, group=group_of[case.id]) for case in cases]
        told.append(f"groups by {describe_source(choices.groups)}")
        logger.info("--groups %s: %d groups of %d cases", choices.groups, len(set(group_of.values())), len(cases))
    if n_folds is not None and (choices.validation or choices.splits):
        raise DatasetError(
            f"found {n_folds} folds to make beside a file that says which cases validate, expected one of the two; "
            "leave out --folds, or the file"
        )
    file = Path(choices.splits) if choices.splits else _find_splits(folder, choices, n_folds)
    if file is not None:
        splits = read_splits(file)
        told.insert(0, f"as in {file.name}")
    elif choices.validation is not None:
        file = Path(choices.validation)
        splits = hold_out(cases, _read_list(file))
        told.insert(0, f"one fold, which validates on the cases that {file.name} lists")
    else:
        strata = None
        if choices.stratify is not None:
            strata = read_strata(cases, choices.stratify)
            told.append(f"nearly as many cases of each value of {describe_source(choices.stratify)} in each")
        splits = make_splits(cases, n_folds=DEFAULT_N_FOLDS if n_folds is None else n_folds, strata=strata)
        told.insert(0, splits.reason)
    check_splits(splits, cases, where=f"{file}: " if file else "")
    return tuple(cases), replace(splits, reason="; ".join(told))


def make_splits(
    cases: Sequence[Case], *, n_folds: int = DEFAULT_N_FOLDS, strata: Mapping[str, str] | None = None
) -> Splits:
    """Shuffled folds of nearly equal size; cases of one group stay together.

    Args:
        cases: of the dataset.
        n_folds: at most this many; a dataset of fewer groups gets one fold per group.
        strata: a value for each case id, of which all folds get nearly as many; None to leave it to chance.

    Raises:
        DatasetError: fewer than two folds.
    """
    if n_folds < 2:
        raise DatasetError(f"found {n_folds} folds, expected at least 2: each validates on what the others train on")
    groups = sorted({case.group for case in cases})
    if len(groups) < 2:
        everything = tuple(sorted(case.id for case in cases))
        return Splits(folds=(Fold(training=everything, validation=everything),), reason=ONE_GROUP)
    if len(groups) < n_folds:
        logger.warning("found %d groups of cases for %d folds: each group makes one", len(groups), n_folds)
    order = np.arange(len(groups))
    np.random.RandomState(SPLIT_SEED).shuffle(order)
    if strata is None:
        parts = np.array_split(order, min(n_folds, len(groups)))
        fold_of_group = {groups[index]: fold for fold, part in enumerate(parts) for index in part}
    else:
        shuffled = [groups[index] for index in order]
        fold_of_group = _balance(cases, shuffled, strata, n_folds=min(n_folds, len(groups)))
    folds = []
    for fold in range(min(n_folds, len(groups))):
        validation = tuple(sorted(case.id for case in cases if fold_of_group[case.group] == fold))
        training = tuple(sorted(case.id for case in cases if fold_of_group[case.group] != fold))
        folds.append(Fold(training=training, validation=validation))
    return Splits(folds=tuple(folds))


def _balance(
    cases: Sequence[Case], groups: Sequence[str], strata: Mapping[str, str], *, n_folds: int
) -> dict[str, int]:
    """The fold of each group: the one with the fewest cases of the group's most common value.

    Large groups come first, so that small ones even out what those have left uneven.
    """
    values: dict[str, Counter[str]] = {group: Counter() for group in groups}
    for case in cases:
        values[case.group][strata[case.id]] += 1
    value_of = {group: min(known, key=lambda value: (-known[value], value)) for group, known in values.items()}
    n_groups = Counter(value_of.values())
    if rare := sorted(value for value, n in n_groups.items() if n < n_folds):
        logger.warning("--stratify: not in every fold, because fewer groups have it: %s", list_some(rare))
    n_of_value: Counter[tuple[int, str]] = Counter()
    n_of_fold: Counter[int] = Counter()
    fold_of_group = {}
    for group in sorted(groups, key=lambda group: (-values[group].total(), value_of[group])):
        value, n = value_of[group], values[group].total()
        fold = min(range(n_folds), key=lambda fold: (n_of_value[fold, value], n_of_fold[fold]))
        fold_of_group[group] = fold
        n_of_value[fold, value] += n
        n_of_fold[fold] += n
    return fold_of_group


def hold_out(cases: Sequence[Case], validation: Sequence[str]) -> Splits:
    """One fold that validates on the named cases and trains on all others."""
    training = {case.id for case in cases} - set(validation)
    return Splits(folds=(_make_fold(training, validation),))


def read_splits(file: Path) -> Splits:
    """Folds from nnU-Net's `splits_final.json`, or from the `splits.json` of a work folder.

    Raises:
        DatasetError: the file is neither.
    """
    try:
        content = read_json(file)
    except FormatError as error:
        raise DatasetError(str(error)) from error
    names = ("train", "val")
    if isinstance(content, dict):
        content, names = content.get("folds"), ("training", "validation")
    if not isinstance(content, list) or not content or not all(_is_fold(entry, names) for entry in content):
        raise DatasetError(
            f"{file}: is no list of folds, expected for instance "
            '[{"train": ["a", "b"], "val": ["c"]}, {"train": ["a", "c"], "val": ["b"]}]'
        )
    return Splits(folds=tuple(_make_fold(*(entry[name] for name in names)) for entry in content))


def _is_fold(entry: Any, names: Sequence[str]) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(name), list) and all(isinstance(case, str) for case in entry[name]) for name in names
    )


def _make_fold(training: Iterable[str], validation: Iterable[str]) -> Fold:
    return Fold(training=tuple(sorted(set(training))), validation=tuple(sorted(set(validation))))


def _find_splits(folder: Path, choices: SplitChoices, n_folds: int | None) -> Path | None:
    """nnU-Net's file in the dataset's folder, where nothing else says which cases validate."""
    file = folder / NNUNET_FILE
    if not file.is_file():
        return None
    if n_folds is not None or choices.stratify or choices.validation:
        logger.info("%s is not used: the options say which cases validate", file)
        return None
    logger.info("the folds are those of %s; --folds makes others", file)
    return file


def _read_list(file: Path) -> list[str]:
    """Case ids, one per line or in the column case of a CSV file."""
    if file.suffix.lower() == ".csv":
        return [row["case"] for row in read_rows(file, "case") if row["case"]]
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}: cannot be read as text ({error}), expected one case id per line") from error
    return [line.strip() for line in lines if line.strip()]


def check_splits(splits: Splits, cases: Sequence[Case], *, where: str = "") -> None:
    """Refuses folds that do not fit the cases, or that let a network validate on what it has learned from.

    Args:
        splits: the folds.
        cases: of the dataset, with their groups.
        where: the beginning of the message.

    Raises:
        DatasetError: ids that the dataset does not have, cases in no fold, empty folds, a case or a group in training
            and validation of one fold, unless it is the only group; all of them are listed.
    """
    group_of = {case.id: case.group for case in cases}
    named = {case for fold in splits.folds for case in (*fold.training, *fold.validation)}
    advice = "correct the name, or remove it from the list"
    problems = [Problem(kind="unknown case", case=case, advice=advice) for case in sorted(named - group_of.keys())]
    advice = "add the case to the training or the validation of a fold, or remove it from the dataset"
    problems += [Problem(kind="case in no fold", case=case, advice=advice) for case in sorted(group_of.keys() - named)]
    for number, fold in enumerate(splits.folds):
        if not fold.training or not fold.validation:
            found = f"{len(fold.training)} cases to train on and {len(fold.validation)} to validate on"
            expected = "at least one of each"
            problems.append(Problem(kind="empty fold", text=f"fold {number}: found {found}", expected=expected))
        elif len(set(group_of.values())) > 1:
            problems += _find_leaks(number, fold, group_of)
    if problems:
        raise DatasetError.listing(f"{where}the folds cannot be used.", problems)
    validated = Counter(case for fold in splits.folds for case in fold.validation)
    if never := sorted(group_of.keys() - validated.keys()):
        logger.info("%d of %d cases never validate: no score will tell of them", len(never), len(group_of))
    if often := sorted(case for case, n in validated.items() if n > 1):
        logger.warning("cases that validate in several folds are scored by the last of them: %s", list_some(often))


def _find_leaks(number: int, fold: Fold, group_of: Mapping[str, str]) -> list[Problem]:
    """Cases, and groups of other cases, on both sides of a fold."""
    both = set(fold.training) & set(fold.validation)
    advice = "leave it on one side: a network must not validate on what it has learned from"
    problems = [
        Problem(kind="case in training and validation of one fold", case=case, text=f"fold {number}", advice=advice)
        for case in sorted(both)
    ]
    training, validation = (
        _by_group([case for case in side if case in group_of and case not in both], group_of)
        for side in (fold.training, fold.validation)
    )
    advice = "put all cases of a group on one side, or correct the groups: with --groups '(.+)' each case is its own"
    for group in sorted(training.keys() & validation.keys()):
        text = f"fold {number}, {group}: {list_some(training[group])} train, {list_some(validation[group])} validate"
        problems.append(Problem(kind="group in training and validation of one fold", text=text, advice=advice))
    return problems


def _by_group(cases: Sequence[str], group_of: Mapping[str, str]) -> dict[str, list[str]]:
    members: dict[str, list[str]] = {}
    for case in cases:
        members.setdefault(group_of[case], []).append(case)
    return members


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
