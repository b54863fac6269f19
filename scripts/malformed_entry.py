"""What the corpus of malformed datasets says of each of them, and the table that holds them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ERROR, WARNING, NOTE = "error", "warning", "note"
EXIT_CODES = {ERROR: 2, WARNING: 0, NOTE: 0, "": 0}

IMAGE, LABEL = "image cannot be used", "label map cannot be used"
LAYOUT, VALUE = "the files do not make a dataset", "label value that is not in the list of labels"
GRID = "image and label map differ in shape or affine"


@dataclass(frozen=True, kw_only=True)
class Malformed:
    """A dataset of the corpus.

    Attributes:
        name: of its folder.
        problem: what is wrong, in a sentence.
        dataset: what is checked, within its folder.
        exit_code: of `autoseg check`.
        severity: of the problem; empty where nothing is wrong.
        kind: of the problem; empty where any will do.
        words: that the output has to contain.
        mendable: whether `--fix` mends it, so that the exit code is 0.
        make: writes it into an empty folder.
    """

    name: str
    problem: str
    dataset: str = "dataset"
    exit_code: int
    severity: str
    kind: str
    words: tuple[str, ...]
    mendable: bool
    make: Callable[[Path], object] = field(repr=False, compare=False)


CORPUS: dict[str, Malformed] = {}


def add(
    make: Callable[[Path], object],
    *,
    name: str,
    problem: str,
    dataset: str,
    severity: str,
    kind: str,
    words: Sequence[str],
    mendable: bool,
) -> None:
    """Adds an entry to the corpus."""
    assert name not in CORPUS, name
    CORPUS[name] = Malformed(
        name=name,
        problem=problem,
        dataset=dataset,
        exit_code=EXIT_CODES[severity],
        severity=severity,
        kind=kind,
        words=tuple(words),
        mendable=mendable,
        make=make,
    )


def malformed(
    severity: str, kind: str = "", *words: str, dataset: str = "dataset", mendable: bool = False
) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    """Adds a function that makes a dataset to the corpus; its name is the entry's, its docstring says what is wrong."""

    def register(make: Callable[[Path], object]) -> Callable[[Path], object]:
        problem = " ".join((make.__doc__ or "").split())
        add(
            make,
            name=make.__name__,
            problem=problem,
            dataset=dataset,
            severity=severity,
            kind=kind,
            words=words,
            mendable=mendable,
        )
        return make

    return register
