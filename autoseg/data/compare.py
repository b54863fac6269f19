"""What stands out when the cases of a dataset are seen side by side."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import WARNING, FormatError, Problem, list_some
from autoseg.core.geometry import join_numbers
from autoseg.core.labels import LabelSpec
from autoseg.core.runtime import map_threads
from autoseg.data.dataset import Case
from autoseg.data.files import list_images
from autoseg.data.io import read_raw

TEST_FOLDERS = ("imagesTs", "imagesTest", "test/images", "test_images")
"""Where images to test on are kept beside those to train on."""

QUANTILES = (0.05, 0.5, 0.95)
MAX_SAMPLED = 100_000
MIN_CASES_TO_COMPARE = 4
MAX_SPREAD_RATIO = 5.0
MAX_SHIFT = 0.3
MAX_DEVIATIONS = 8.0
MAX_ODD_FRACTION = 0.1


@dataclass(frozen=True, kw_only=True)
class CaseLook:
    """What is kept of a case to compare it with others.

    Attributes:
        case: as it was read.
        shape: canonical (Z, Y, X).
        digests: of the voxels of each channel; empty for one without any contrast.
        label_digest: of the label map.
        quantiles: (C, 3) intensities at `QUANTILES`, without the darkest value; NaN for a channel without contrast.
        values: that occur in the label map.
    """

    case: Case
    shape: tuple[int, int, int]
    digests: tuple[str, ...]
    label_digest: str
    quantiles: NDArray[np.float64]
    values: frozenset[int]


def look_at_case(case: Case, image: NDArray[np.float32], label: NDArray, values: frozenset[int]) -> CaseLook:
    """Summarises a case.

    Args:
        case: as it was read.
        image: (C, Z, Y, X) float32.
        label: (Z, Y, X), integers.
        values: that occur in it.
    """
    z, y, x = label.shape
    return CaseLook(
        case=case,
        shape=(z, y, x),
        digests=tuple(_digest(channel) for channel in image),
        label_digest=_digest(label.astype(np.int32)),
        quantiles=np.stack([_quantiles(channel) for channel in image]),
        values=values,
    )


def _digest(volume: NDArray) -> str:
    """Of shape and voxels; empty where all voxels are equal."""
    if volume.min() == volume.max():
        return ""
    hashed = hashlib.blake2b(str(volume.shape).encode(), digest_size=16)
    hashed.update(np.ascontiguousarray(volume).data)
    return hashed.hexdigest()


def _quantiles(channel: NDArray[np.float32]) -> NDArray[np.float64]:
    flat = channel.ravel()
    sampled = flat[:: max(1, flat.size // MAX_SAMPLED)]
    # The darkest value is what scanners and programs fill the space around the body with.
    inside = sampled[sampled > sampled.min()]
    return np.quantile(inside, QUANTILES) if inside.size else np.full(len(QUANTILES), np.nan)


def compare_cases(looks: Sequence[CaseLook], *, channels: Sequence[str], labels: LabelSpec) -> list[Problem]:
    """Warnings about cases that are not like the others, or too much like one.

    Args:
        looks: of all cases that are in order.
        channels: names of the dataset.
        labels: of the dataset.
    """
    return [
        *_find_duplicates(looks),
        *_find_flat(looks),
        *_find_other_units(looks, channels),
        *_find_unused(looks, labels),
        *_find_alike_names([look.case for look in looks]),
    ]


def _find_duplicates(looks: Sequence[CaseLook]) -> list[Problem]:
    first: dict[str, CaseLook] = {}
    problems = []
    for look in looks:
        known = next((first[digest] for digest in look.digests if digest in first), None)
        for digest in look.digests:
            if digest:
                first.setdefault(digest, look)
        if known is None:
            continue
        labelled = "equal" if known.label_digest == look.label_digest else "different"
        problems.append(
            Problem(
                kind="the same image under two names",
                case=look.case.id,
                file=_file_of(look.case),
                found=f"the voxels of case {known.case.id}, with {labelled} label maps",
                expected="another image",
                advice="remove one of them, or give both one group (--groups): no network must be scored on an "
                "image that it has seen",
                severity=WARNING,
            )
        )
    return problems


def _find_flat(looks: Sequence[CaseLook]) -> list[Problem]:
    """Single slices among volumes."""
    n_flat = sum(1 in look.shape for look in looks)
    if 2 * n_flat >= len(looks):
        return []
    usual = join_numbers(np.median([look.shape for look in looks], axis=0).round())
    return [
        Problem(
            kind="a single slice among volumes",
            case=look.case.id,
            file=_file_of(look.case),
            found=f"{join_numbers(look.shape)} voxels (z, y, x)",
            expected=f"a volume, as most cases are (median {usual})",
            advice="replace it by the whole scan, or remove the case",
            severity=WARNING,
        )
        for look in looks
        if 1 in look.shape
    ]


def _find_other_units(looks: Sequence[CaseLook], channels: Sequence[str]) -> list[Problem]:
    """Images whose intensities are spread over another range than those of most."""
    if len(looks) < MIN_CASES_TO_COMPARE:
        return []
    problems = []
    for channel, name in enumerate(channels):
        quantiles = np.array([look.quantiles[channel] for look in looks])
        with_contrast = np.isfinite(quantiles).all(axis=1)
        if np.count_nonzero(with_contrast) < MIN_CASES_TO_COMPARE:
            continue
        usual = np.median(quantiles[with_contrast], axis=0)
        odd = _is_far(quantiles, with_contrast)
        # Where many differ, no unit is the usual one: MR of several scanners, for instance.
        if np.count_nonzero(odd) > max(1, MAX_ODD_FRACTION * len(looks)):
            continue
        for look, own, is_odd in zip(looks, quantiles, odd, strict=True):
            if is_odd:
                problems.append(
                    Problem(
                        kind="intensities in another unit",
                        case=look.case.id,
                        file=_file_of(look.case, channel),
                        found=f"{name} from {own[0]:.4g} over {own[1]:.4g} to {own[2]:.4g} (5, 50 and 95 %)",
                        expected=f"about the median of all, {usual[0]:.4g} over {usual[1]:.4g} to {usual[2]:.4g}",
                        advice="see whether it was scaled or shifted when it was converted, and convert it again",
                        severity=WARNING,
                    )
                )
    return problems


def _is_far(quantiles: NDArray[np.float64], known: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Rows whose range is far wider, far narrower, or moved as a whole, by more than the others differ anyhow.

    Args:
        quantiles: (cases, 3).
        known: rows to compare; the others are not far.
    """
    low, _, high = quantiles.T
    spread = np.log(np.maximum(high - low, 1e-12 * np.maximum(1, np.abs(high))))
    distance = np.abs(spread - np.median(spread[known]))
    allowed = max(np.log(MAX_SPREAD_RATIO), MAX_DEVIATIONS * float(np.median(distance[known])))
    usual = np.median(quantiles[known], axis=0)
    moved = quantiles - usual
    # Nothing but a shift moves all quantiles the same way and about as far.
    shift = np.where((moved > 0).all(axis=1) | (moved < 0).all(axis=1), np.abs(moved).min(axis=1), 0)
    distances = np.abs(quantiles[known] - usual).max(axis=1)
    most = max(MAX_SHIFT * float(usual[2] - usual[0]), MAX_DEVIATIONS * float(np.median(distances)))
    return known & ((distance > allowed) | (shift > most))


def _find_unused(looks: Sequence[CaseLook], labels: LabelSpec) -> list[Problem]:
    if not looks:
        return []
    present = frozenset().union(*(look.values for look in looks))
    return [
        Problem(
            kind="label that no case has",
            found=f"no voxel of '{name}' ({list_some([str(value) for value in values])}) in any of {len(looks)} cases",
            expected="each label in some cases",
            advice="remove it from the labels of the dataset, or correct the label maps; nothing can be learned of it",
            severity=WARNING,
        )
        for name, values in labels.structure_values.items()
        if not present & set(values)
    ]


def _find_alike_names(cases: Sequence[Case]) -> list[Problem]:
    """Names that are one and the same on some file systems."""
    plain = {case.id: unicodedata.normalize("NFC", case.id).casefold() for case in cases}
    n_named = Counter(plain.values())
    return [
        Problem(
            kind="names that some file systems cannot tell apart",
            case=name,
            file=_file_of(case),
            found=f"{n_named[plain[name]]} cases whose names differ in case, or in how accents are stored",
            advice="rename them, or their results may overwrite one another on another machine",
            severity=WARNING,
        )
        for case in cases
        for name in (case.id,)
        if n_named[plain[name]] > 1
    ]


def find_test_folder(folder: Path) -> Path | None:
    """Where the images to test on are, in a dataset that has some."""
    return next((folder / name for name in TEST_FOLDERS if (folder / name).is_dir()), None)


def find_leaks(looks: Sequence[CaseLook], test_folder: Path, *, n_threads: int) -> list[Problem]:
    """Images to test on that are among those to train on as well.

    Only those of a shape that occurs among the cases are read.

    Args:
        looks: of the cases to train on.
        test_folder: with images.
        n_threads: to read with.
    """
    shapes = {look.shape for look in looks}
    known = {digest: look.case for look in looks for digest in look.digests if digest}

    def check(file: Path) -> Problem | None:
        try:
            raw = read_raw(file)
            if raw.geometry.shape not in shapes:
                return None
            case = next((known[digest] for digest in map(_digest, raw.load_float()) if digest in known), None)
        except FormatError as error:
            advice = "mend, replace or remove it"
            return Problem(kind="image to test on cannot be used", text=str(error), advice=advice, severity=WARNING)
        if case is None:
            return None
        return Problem(
            kind="image both to train on and to test on",
            case=case.id,
            file=str(file),
            found=f"the voxels of case {case.id}",
            expected="an image that is not among the cases to train on",
            advice="remove it from one of them: what a network scores on images that it has seen says nothing",
            severity=WARNING,
        )

    found = map_threads(check, list_images(test_folder), n_threads=n_threads, description="checking images to test on")
    return [problem for problem in found if problem]


def _file_of(case: Case, channel: int = 0) -> str:
    """The image of a channel; of one file with several channels, that file."""
    file = case.images[channel] if channel < len(case.images) else case.images[0]
    return str(file or case.image_files[0])
