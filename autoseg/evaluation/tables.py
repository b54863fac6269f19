"""Scores as a CSV file, for spreadsheets and for statistics elsewhere."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

from autoseg.core.serialize import atomic_path
from autoseg.evaluation.scores import Evaluation, LabelScore

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def write_csv(path: Path, evaluation: Evaluation) -> None:
    """Writes one row per case and label, with every field of `LabelScore`, atomically.

    What is not defined is an empty cell, and the values of a region are apart by spaces. Names that a spreadsheet would
    run as a formula get an apostrophe before them.
    """
    fields = [field.name for field in dataclasses.fields(LabelScore)]
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", *fields])
        for case in evaluation.cases:
            for score in case.labels:
                writer.writerow([_to_cell(value) for value in (case.case, *(getattr(score, name) for name in fields))])


def _to_cell(value: str | int | float | tuple[int, ...]) -> str:
    if isinstance(value, str):
        return f"'{value}" if value.startswith(FORMULA_STARTS) else value
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if math.isnan(value) else repr(value)
