"""Which image files belong to which case: names with and without a channel's four digits."""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from autoseg.core.errors import DatasetError, Problem, list_some
from autoseg.core.text import shorten
from autoseg.data.dataset import Case
from autoseg.data.io import case_name, file_ending, is_image, read_raw

logger = logging.getLogger(__name__)

MAX_CSV_BYTES = 256 * 2**20
MAX_SHOWN = 200
COLOUR_ENDINGS = (".png", ".bmp", ".tif", ".tiff")
"""Of pictures, as nnU-Net reads them."""

_MARK = "(?:masks?|seg|segmentation|labels?)"
# How the name of an image is made from that of its mask; those that come first win where several fit as well.
_IMAGE_NAMES = tuple(
    (re.compile(expression, re.IGNORECASE), replacement)
    for expression, replacements in (
        (rf"([_-]){_MARK}$", ("", r"\1image", r"\1img")),
        (rf"^{_MARK}([_-])", ("", r"image\1", r"img\1")),
    )
    for replacement in replacements
)
_CHANNEL_SUFFIX = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})", re.DOTALL)


def split_channel(file: Path) -> tuple[str, str] | None:
    """CASE_0001.nii.gz as ("CASE", "0001"); None for a name without a channel."""
    match = _CHANNEL_SUFFIX.fullmatch(case_name(file))
    return (match["case"], match["channel"]) if match else None


def list_images(folder: Path) -> list[Path]:
    """The images in a folder, sorted: files, and folders with DICOM files in them; hidden ones are no images."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and is_image(path))


def list_case_files(folder: Path) -> list[Path]:
    """The images in folders of cases, CASE/CASE_1.tif or CASE/CASE-t1.nii.gz, up to two levels below a folder."""
    inner = list_case_folders(folder)
    prefixes = {case: (f"{case.name}_".lower(), f"{case.name}-".lower()) for case in inner}
    return [file for case in inner for file in list_images(case) if case_name(file).lower().startswith(prefixes[case])]


def list_case_folders(folder: Path) -> list[Path]:
    """The folders up to two levels below a folder, those of the first level before the others."""
    inner = list_folders(folder)
    return inner + [deeper for one in inner for deeper in list_folders(one)]


def list_folders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones and those that may not be opened."""
    with os.scandir(folder) as entries:
        found = sorted(Path(entry.path) for entry in entries if _is_below(entry) and not entry.name.startswith("."))
    opened = [inner for inner in found if os.access(inner, os.R_OK | os.X_OK)]
    if len(opened) < len(found):
        closed = [inner.name for inner in found if inner not in opened]
        logger.warning("%s: may not be opened, and left out: %s", folder, list_some(closed))
    return opened


def _is_below(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, and no link that leads to itself or back to a folder that it is in."""
    try:
        if not entry.is_dir():
            return False
        above = os.path.realpath(os.path.dirname(entry.path))
        return not entry.is_symlink() or not Path(above).is_relative_to(os.path.realpath(entry.path))
    except OSError:
        return False


def channel_names(file: Path) -> tuple[str, ...]:
    """Names of the channels that a file has by its header: of three, the colours.

    Raises:
        FormatError: the file cannot be read. One that is missing is told later, with all others that are.
    """
    n_channels = read_raw(file).n_channels if file.exists() else 1
    if n_channels == 3:
        return ("red", "green", "blue")
    return ("image",) if n_channels == 1 else tuple(f"image {channel}" for channel in range(n_channels))


def group_channels(files: Sequence[Path], *, folder: Path) -> dict[str, list[Path]]:
    """CASE_0000, CASE_0001, ... by case, in order of the channel."""
    cases: dict[str, list[Path]] = {}
    problems = []
    for file in sorted(files):
        parts = split_channel(file)
        if parts is None:
            expected = "a name such as CASE_0000.nii.gz with the channel's four digits"
            advice = "rename the image, or move what is none elsewhere"
            problems.append(
                Problem(kind="image name without a channel", file=str(file), expected=expected, advice=advice)
            )
            continue
        cases.setdefault(parts[0], []).append(file)
    if problems:
        raise DatasetError.listing(f"{folder}: images whose channel is not known.", problems)
    return cases


def group_named_channels(files: Sequence[Path], channels: Sequence[str]) -> dict[str, dict[int, list[Path]]]:
    """CASE_<name> or CASE-<name> by case and channel, in upper or lower case; files with other names are left out.

    Names that are numbers do not count: CASE_1 is a case more often than a channel.
    """
    names = [re.escape(name) if not name.isdecimal() else "(?!)" for name in channels]
    expressions = [re.compile(rf"(.+)[_-]{name}", re.IGNORECASE) for name in names]
    cases: dict[str, dict[int, list[Path]]] = {}
    for file in sorted(files):
        matches = [(channel, expression.fullmatch(case_name(file))) for channel, expression in enumerate(expressions)]
        # Of T2 and acq-axial_T2, the longer one.
        fitting = [(match[1], channel) for channel, match in matches if match]
        if fitting:
            case, channel = min(fitting, key=lambda one: len(one[0]))
            cases.setdefault(case, {}).setdefault(channel, []).append(file)
    return cases


def read_csv(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns of a CSV file with a header, and its rows.

    Raises:
        DatasetError: there is no such file, or it cannot be read.
    """
    try:
        size = file.stat().st_size
        if size > MAX_CSV_BYTES:
            raise DatasetError(f"{file}: has {size} bytes, expected a table of at most {MAX_CSV_BYTES}")
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
            return list(reader.fieldnames or []), rows
    except FileNotFoundError as error:
        raise DatasetError(f"{file}: no such file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{file}: cannot be read as a CSV file in UTF-8 ({error})") from error


def by_name(files: Sequence[Path]) -> dict[str, Path]:
    """Files by case; a case that is there with two endings is an error, not a choice."""
    named = {case_name(file): file for file in files}
    problems = [
        Problem(
            kind="two files of one case",
            case=case_name(file),
            file=str(file),
            found=f"{_seen_from(file, named[case_name(file)])} beside it",
            advice="remove one of them",
        )
        for file in files
        if named[case_name(file)] != file
    ]
    if problems:
        folder = os.path.commonpath([file.parent for file in files])
        raise DatasetError.listing(f"{folder}: files with the same name.", problems)
    return named


def _seen_from(file: Path, other: Path) -> str:
    return other.name if other.parent == file.parent else str(other)


def name_after_images(labels: Mapping[str, Path], images: Collection[str]) -> dict[str, Path]:
    """Label maps by the name of their image: their own, or what is left of it without "_mask" or "mask_" and the like.

    All of them follow one rule, the one that most images fit.

    Args:
        labels: by their own names.
        images: names of images.
    """
    named = [dict(labels)]
    for expression, replacement in _IMAGE_NAMES:
        renamed = {expression.sub(replacement, name): file for name, file in labels.items()}
        if len(renamed) == len(labels):
            named.append(renamed)
    return max(named, key=lambda names: len(names.keys() & set(images)))


def is_called_mask(file: Path) -> bool:
    """Whether the name says that it is a mask: CASE_seg, CASE-mask, mask_CASE."""
    return any(expression.search(case_name(file)) for expression, _ in _IMAGE_NAMES)


def masks_among(files: Collection[Path]) -> list[Path]:
    """Files that are called as masks of others in the same folder: CASE_mask.tif beside CASE.tif or CASE_0000.tif."""
    known = {(file.parent, case_name(file)) for file in files}
    known |= {(file.parent, parts[0]) for file in files if (parts := split_channel(file))}

    def is_mask(file: Path) -> bool:
        name = case_name(file)
        images = {expression.sub(replacement, name) for expression, replacement in _IMAGE_NAMES} - {name}
        return any((file.parent, image) in known for image in images)

    return [file for file in files if is_mask(file)]


def is_colour_picture(files: Sequence[Path], *, n_channels: int) -> bool:
    """Whether CASE_0000 has red, green and blue in it: nnU-Net's one exception from a file for each channel."""
    return n_channels == 3 and len(files) == 1 and file_ending(files[0]) in COLOUR_ENDINGS


def place_channels(files: Sequence[Path], *, n_channels: int) -> list[Path | None]:
    """Files of a case CASE_0000, CASE_0001, ... by their channel; None where there is none. One file may have all."""
    if is_colour_picture(files, n_channels=n_channels):
        return list(files)
    by_channel = {case_name(file)[-4:]: file for file in files}
    return [by_channel.get(f"{channel:04d}") for channel in range(n_channels)]


def channel_problems(
    case: str, files: Sequence[Path], *, n_channels: int, optional: Collection[int] = ()
) -> list[Problem]:
    """What is wrong with the channel files of a case, if they are not exactly 0000, 0001, ... of `n_channels`.

    Args:
        case: its name.
        files: of the case.
        n_channels: that it should have.
        optional: channels that it may lack, but not all that there are.
    """
    wanted = [f"{channel:04d}" for channel in range(n_channels)]
    found = {case_name(file)[-4:] for file in files}
    missing = {channel for channel, name in enumerate(wanted) if name not in found}
    if found <= set(wanted) and missing <= set(optional) and len(files) == len(found):
        return []
    if found == {wanted[0]} and is_colour_picture(files, n_channels=n_channels):
        return []
    return [
        Problem(
            kind="wrong number of channels",
            case=case,
            found=", ".join(file.name for file in files),
            expected=f"one file per channel: {', '.join(f'{case}_{channel}' for channel in wanted)}",
            advice="add the missing channel, remove what is too much, or correct the list of channels",
        )
    ]


def match_labels(
    images: Mapping[str, Sequence[Path]], labels: Mapping[str, Path], *, n_channels: int, where: Path
) -> list[Case]:
    """Cases that have images and a label map; all that do not fit together are listed in one error.

    Where an image's name is not the case's own, its last four digits are the channel.
    """
    problems = []
    for case, files in images.items():
        if case not in labels:
            advice = "add the label map, or move images to segment elsewhere (imagesTs)"
            problems.append(Problem(kind="image without label map", case=case, file=str(files[0]), advice=advice))
        elif case_name(files[0]) != case:
            problems += channel_problems(case, files, n_channels=n_channels)
    for case, label in labels.items():
        if case not in images:
            advice = "add the image, or remove the label map"
            problems.append(Problem(kind="label map without image", case=case, file=str(label), advice=advice))
    if problems:
        raise DatasetError.listing(f"{where}: images and label maps do not match.", problems)
    return [Case(id=case, group=case, images=tuple(images[case]), label=labels[case]) for case in sorted(images)]


def bad_entry(place: str, entry: Any) -> Problem:
    expected = "the paths of an image and a label map"
    found, advice = shorten(repr(entry), MAX_SHOWN), "complete the entry, or remove it"
    return Problem(kind="entry without image or label map", case=place, found=found, expected=expected, advice=advice)
