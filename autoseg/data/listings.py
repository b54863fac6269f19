"""Channels and labels as the files that describe datasets list them: of the Medical Segmentation Decathlon, of nnU-Net,
and our own manifests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoseg.core.errors import DatasetError, FormatError
from autoseg.core.labels import LabelSpec, Region
from autoseg.core.serialize import read_json

_EXAMPLES = {
    "labels": '"labels": {"background": 0, "liver": 1}',
    "channel_names": '"channel_names": {"0": "CT"}',
    "modality": '"modality": {"0": "CT"}',
}
MAX_DIGITS = 18
IGNORE = "ignore"
"""What the value of voxels that nobody has annotated is called in a list of labels."""


def index_file(path: Path) -> Path:
    """`dataset.json` in a folder, or the file itself."""
    return path / "dataset.json" if path.is_dir() else path


def read_index(path: Path) -> dict[str, Any] | None:
    """The content of `dataset.json` in a folder, or of the file itself; None where there is none."""
    file = index_file(path)
    if file.suffix.lower() != ".json" or not file.is_file():
        return None
    try:
        content = read_json(file)
    except FormatError as error:
        raise DatasetError(str(error)) from error
    if not isinstance(content, dict):
        raise DatasetError(f"{file}: found a {type(content).__name__}, expected an object with labels and channels")
    return content


def require(content: Mapping[str, Any], *keys: str, where: Path) -> Any:
    for key in keys:
        if key in content:
            return content[key]
    example = _EXAMPLES.get(keys[0])
    expected = f", expected for instance {example}" if example else ""
    raise DatasetError(f"{where}: the key '{keys[0]}' is missing{expected}")


def labels_of(content: Mapping[str, Any], *, where: Path) -> LabelSpec:
    entries = require(content, "labels", where=where)
    return parse_labels(entries, where=where, written=content.get("regions_class_order"))


def parse_channels(names: Any, *, where: Path) -> tuple[str, ...]:
    """Channel names from {"0": "T1", "1": "T2"} or ["T1", "T2"]."""
    if isinstance(names, (Mapping, list)) and not names:
        raise DatasetError(f"{where}: found no channel, expected at least one, for instance {{'0': 'CT'}}")
    if isinstance(names, Mapping) and all(is_whole(key) for key in names):
        return tuple(str(names[key]) for key in sorted(names, key=int))
    if isinstance(names, list):
        return tuple(str(name) for name in names)
    raise DatasetError(f"{where}: found the channels {names!r}, expected {{'0': 'T1', '1': 'T2'}} or ['T1', 'T2']")


def parse_labels(entries: Any, *, where: Path, written: Any = None) -> LabelSpec:
    """The classes from a "labels" object, written value to name (MSD) or name to value (nnU-Net).

    Where a name has several values, all names are regions, in the order of the object.

    Args:
        entries: the object.
        where: the file, for messages.
        written: nnU-Net's "regions_class_order": the value that each region is written as, in their order; None to take
            the one of its values that the fewest other regions have.

    Raises:
        DatasetError: names and values that cannot be told apart, no foreground, or regions that do not fit together.
    """
    if not isinstance(entries, Mapping):
        raise DatasetError(
            f"{where}: found the labels {entries!r}, expected for instance {{'background': 0, 'liver': 1}}"
        )
    pairs = [_parse_entry(key, item, where=where) for key, item in entries.items()]
    ignored = [values for name, values in pairs if name.lower() == IGNORE and values != (0,)]
    foreground = [(name, values) for name, values in pairs if name.lower() != IGNORE and values != (0,)]
    if any(len(values) != 1 for values in ignored) or len(ignored) > 1:
        raise DatasetError(f"{where}: found several values to ignore, expected one whole number for '{IGNORE}'")
    if not foreground:
        raise DatasetError(f"{where}: found no label besides the background, expected at least one")
    ignore = ignored[0][0] if ignored else None
    try:
        if any(len(values) > 1 for _, values in foreground):
            return _region_labels(foreground, written=written, ignore=ignore)
        known = sorted((values[0], name) for name, values in foreground)
        return LabelSpec(
            names=tuple(name for _, name in known), values=tuple(value for value, _ in known), ignore=ignore
        )
    except DatasetError as error:
        raise DatasetError(f"{where}: {error}") from error


def _parse_entry(key: Any, item: Any, *, where: Path) -> tuple[str, tuple[int, ...]]:
    """A name and its values."""
    if isinstance(item, (list, tuple)) and item and all(is_whole(value) for value in item):
        return str(key), tuple(dict.fromkeys(int(value) for value in item))
    if is_whole(item):
        return str(key), (int(item),)
    if is_whole(key) and isinstance(item, str):
        return item, (int(key),)
    raise DatasetError(
        f"{where}: found the label '{key}': {item!r}, expected a name and a whole number, or several for a region"
    )


def _region_labels(entries: Sequence[tuple[str, tuple[int, ...]]], *, written: Any, ignore: int | None) -> LabelSpec:
    """Classes of every value that any region has, and the regions."""
    values = tuple(sorted({value for _, of_region in entries for value in of_region} - {0}))
    if written is None:
        n_regions = {value: sum(value in of_region for _, of_region in entries) for value in values}
        order = [min(of_region, key=lambda value: (n_regions.get(value, 0), value)) for _, of_region in entries]
    else:
        if not isinstance(written, list) or not all(is_whole(value) for value in written):
            raise DatasetError(f"found the regions_class_order {written!r}, expected a list of whole numbers")
        order = [int(value) for value in written if int(value) != 0]
        if len(order) != len(entries):
            raise DatasetError(
                f"found the regions_class_order {written}, expected one value for each of the regions "
                f"{', '.join(name for name, _ in entries)}"
            )
    alone = {of_region[0]: name for name, of_region in entries if len(of_region) == 1}
    return LabelSpec(
        names=tuple(alone.get(value, f"label {value}") for value in values),
        values=values,
        regions=tuple(
            Region(name=name, values=of_region, written=value)
            for (name, of_region), value in zip(entries, order, strict=True)
        ),
        ignore=ignore,
    )


def structure_labels(names: Sequence[str], combinations: Sequence[frozenset[str]] = ()) -> LabelSpec:
    """The classes of structures that have a file each.

    Structure i has the value i + 1. Where structures overlap, each combination that occurs is a class of its own, with
    a value after those, and the structures are regions.

    Args:
        names: of the structures, in order.
        combinations: of two or more structures, that occur in some voxel.

    Raises:
        DatasetError: too many structures that overlap, or too many combinations.
    """
    values = tuple(range(1, len(names) + 1))
    if not combinations:
        return LabelSpec(names=tuple(names), values=values, one_file_each=True)
    of_value = [frozenset([name]) for name in names] + sorted(
        combinations, key=lambda known: (len(known), sorted(known))
    )
    return LabelSpec(
        names=tuple(" + ".join(name for name in names if name in known) for known in of_value),
        values=tuple(range(1, len(of_value) + 1)),
        regions=tuple(
            Region(
                name=name,
                values=tuple(value for value, known in enumerate(of_value, start=1) if name in known),
                written=value_alone,
            )
            for name, value_alone in zip(names, values, strict=True)
        ),
        one_file_each=True,
    )


def is_whole(item: Any) -> bool:
    """Whether it is a whole number, or the text of one, of no more than `MAX_DIGITS`."""
    if isinstance(item, str):
        return item.strip().isdecimal() and len(item.strip()) <= MAX_DIGITS
    return isinstance(item, int) and not isinstance(item, bool) and abs(item) < 10**MAX_DIGITS
