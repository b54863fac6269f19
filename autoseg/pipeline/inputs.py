"""What to segment, and with what: images as users name them, and models wherever they are."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.core.errors import FormatError, PredictionError, Problem, list_some
from autoseg.data.bids import list_bids_images
from autoseg.data.files import (
    by_name,
    channel_problems,
    group_channels,
    group_named_channels,
    list_case_files,
    list_images,
    masks_among,
    place_channels,
    split_channel,
)
from autoseg.data.io import case_name, is_image, read_raw
from autoseg.pipeline.choose import selected_models
from autoseg.pipeline.configurations import CASCADE, default_configuration
from autoseg.pipeline.workspace import Workspace
from autoseg.training.folds import trained_folds, usable_folds

if TYPE_CHECKING:
    from autoseg.core.steps import Step
    from autoseg.inference.model import Model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ChosenModels:
    """What segments: a model, or several together.

    Attributes:
        models: of one plan.
        steps: of post-processing after several; a single model brings its own.
    """

    models: tuple[Model, ...]
    steps: tuple[Step, ...] = ()


def choose_models(path: Path, configuration: str | None = None, *, is_model: bool = False) -> ChosenModels:
    """What predicts where a user names a work folder or model: what was selected, if nothing else is named.

    Args:
        path: as in `find_model`.
        configuration: its name; None for what `select` chose, or else what `configuration_to_predict` says.
        is_model: as in `find_model`.

    Raises:
        AutosegError: see `find_model`.
    """
    chosen = None if is_model or configuration is not None else selected_models(Workspace(root=path))
    if chosen is not None:
        selection, models = chosen
        return ChosenModels(models=models, steps=selection.candidate.steps)
    return ChosenModels(models=(find_model(path, configuration, is_model=is_model),))


def find_model(path: Path, configuration: str | None = None, *, is_model: bool = False) -> Model:
    """Opens the model of a configuration.

    Args:
        path: a work folder, the folder of a trained configuration, or a `.autoseg` file.
        configuration: its name; None for that of a model, or of a work folder what `configuration_to_predict` says.
        is_model: whether it must be a model by itself, not a work folder.

    Raises:
        PredictionError: nothing is trained yet, or the model is of another configuration.
        FormatError: the model is damaged, or is none.
        WorkspaceError: the work folder is not planned.
    """
    from autoseg.inference.model import read_model

    if is_model or path.is_file() or usable_folds(path):
        return _open_model(path, configuration)
    workspace = Workspace(root=path)
    plan = workspace.read_plan()
    name = default_configuration(plan, configuration).name if configuration else configuration_to_predict(workspace)
    if not usable_folds(workspace.model(name)):
        usable = [known for known in plan.configurations if usable_folds(workspace.model(known))]
        if usable:
            raise PredictionError(
                f"{name} is not trained; trained are {', '.join(usable)}: name one with -c, or run 'autoseg train -c "
                f"{name}'"
            )
        raise PredictionError(f"{workspace.model(name)}: no fold is trained yet; run 'autoseg train' first")
    if configuration is None and name != plan.recommended:
        logger.info("%s is recommended, but not trained to its end: %s segments", plan.recommended, name)
    return read_model(workspace.model(name))


def configuration_to_predict(workspace: Workspace) -> str:
    """The configuration to predict with where none is named and none was selected.

    It is the recommended one, unless another one alone is trained to its end, or trained at all.
    """
    plan = workspace.read_plan()
    for folds_of in (trained_folds, usable_folds):
        names = [name for name in plan.configurations if folds_of(workspace.model(name))]
        if plan.recommended in names:
            return plan.recommended
        if len(names) == 1:
            return names[0]
    return plan.recommended


def _open_model(path: Path, configuration: str | None) -> Model:
    """Opens a model that is one by itself."""
    from autoseg.inference.model import read_model

    model = read_model(path)
    is_meant = configuration == CASCADE and model.previous is not None
    if configuration not in (None, model.configuration.name) and not is_meant:
        raise PredictionError(f"{path}: is a model of {model.configuration.name}, expected one of {configuration}")
    return model


def find_images(
    paths: Sequence[Path], *, channels: Sequence[str], optional: Collection[int] = ()
) -> tuple[dict[str, list[Path | None]], list[Problem]]:
    """The images to segment, case by case.

    Args:
        paths: folders and images.
        channels: names of those that the model was trained on.
        optional: channels that an image may lack.

    Returns:
        Files of each case: one with all channels, or CASE_0000, CASE_0001, ... or CASE_<name of the channel>, ... with
        one each, None for a channel that it lacks; and what is wrong with the cases that do not have exactly these.

    Raises:
        PredictionError: no image there.
        DatasetError: two files of one case.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise PredictionError(f"{path}: no such file or folder")
        found = [path] if is_image(path) else _list_inputs(path) if path.is_dir() else []
        if not found:
            raise PredictionError(
                f"{path}: found no image, expected files such as CASE.nii.gz, or folders with the files of a DICOM "
                "series each; name the folder that they are in"
            )
        files += found
    if masks := set(masks_among(files)):
        listed = list_some(sorted(file.name for file in masks))
        logger.info("%d files are left out as masks of the images beside them: %s", len(masks), listed)
        files = [file for file in files if file not in masks]
    n_channels = len(channels)
    names = [split_channel(file) for file in files]
    # CASE_0000, CASE_0001 are channels if there are several, and numbered cases otherwise.
    firsts = {name[0] for name in names if name is not None and name[1] == "0000"}
    if n_channels == 1:
        is_channel = [name is not None and name[1] == "0000" for name in names]
    else:
        is_channel = [name is not None and (bool(firsts) or bool(optional)) for name in names]
    if all(is_channel):
        cases = group_channels(files, folder=paths[0])
        problems = [
            problem
            for case, members in cases.items()
            for problem in channel_problems(case, members, n_channels=n_channels, optional=optional)
        ]
        broken = {problem.case for problem in problems}
        placed = {case: place_channels(members, n_channels=n_channels) for case, members in cases.items()}
        return {case: members for case, members in placed.items() if case not in broken}, problems
    named = group_named_channels(files, channels)
    if _are_channels(named, files, n_channels):
        return _place_named_channels(named, files, channels, optional)
    return {case: [file] for case, file in by_name(files).items()}, []


def _list_inputs(folder: Path) -> list[Path]:
    """The images in a folder; where it has none, those in the folders of its cases: CASE/CASE_1.tif, or BIDS."""
    return list_images(folder) or list_case_files(folder) or list_bids_images(folder)


def _are_channels(named: Mapping[str, Mapping[int, Sequence[Path]]], files: Sequence[Path], n_channels: int) -> bool:
    """Whether files that are called after channels are channels, not whole images that happen to be called so."""
    if not named:
        return False
    if n_channels == 1:
        # One channel is the whole image, so that its name only tells it from others of the same case.
        taken = {file for members in named.values() for file in members.get(0, ())}
        return any(_case_of(file, named) is not None for file in files if file not in taken)
    first = next(file for members in named.values() for of_channel in members.values() for file in of_channel)
    try:
        return read_raw(first).n_channels != n_channels
    except FormatError:
        return True


def _case_of(file: Path, cases: Collection[str]) -> str | None:
    """The case that a file is called after, CASE_anything; the longest that fits."""
    name = case_name(file)
    return max((case for case in cases if name.startswith((f"{case}_", f"{case}-"))), key=len, default=None)


def _place_named_channels(
    named: Mapping[str, Mapping[int, Sequence[Path]]],
    files: Sequence[Path],
    channels: Sequence[str],
    optional: Collection[int],
) -> tuple[dict[str, list[Path | None]], list[Problem]]:
    """Files of each case by their channel, and what is wrong with cases that lack one or have one twice."""
    taken = {file for members in named.values() for of_channel in members.values() for file in of_channel}
    others = [file for file in files if file not in taken]
    beside = [file for file in others if _case_of(file, named) is not None]
    if beside:
        listed = list_some(sorted(file.name for file in beside))
        logger.info("%d files are left out, as they are no channel (%s): %s", len(beside), ", ".join(channels), listed)
    placed: dict[str, list[Path | None]] = {}
    problems: list[Problem] = []
    for case, members in named.items():
        missing = set(range(len(channels))) - members.keys()
        if missing <= set(optional) and all(len(of_channel) == 1 for of_channel in members.values()):
            placed[case] = [members[channel][0] if channel in members else None for channel in range(len(channels))]
            continue
        problems.append(
            Problem(
                kind="wrong number of channels",
                case=case,
                found=", ".join(file.name for of_channel in members.values() for file in of_channel),
                expected=f"one file per channel: {', '.join(f'{case}_{channel}' for channel in channels)}",
                advice="add the missing channel, or remove what is too much",
            )
        )
    # Whatever is called in another way is an image by itself; if it has not all channels, that is told with its name.
    placed |= {case: [file] for case, file in by_name([file for file in others if file not in beside]).items()}
    return placed, problems
