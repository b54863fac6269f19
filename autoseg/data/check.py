"""What is wrong with a dataset, found while each of its files is read just once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from autoseg.core.errors import ERROR, DatasetError, FormatError, Problem
from autoseg.core.labels import LabelSpec
from autoseg.core.runtime import map_threads
from autoseg.data.compare import CaseLook, look_at_case
from autoseg.data.dataset import Case, Dataset
from autoseg.data.listings import structure_labels
from autoseg.data.load import LoadedCase, label_values, load_case, loading_gib
from autoseg.data.references import HALVED, ROUNDED, combinations_of, mend_to_read, read_label_map
from autoseg.data.soft_masks import MIN_SHADES, WHITE, has_grey_borders

MAX_LABELS_FOUND = 1000

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """Everything that was found wrong with a dataset, for `check.json`.

    Attributes:
        dataset: its name, or its path where the files do not make a dataset.
        n_cases: how many cases there are; 0 where the files do not make a dataset.
        problems: what was found; empty for a dataset in order.
        key: digest of the dataset's index and of the state of its files; empty where there are errors.
    """

    dataset: str
    n_cases: int
    problems: tuple[Problem, ...]
    key: str

    def count(self, severity: str) -> int:
        """How many problems are errors, warnings or notes."""
        return sum(problem.severity == severity for problem in self.problems)


@dataclass(frozen=True, kw_only=True)
class Scan(Generic[T]):
    """What reading all cases of a dataset has shown.

    Attributes:
        cases: those in order, each with how its label map is read.
        measured: what was asked about each of them.
        looks: of each of them, to compare them.
        problems: of all cases, in their order.
    """

    cases: tuple[Case, ...]
    measured: list[T]
    looks: list[CaseLook]
    problems: list[Problem]


@dataclass(frozen=True, kw_only=True)
class _FoundLabels:
    """What is annotated in a case: values of its label map, or which of its structures share a voxel."""

    values: set[int] = field(default_factory=set)
    together: set[frozenset[str]] = field(default_factory=set)
    is_soft: bool = False


def discover_labels(dataset: Dataset, *, n_threads: int) -> LabelSpec:
    """The classes of a dataset whose layout does not list them: every value that occurs, named after itself.

    Raises:
        DatasetError: label maps that cannot be read, no foreground at all, or implausibly many values.
    """

    def look(case: Case) -> _FoundLabels | Problem:
        try:
            if case.label is None:
                read, _ = mend_to_read(case, combinations_of, (ROUNDED,) if dataset.fix else ())
                return _FoundLabels(together=read)
            label, _ = mend_to_read(case, read_label_map, (ROUNDED, HALVED) if dataset.fix else ())
            values = label_values(label)
            return _FoundLabels(values=values, is_soft=len(values) > MIN_SHADES and has_grey_borders(label))
        except FormatError as error:
            advice = "mend or replace the label map, or remove the case"
            return Problem(kind="label map cannot be used", case=case.id, text=str(error), advice=advice)

    answers = map_threads(
        look, dataset.cases, n_threads=n_threads, description="looking for labels", needed_gib=loading_gib
    )
    problems = [answer for answer in answers if isinstance(answer, Problem)]
    if problems:
        raise DatasetError.listing(f"{dataset.name}: some label maps cannot be used.", problems)
    found = [answer for answer in answers if isinstance(answer, _FoundLabels)]
    structures = list(dict.fromkeys(name for case in dataset.cases for name in case.masks))
    if structures:
        together: set[frozenset[str]] = set().union(*(known.together for known in found))
        return structure_labels(structures, sorted(together, key=sorted))
    values = sorted(set().union(*(known.values for known in found)) - {0})
    if not values:
        raise DatasetError(f"{dataset.name}: every voxel of every label map is 0, expected at least one structure")
    n_soft, n_hard = (sum(known.is_soft for known in found), sum(known.values - {0} == {WHITE} for known in found))
    if n_soft and 2 * (n_soft + n_hard) >= sum(bool(known.values - {0}) for known in found):
        if not dataset.fix:
            raise DatasetError(
                f"{dataset.name}: {n_soft} of {len(found)} label maps are masks in black and white with grey borders, "
                f"as smoothing, resizing or JPEG makes them: found {len(values)} values, expected one for each "
                "structure; --fix takes what is brighter than half for the structure, or save the masks as they were"
            )
        return LabelSpec.of_values([WHITE])
    if len(values) > MAX_LABELS_FOUND:
        raise DatasetError(
            f"{dataset.name}: found {len(values)} different values in the label maps, expected a few labels; "
            "are these intensity images?"
        )
    return LabelSpec.of_values(values)


def scan_dataset(dataset: Dataset, labels: LabelSpec, measure: Callable[[LoadedCase], T], *, n_threads: int) -> Scan[T]:
    """Reads every case once, checks it, and measures it while it is in memory.

    Args:
        dataset: the index.
        labels: its classes.
        measure: called with each case that is in order, from several threads.
        n_threads: cases in memory at a time; fewer where they are large.
    """

    def scan(case: Case) -> tuple[Case, T, CaseLook, tuple[Problem, ...]] | list[Problem]:
        loaded = load_case(case, n_channels=len(dataset.channels), labels=labels, fix=dataset.fix)
        if not isinstance(loaded, LoadedCase):
            return loaded
        look = look_at_case(loaded.case, loaded.image, loaded.label, loaded.values)
        return loaded.case, measure(loaded), look, loaded.remarks

    answers = map_threads(
        scan, dataset.cases, n_threads=n_threads, description="checking the cases", needed_gib=loading_gib
    )
    in_order = [answer for answer in answers if not isinstance(answer, list)]
    return Scan(
        cases=tuple(case for case, _, _, _ in in_order),
        measured=[measured for _, measured, _, _ in in_order],
        looks=[look for _, _, look, _ in in_order],
        problems=[problem for answer in answers for problem in (answer if isinstance(answer, list) else answer[3])],
    )


def refuse_errors(name: str, problems: Sequence[Problem], *, n_cases: int) -> None:
    """Nothing can be done with a dataset that has errors.

    Raises:
        DatasetError: one error that lists every error of every case.
    """
    errors = [problem for problem in problems if problem.severity == ERROR]
    if errors:
        n_bad = len({problem.case for problem in errors if problem.case})
        who = f"{n_bad} of {n_cases} cases cannot be used" if n_bad else "the dataset cannot be used"
        headline = f"{name}: {who}. Nothing was planned."
        raise DatasetError.listing(headline, errors)
