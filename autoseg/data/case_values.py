"""What sorts cases: a column of their manifest, a table beside it, or a part of their names."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from autoseg.core.errors import DatasetError, Problem, list_some
from autoseg.data.dataset import Case
from autoseg.data.files import read_csv

logger = logging.getLogger(__name__)

COLUMN = "column:"
MAX_DISTINCT_NUMBERS = 8
"""Numbers with more distinct values than this are cut into bins."""

N_BINS = 4
"""Between quantiles, so that as many cases are in each."""


def read_groups(cases: Sequence[Case], by: str) -> dict[str, str]:
    r"""The group of every case.

    Args:
        cases: of the dataset.
        by: "column:NAME" of the manifest, a CSV file with the columns case and group, or a regular expression with one
            group, such as "(.+)_slice\d+", that is searched for in the case ids.

    Returns:
        Groups by case id.

    Raises:
        DatasetError: the expression or the table cannot be read, or cases have no group, all of them listed.
    """
    if by.startswith(COLUMN) or _is_table(by):
        found = _look_up(cases, by, column="group")
    else:
        expression = _compile(by)
        matches = {case.id: expression.search(case.id) for case in cases}
        found = {case: (match[1] or "").strip() if match else "" for case, match in matches.items()}
    advice = "complete the column or the table, or widen the expression: every case needs a group"
    _refuse_missing(found, f"--groups {by}: the groups are not complete.", kind="case without a group", advice=advice)
    return found


def read_strata(cases: Sequence[Case], by: str) -> dict[str, str]:
    """The value of every case that folds are to have equally often.

    Numbers with more than `MAX_DISTINCT_NUMBERS` distinct values are cut into `N_BINS` bins at their quantiles.

    Args:
        cases: of the dataset.
        by: a column of the manifest, or a CSV file with the columns case and value.

    Returns:
        Values by case id.

    Raises:
        DatasetError: the table cannot be read, or cases have no value, all of them listed.
    """
    found = _look_up(cases, by, column="value")
    advice = "complete the column or the table; 'unknown' is a value too"
    _refuse_missing(found, f"--stratify {by}: the values are not complete.", kind="case without a value", advice=advice)
    numbers = {case: number for case, value in found.items() if (number := _as_number(value)) is not None}
    if len(numbers) < len(found) or len(set(numbers.values())) <= MAX_DISTINCT_NUMBERS:
        return found
    edges = np.unique(np.quantile(list(numbers.values()), np.linspace(0, 1, N_BINS + 1)[1:-1]))
    logger.info(
        "--stratify %s: %d distinct numbers, cut into bins at the quantiles %s",
        by,
        len(set(numbers.values())),
        ", ".join(f"{edge:g}" for edge in edges),
    )
    return {case: f"bin {np.searchsorted(edges, number) + 1}" for case, number in numbers.items()}


def describe_source(by: str) -> str:
    """Where groups or values come from, without the folder of a file."""
    return Path(by).name if _is_table(by) else f"'{by}'"


def read_rows(file: Path, *columns: str) -> list[dict[str, str]]:
    """Some columns of a CSV file with a header.

    Raises:
        DatasetError: the file cannot be read, or a column is missing.
    """
    found, rows = read_csv(file)
    if not set(columns) <= set(found):
        raise DatasetError(f"{file}: found the columns {', '.join(found)}, expected {' and '.join(columns)}")
    return [{column: (row[column] or "").strip() for column in columns} for row in rows]


def _is_table(by: str) -> bool:
    return Path(by).suffix.lower() == ".csv"


def _look_up(cases: Sequence[Case], by: str, *, column: str) -> dict[str, str]:
    """From a table with the columns case and `column`, or from a column of the manifest; empty where there is none."""
    if _is_table(by):
        table = _read_table(Path(by), column)
        return {case.id: table.get(case.id, "") for case in cases}
    name = by.removeprefix(COLUMN)
    known = sorted({key for case in cases for key in case.attributes})
    if name not in known:
        raise DatasetError(
            f"found no column '{name}' in the dataset, expected "
            + (f"one of {list_some(known, most=20)}" if known else "a CSV or JSON manifest that has it")
            + f"; or give a CSV file with the columns case and {column}"
        )
    return {case.id: case.attributes.get(name, "") for case in cases}


def _read_table(file: Path, column: str) -> dict[str, str]:
    values: dict[str, str] = {}
    problems = []
    for row in read_rows(file, "case", column):
        known = values.setdefault(row["case"], row[column])
        if known != row[column]:
            found = f"'{known}' and '{row[column]}'"
            kind, advice = f"case with more than one {column}", "keep one of the rows"
            problems.append(Problem(kind=kind, case=row["case"], found=found, advice=advice))
    if problems:
        raise DatasetError.listing(f"{file}: some cases are listed twice.", problems)
    return values


def _compile(by: str) -> re.Pattern[str]:
    advice = rf"expected one group such as (.+)_slice\d+, {COLUMN}NAME, or a CSV file"
    try:
        expression = re.compile(by)
    except re.error as error:
        raise DatasetError(f"--groups: found '{by}', which is no regular expression ({error}); {advice}") from error
    if expression.groups != 1:
        raise DatasetError(f"--groups: found '{by}' with {expression.groups} groups in parentheses, {advice}")
    return expression


def _refuse_missing(found: Mapping[str, str], headline: str, *, kind: str, advice: str) -> None:
    problems = [Problem(kind=kind, case=case, advice=advice) for case, value in found.items() if not value]
    if problems:
        raise DatasetError.listing(headline, problems)


def _as_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
