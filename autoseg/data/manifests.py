"""Manifests: a table (CSV) or a JSON file that lists the cases with their files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoseg.core.errors import DatasetError, Problem, list_some
from autoseg.data.dataset import Case, Dataset
from autoseg.data.files import bad_entry, read_csv
from autoseg.data.io import case_name
from autoseg.data.listings import index_file, labels_of, parse_channels, read_index, require

CASE_KEYS = frozenset({"id", "case", "group", "image", "images", "label", "annotated"})
"""What a manifest tells of a case besides attributes of its own."""


def open_csv_manifest(path: Path) -> Dataset | None:
    if not path.is_file() or path.suffix.lower() != ".csv":
        return None
    columns, rows = read_csv(path)
    image_columns = [column for column in columns if column == "image" or column.startswith("image_")]
    mask_columns = [column for column in columns if column.startswith("label_")]
    if not image_columns or ("label" in columns) == bool(mask_columns):
        expected = (
            "image (or image_<channel> for each channel) and label (or label_<structure> for each structure), "
            "optionally case, group and annotated"
        )
        advice = "; separate the columns with commas" if len(columns) == 1 and re.search("[;\t]", columns[0]) else ""
        raise DatasetError(f"{path}: found the columns {list_some(columns)}, expected {expected}{advice}")
    entries = [
        {
            "images": [row[column] or None for column in image_columns],
            "label": {column.removeprefix("label_"): row[column] for column in mask_columns if row[column]}
            if mask_columns
            else row["label"],
            "id": row.get("case"),
            "group": row.get("group"),
            "annotated": [name.strip() for name in row["annotated"].split(";") if name.strip()]
            if row.get("annotated")
            else None,
        }
        for row in rows
    ]
    known = {*image_columns, *mask_columns, "label", "case", "group", "annotated"}
    others = [column for column in columns if column not in known]
    attributes = [{column: _given(row[column]).strip() for column in others} for row in rows]
    return Dataset(
        name=path.stem,
        layout="CSV manifest",
        channels=tuple(column.removeprefix("image_") for column in image_columns),
        labels=None,
        cases=_manifest_cases(entries, attributes, n_channels=len(image_columns), where=path),
    )


def open_json_manifest(path: Path) -> Dataset | None:
    content = read_index(path)
    if content is None or "cases" not in content:
        return None
    where = index_file(path)
    if not isinstance(content["cases"], list):
        raise DatasetError(f"{where}: 'cases' is {content['cases']!r}, expected a list")
    channels = parse_channels(require(content, "channels", "channel_names", where=where), where=where)
    attributes = [_other_keys(entry) for entry in content["cases"]]
    cases = _manifest_cases(content["cases"], attributes, n_channels=len(channels), where=where)
    labels = labels_of(content, where=where) if "labels" in content else None
    if labels is not None and any(case.masks for case in cases):
        labels = replace(labels, one_file_each=True)
    return Dataset(
        name=str(content.get("name") or where.stem),
        layout="JSON manifest",
        channels=channels,
        labels=labels,
        cases=cases,
    )


def _other_keys(entry: Any) -> dict[str, str]:
    """What an entry of a JSON manifest tells of a case besides its files and names, as text."""
    fields = entry if isinstance(entry, Mapping) else {}
    others = fields.keys() - CASE_KEYS
    return {key: _given(fields[key]).strip() for key in sorted(others) if not isinstance(fields[key], (list, dict))}


def _manifest_cases(
    entries: Sequence[Any], attributes: Sequence[dict[str, str]], *, n_channels: int, where: Path
) -> tuple[Case, ...]:
    cases, problems = [], []
    for number, entry in enumerate(entries):
        fields = entry if isinstance(entry, Mapping) else {}
        images = fields.get("images", fields.get("image"))
        images = images if isinstance(images, list) else [images]
        label, annotated = fields.get("label"), fields.get("annotated")
        masks = label if isinstance(label, Mapping) else {}
        files = [file for file in (*images, *(masks.values() if masks else [label])) if file is not None]
        has_image = any(images)
        has_label = len(files) > sum(file is not None for file in images)
        if not (has_image and has_label) or not all(map(_is_text, files)):
            problems.append(bad_entry(f"case {number + 1}", entry))
            continue
        if len(images) not in (1, n_channels):
            # A channel that the case lacks has its place among those that it has.
            expected = f"one file with all channels, or {n_channels}, with null for a channel that the case lacks"
            problems.append(
                Problem(
                    kind="wrong number of images", case=f"case {number + 1}", found=str(len(images)), expected=expected
                )
            )
            continue
        if annotated is not None and not (isinstance(annotated, list) and all(map(_is_text, annotated))):
            found, expected = repr(annotated), "a list of names of structures"
            problems.append(
                Problem(kind="unreadable 'annotated'", case=f"case {number + 1}", found=found, expected=expected)
            )
            continue
        # Joining leaves absolute paths as they are and reads relative ones from the manifest's folder.
        paths = tuple(None if file is None else where.parent / file for file in images)
        first = next(file for file in paths if file is not None) if masks else where.parent / str(label)
        case = _given(fields.get("id")) or case_name(first)
        cases.append(
            Case(
                id=case,
                group=_given(fields.get("group")) or case,
                images=paths,
                label=None if masks else where.parent / str(label),
                masks={str(name): where.parent / str(file) for name, file in masks.items() if file is not None},
                annotated=None if annotated is None else tuple(annotated),
                attributes=attributes[number],
            )
        )
    if problems:
        raise DatasetError.listing(f"{where}: some entries cannot be read.", problems)
    return tuple(sorted(cases, key=lambda case: case.id))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _given(value: Any) -> str:
    """An optional entry as text, empty where there is none. The number 0 is a name like any other."""
    return "" if value is None else str(value)
