"""BIDS: a folder for each subject, and label maps in a folder of `derivatives`.

A label map is called as its image with something after it, sub-01_T1w_lesion-manual, or as BIDS has it without the
image, sub-01_label-lesion_mask.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.core.errors import DatasetError, Problem, list_some
from autoseg.core.geometry import grid_difference
from autoseg.data.dataset import Case, Dataset
from autoseg.data.files import by_name, list_folders, list_images
from autoseg.data.io import file_ending, read_geometry
from autoseg.data.listings import read_index

logger = logging.getLogger(__name__)

_DESCRIPTION = "dataset_description.json"
_SESSION = re.compile(r"(?P<session>sub-[^_]+(?:_ses-[^_]+)?)_(?P<rest>.+)")
_LABEL_SUFFIX = re.compile(r"d?seg|mask|msk|roi|lesions?|(?!labels-).+-manual")
_IN_MANIFEST = "or list the files in a manifest"

Images = Mapping[str, Mapping[str, Path]]
"""By session, and in a session by what follows its name: "T1w", "acq-axial_T2w"."""


@dataclass(frozen=True, kw_only=True)
class _Label:
    """A label map, or the mask of one structure.

    Attributes:
        file: of the label map.
        session: "sub-01_ses-02", or "sub-01" where there are no sessions.
        image: what it was drawn on, such as "T1w"; None where its name does not say.
        structure: that it shows, such as "lesion", or else its suffix, such as "dseg".
    """

    file: Path
    session: str
    image: str | None
    structure: str

    def fits(self, images: Images) -> bool:
        """Whether its session has images, and the one that it was drawn on."""
        return self.session in images and (self.image is None or self.image in images[self.session])


def open_bids(path: Path) -> Dataset | None:
    if not path.is_dir():
        return None
    subjects = _list_subjects(path)
    description = read_index(path / _DESCRIPTION) or {}
    if not subjects and not description:
        return None
    images = _list_raw(path, subjects)
    folder, labels = _choose_derivative(path, images)
    _refuse_unmatched(labels, images, where=folder)
    structures = _choose_structures(labels, where=folder)
    drawn_on = _choose_image(labels, where=folder)
    by_session: dict[str, dict[str, Path]] = {}
    for label in labels:
        by_session.setdefault(label.session, {})[label.structure] = label.file
    _tell_incomplete(by_session, images, structures, where=path)
    channels = _choose_channels(images, by_session, drawn_on, where=path)
    cases = []
    for session, files in sorted(by_session.items()):
        masks = {structure: files[structure] for structure in structures if structure in files}
        cases.append(
            Case(
                id=session,
                group=session.partition("_")[0],
                images=tuple(images[session][channel] for channel in channels),
                label=masks[structures[0]] if len(structures) == 1 else None,
                masks=masks if len(structures) > 1 else {},
            )
        )
    name = str(description.get("Name") or path.name)
    return Dataset(name=name, layout="BIDS", channels=channels, labels=None, cases=tuple(cases))


def _list_raw(path: Path, subjects: Sequence[Path]) -> Images:
    """The images in sub-*/anat and sub-*/ses-*/anat."""
    images: dict[str, dict[str, Path]] = {}
    for session, rest, file in _list_sessions(subjects):
        images.setdefault(session, {})[rest] = file
    if not images:
        raise DatasetError(
            f"{path}: found {len(subjects)} folders sub-* without an image, expected sub-01/anat/sub-01_T1w.nii.gz or "
            "sub-01/ses-01/anat/sub-01_ses-01_T1w.nii.gz; name the dataset's own folder, not one of its derivatives"
        )
    return images


def list_bids_images(path: Path) -> list[Path]:
    """The images in the folders sub-*/anat and sub-*/ses-*/anat of a dataset; empty where there are none."""
    return [file for _, _, file in _list_sessions(_list_subjects(path))]


def _list_subjects(path: Path) -> list[Path]:
    return [folder for folder in list_folders(path) if folder.name.startswith("sub-")]


def _list_sessions(subjects: Sequence[Path]) -> list[tuple[str, str, Path]]:
    """Images without label maps: the session, what follows it in the name, and the file."""
    folders = [
        inner / "anat"
        for subject in subjects
        for inner in (subject, *(inner for inner in list_folders(subject) if inner.name.startswith("ses-")))
    ]
    files = [file for folder in folders if folder.is_dir() for file in list_images(folder)]
    found = []
    for name, file in by_name(files).items() if files else ():
        match = _SESSION.fullmatch(name)
        suffix = name.rpartition("_")[2]
        if match and suffix != "defacemask" and not _LABEL_SUFFIX.fullmatch(suffix):
            found.append((match["session"], match["rest"], file))
    return found


def _choose_derivative(path: Path, images: Images) -> tuple[Path, list[_Label]]:
    """The one folder of derivatives with label maps of the images. Those named after their image come first."""
    root = path / "derivatives"
    folders = list_folders(root) if root.is_dir() else []
    found = {folder: _list_labels(folder) for folder in folders}
    fitting = {folder: [label for label in labels if label.fits(images)] for folder, labels in found.items()}
    named = [folder for folder, labels in fitting.items() if any(label.image for label in labels)]
    chosen = named or [folder for folder, labels in fitting.items() if labels]
    if len(chosen) > 1:
        listed = "; ".join(f"{folder.name} has {fitting[folder][0].file.name}" for folder in chosen)
        raise DatasetError(
            f"{root}: found label maps in {len(chosen)} folders ({listed}), expected one; move the others elsewhere, "
            f"{_IN_MANIFEST}"
        )
    if not chosen:
        session = min(images)
        image = min(images[session])
        others = [label.file.name for labels in found.values() for label in labels]
        there = list_some(others or [folder.name for folder in folders]) or "nothing"
        raise DatasetError(
            f"{path}: found BIDS images without label maps, in derivatives {there}, expected for instance "
            f"derivatives/labels/{session.replace('_', '/')}/anat/{session}_{image}_dseg.nii.gz, or at its end "
            f"_seg, _label-lesion_mask or _lesion-manual; add the label maps, {_IN_MANIFEST}"
        )
    labels = found[chosen[0]]
    return chosen[0], [label for label in labels if label.image] if named else labels


def _list_labels(folder: Path) -> list[_Label]:
    """The files below sub-* whose names are of label maps."""
    files = [file for file in sorted(folder.glob("sub-*/**/*")) if file_ending(file) and not file.name.startswith(".")]
    named = by_name(files) if files else {}
    return [label for name, file in named.items() if (label := _read_label_name(name, file)) is not None]


def _read_label_name(name: str, file: Path) -> _Label | None:
    """sub-01_T1w_label-lesion_mask is of the session sub-01, drawn on T1w, of the structure lesion."""
    match = _SESSION.fullmatch(name)
    if match is None:
        return None
    *parts, suffix = match["rest"].split("_")
    if not _LABEL_SUFFIX.fullmatch(suffix):
        return None
    n_image_parts = next((number for number, part in enumerate(parts, start=1) if "-" not in part), 0)
    entities = dict(part.split("-", 1) for part in parts if "-" in part)
    structure = entities.get("label") or (
        suffix.removesuffix("-manual") if suffix.endswith("-manual") else entities.get("desc") or suffix
    )
    image = "_".join(parts[:n_image_parts]) or None
    return _Label(file=file, session=match["session"], image=image, structure=structure)


def _refuse_unmatched(labels: Sequence[_Label], images: Images, *, where: Path) -> None:
    """Label maps without an image, and several of one structure in a session."""
    problems = []
    first: dict[tuple[str, str | None, str], _Label] = {}
    for label in labels:
        session, file = label.session, str(label.file)
        if not label.fits(images):
            expected = f"the image {session}_{label.image or 'T1w'} in {session.partition('_')[0]}"
            kind, advice = "label map without image", "add the image, or remove the label map"
            problems.append(Problem(kind=kind, case=session, file=file, expected=expected, advice=advice))
        other = first.setdefault((session, label.image, label.structure), label)
        if other is not label:
            kind, advice = "two label maps of one structure", f"keep one of them, {_IN_MANIFEST}"
            found = f"{other.file.name} too"
            problems.append(Problem(kind=kind, case=session, file=file, found=found, advice=advice))
    if problems:
        raise DatasetError.listing(f"{where}: images and label maps do not match.", problems)


def _choose_structures(labels: Sequence[_Label], *, where: Path) -> tuple[str, ...]:
    """Of one kind, which are label maps, or of several, which are masks of a structure each."""
    n_files = Counter(label.structure for label in labels)
    if len(n_files) > 1 and "dseg" in n_files:
        listed = ", ".join(f"{structure} ({n})" for structure, n in sorted(n_files.items()))
        raise DatasetError(
            f"{where}: found label maps and masks beside them: {listed}, expected one of the two; keep the label maps "
            f"(_dseg) or the masks, {_IN_MANIFEST}"
        )
    return tuple(sorted(n_files))


def _choose_image(labels: Sequence[_Label], *, where: Path) -> str | None:
    """What the label maps were drawn on; None where their names do not say."""
    n_files = Counter(label.image for label in labels if label.image)
    if len(n_files) > 1:
        listed = ", ".join(f"{image} ({n})" for image, n in sorted(n_files.items()))
        raise DatasetError(
            f"{where}: found label maps of different images: {listed}, expected of the same in every session; keep "
            f"those of one, {_IN_MANIFEST}"
        )
    return next(iter(n_files), None)


def _tell_incomplete(
    labels: Mapping[str, Mapping[str, Path]], images: Images, structures: Sequence[str], *, where: Path
) -> None:
    unlabelled = sorted(images.keys() - labels.keys())
    if unlabelled:
        logger.info("%s: %d sessions without label map are left out: %s", where, len(unlabelled), list_some(unlabelled))
    for structure in structures:
        lacking = sorted(session for session, files in labels.items() if structure not in files)
        if lacking:
            logger.info("%s: %d sessions have no mask of %s: %s", where, len(lacking), structure, list_some(lacking))


def _choose_channels(
    images: Images, labels: Mapping[str, Mapping[str, Path]], drawn_on: str | None, *, where: Path
) -> tuple[str, ...]:
    """Images that all labelled sessions have, if they lie on one grid; or else those that the label maps lie on."""
    n_sessions = Counter(channel for session in labels for channel in images[session])
    common = sorted(channel for channel, n in n_sessions.items() if n == len(labels))
    rare = {channel: n for channel, n in sorted(n_sessions.items()) if n < len(labels)}
    listed = ", ".join(f"{channel} ({n})" for channel, n in rare.items())
    if not common:
        raise DatasetError(
            f"{where}: found no image that all {len(labels)} sessions with label maps have: {listed}, expected one; "
            "add the missing images, or remove the label maps of sessions that lack them"
        )
    if rare:
        logger.info("%s: not in all %d sessions with label maps, and left out: %s", where, len(labels), listed)
    session = min(labels)
    reference = images[session][drawn_on] if drawn_on else next(iter(labels[session].values()))
    if not all(file.exists() for file in (reference, *images[session].values())):
        return tuple(common)  # What is missing is told later, all of it together.
    grid = read_geometry(reference)
    elsewhere = [channel for channel in common if grid_difference(grid, read_geometry(images[session][channel]))]
    if not elsewhere or (not drawn_on and elsewhere == common):
        return tuple(common)
    kept = (drawn_on,) if drawn_on else tuple(channel for channel in common if channel not in elsewhere)
    logger.info(
        "%s: the channels are %s alone, because in %s these lie on another grid: %s",
        where,
        list_some(kept),
        session,
        list_some(elsewhere),
    )
    return kept
