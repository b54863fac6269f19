"""Fingerprints from files, ours or nnU-Net's, so that a plan can be made where the images are not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoseg.core.errors import AutosegError, FormatError
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import from_plain, read_json
from autoseg.data.listings import labels_of, parse_channels
from autoseg.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint

FOREIGN_INTENSITIES = {
    "mean": "mean",
    "std": "std",
    "min": "minimum",
    "max": "maximum",
    "median": "median",
    "percentile_00_5": "percentile_00_5",
    "percentile_99_5": "percentile_99_5",
}
"""nnU-Net's name of each statistic, and ours."""


def read_fingerprint(fingerprint_file: Path, dataset_file: Path) -> tuple[Fingerprint, LabelSpec, str]:
    """Reads what a plan is made from.

    Args:
        fingerprint_file: `fingerprint.json` of a work folder, or nnU-Net's `dataset_fingerprint.json`.
        dataset_file: `dataset.json` of a work folder, of nnU-Net or of the Medical Segmentation Decathlon.

    Returns:
        The fingerprint, the labels, and the name of the dataset.

    Raises:
        AutosegError: a file is missing or lacks something.
    """
    description = _read_object(dataset_file)
    content = _read_object(fingerprint_file)
    name = str(description.get("name") or dataset_file.absolute().parent.name)
    if "labels" not in description:
        raise FormatError(f"{dataset_file}: the key 'labels' is missing")
    found = description["labels"]
    if isinstance(found, dict) and isinstance(found.get("names"), list):
        labels = from_plain(LabelSpec, found, where=f"{dataset_file}: labels")
    else:
        labels = labels_of(description, where=dataset_file)
    if "shapes_after_crop" not in content:
        fingerprint: Fingerprint = read_json(fingerprint_file, Fingerprint)
        return fingerprint, labels, name
    channels = next((description[key] for key in ("channel_names", "modality", "channels") if key in description), None)
    if channels is None:
        raise FormatError(f"{dataset_file}: the key 'channel_names' is missing")
    names = parse_channels(channels, where=dataset_file)
    return _from_nnunet(content, names, where=fingerprint_file), labels, name


def _read_object(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise FormatError(f"{file}: found a {type(content).__name__}, expected an object")
    return content


def _from_nnunet(content: Mapping[str, Any], channels: tuple[str, ...], *, where: Path) -> Fingerprint:
    """A fingerprint of nnU-Net's as one of ours. It lists neither names of cases nor volumes of labels."""
    try:
        spacings = from_plain(tuple[tuple[float, float, float], ...], content["spacings"], where="spacings")
        shapes = from_plain(tuple[tuple[int, int, int], ...], content["shapes_after_crop"], where="shapes_after_crop")
        intensities = from_plain(
            dict[str, dict[str, float]],
            content["foreground_intensity_properties_per_channel"],
            where="foreground_intensity_properties_per_channel",
        )
        fraction = from_plain(
            float, content["median_relative_size_after_cropping"], where="median_relative_size_after_cropping"
        )
    except KeyError as error:
        raise FormatError(f"{where}: the key {error} is missing") from error
    except AutosegError as error:
        raise FormatError(f"{where}: {error}") from error
    if len(spacings) != len(shapes):
        raise FormatError(f"{where}: found {len(spacings)} spacings and {len(shapes)} shapes, expected one per case")
    if set(intensities) != {str(index) for index in range(len(channels))}:
        raise FormatError(
            f"{where}: found intensities of the channels {', '.join(intensities)}, the dataset has {len(channels)} "
            f"channels ({', '.join(channels)})"
        )
    for index, statistics in intensities.items():
        if missing := FOREIGN_INTENSITIES.keys() - statistics.keys():
            raise FormatError(f"{where}: intensities of channel {index} lack {', '.join(sorted(missing))}")
    return Fingerprint(
        cases=tuple(
            CaseFingerprint(
                case=f"case {index + 1}",
                shape=shape,
                spacing_mm=spacing_mm,
                cropped_shape=shape,
                label_volumes_ml=(),
            )
            for index, (shape, spacing_mm) in enumerate(zip(shapes, spacings, strict=True))
        ),
        channels=tuple(
            ChannelFingerprint(
                name=name, **{ours: intensities[str(index)][theirs] for theirs, ours in FOREIGN_INTENSITIES.items()}
            )
            for index, name in enumerate(channels)
        ),
        median_cropped_fraction=fraction,
    )
