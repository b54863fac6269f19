"""What to segment, and with what: images as users name them, and models wherever they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.core.errors import PredictionError, Problem
from autoseg.data.files import by_name, channel_problems, group_channels, list_images, place_channels, split_channel
from autoseg.data.io import is_image
from autoseg.pipeline.choose import selected_models
from autoseg.pipeline.workspace import Workspace, default_configuration

if TYPE_CHECKING:
    from autoseg.core.steps import Step
    from autoseg.inference.model import Model


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What segments: a model, or several together.

    Attributes:
        models: of one plan.
        steps: of post-processing after several; a single model brings its own.
    """

    models: tuple[Model, ...]
    steps: tuple[Step, ...] = ()


def choose_models(path: Path, configuration: str | None = None, *, is_model: bool = False) -> Choice:
    """What predicts where a user names a work folder or model: what was selected, if nothing else is named.

    Args:
        path: as in `find_model`.
        configuration: its name; None for what `select` chose, or else the recommended one.
        is_model: as in `find_model`.

    Raises:
        AutosegError: see `find_model`.
    """
    chosen = None if is_model or configuration is not None else selected_models(Workspace(root=path))
    if chosen is not None:
        selection, models = chosen
        return Choice(models=models, steps=selection.candidate.steps)
    return Choice(models=(find_model(path, configuration, is_model=is_model),))


def find_model(path: Path, configuration: str | None = None, *, is_model: bool = False) -> Model:
    """Opens the model of a configuration.

    Args:
        path: a work folder, the folder of a trained configuration, or a `.autoseg` file.
        configuration: its name; None for the recommended one of a work folder, or the one that a model is of.
        is_model: whether it must be a model by itself, not a work folder.

    Raises:
        PredictionError: nothing is trained yet, or the model is of another configuration.
        FormatError: the model is damaged, or is none.
        WorkspaceError: the work folder is not planned.
    """
    from autoseg.inference.model import read_model, usable_folds

    if is_model or path.is_file() or usable_folds(path):
        return _open_model(path, configuration)
    workspace = Workspace(root=path)
    made = workspace.read_plan()
    folder = workspace.model(default_configuration(made, configuration).name)
    if not usable_folds(folder):
        usable = [name for name in made.configurations if usable_folds(workspace.model(name))]
        hint = f"; trained is {', '.join(usable)}, name it with -c" if usable else ""
        raise PredictionError(f"{folder}: no fold is trained yet; run 'autoseg train' first{hint}")
    return read_model(folder)


def _open_model(path: Path, configuration: str | None) -> Model:
    """Opens a model that is one by itself."""
    from autoseg.inference.model import read_model

    if Workspace(root=path).splits_file.exists():
        raise PredictionError(f"{path}: is a work folder, expected a model; name it with -w")
    model = read_model(path)
    if configuration not in (None, model.configuration.name):
        raise PredictionError(f"{path}: is a model of {model.configuration.name}, expected one of {configuration}")
    return model


def find_images(
    paths: Sequence[Path], *, n_channels: int, optional: Collection[int] = ()
) -> tuple[dict[str, list[Path | None]], list[Problem]]:
    """The images to segment, case by case.

    Args:
        paths: folders and images.
        n_channels: the model was trained on.
        optional: channels that an image may lack.

    Returns:
        Files of each case: one with all channels, or CASE_0000, CASE_0001, ... with one each, None for a channel that
        it lacks; and what is wrong with the cases that do not have exactly these.

    Raises:
        PredictionError: no image there.
        DatasetError: two files of one case.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise PredictionError(f"{path}: no such file or folder")
        found = [path] if is_image(path) else list_images(path) if path.is_dir() else []
        if not found:
            raise PredictionError(f"{path}: found no image, expected files such as CASE.nii.gz")
        files += found
    names = [split_channel(file) for file in files]
    # CASE_0000, CASE_0001 are channels if there are several, and numbered cases otherwise.
    firsts = {name[0] for name in names if name is not None and name[1] == "0000"}
    if n_channels == 1:
        is_channel = [name is not None and name[1] == "0000" for name in names]
    else:
        is_channel = [name is not None and (bool(firsts) or bool(optional)) for name in names]
    if not all(is_channel):
        return {case: [file] for case, file in by_name(files).items()}, []
    cases = group_channels(files, folder=paths[0])
    problems = [
        problem
        for case, members in cases.items()
        for problem in channel_problems(case, members, n_channels=n_channels, optional=optional)
    ]
    broken = {problem.case for problem in problems}
    placed = {case: place_channels(members, n_channels=n_channels) for case, members in cases.items()}
    return {case: members for case, members in placed.items() if case not in broken}, problems
