"""Segmenting a folder of images."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg import __version__
from autoseg.core.errors import FormatError, PredictionError, Problem, describe_problems
from autoseg.core.labels import LabelSpec
from autoseg.core.runtime import format_duration, track
from autoseg.core.serialize import write_json
from autoseg.data.check import load_image
from autoseg.data.files import by_name, channel_problems, group_channels, list_images, split_channel
from autoseg.data.io import file_ending, write_volume
from autoseg.pipeline.workspace import DEFAULT_WORK, Workspace, default_configuration

if TYPE_CHECKING:
    from autoseg.inference.predictor import Predictor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PredictionRecord:
    """What made a folder of label maps, for `prediction.json` in it.

    Attributes:
        autoseg: version.
        dataset: the model was trained on.
        configuration: of the model.
        folds: that were averaged.
        mirrored: whether mirrored copies were averaged.
        labels: names and values in the label maps.
        seconds: per case.
    """

    autoseg: str
    dataset: str
    configuration: str
    folds: tuple[int, ...]
    mirrored: bool
    labels: LabelSpec
    seconds: dict[str, float]


def predict(
    images: Path | str,
    output: Path | str,
    work: Path | str = DEFAULT_WORK,
    *,
    configuration: str | None = None,
    folds: Sequence[int] | None = None,
    device: str = "auto",
    mirroring: bool | None = None,
    step_fraction: float = 0.5,
) -> list[Path]:
    """Segments every image of a folder with the trained folds of a configuration.

    Example:
        >>> import autoseg
        >>> files = autoseg.predict("dataset/imagesTs", "segmentations", "work", device="cpu")
        >>> sorted(file.name for file in files)[0]
        'phantom_test_000.nii.gz'

    Args:
        images: a folder of images (CASE_0000.nii.gz, CASE_0001.nii.gz, ... for several channels), or one image.
        output: the folder for the label maps; made where it is missing.
        work: the work folder, or the folder of a model copied from one (`models/<configuration>`).
        configuration: its name; None for the recommended one.
        folds: which to average; None for all that are trained.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        mirroring: average over mirrored copies; None where the folds were trained on such.
        step_fraction: distance of tiles as a fraction of the patch.

    Returns:
        The label maps, one per case, in each image's own geometry.

    Raises:
        PredictionError: no image, no trained model; or, after all others are done, the images that could not be
            segmented.
    """
    from autoseg.inference.predictor import Predictor

    started = time.monotonic()
    model = _find_model(Path(work), configuration)
    predictor = Predictor(model, device=device, folds=folds, mirroring=mirroring, step_fraction=step_fraction)
    cases = find_images(Path(images), n_channels=len(predictor.plan.channels))
    folder = Path(output)
    if folder.resolve() == (Path(images) if Path(images).is_dir() else Path(images).parent).resolve():
        raise PredictionError(f"{folder}: is the folder of the images; name another one for the label maps")
    logger.info(
        "segmenting %d images with %s, folds %s, %s mirroring, on %s",
        len(cases),
        predictor.configuration.name,
        ", ".join(map(str, predictor.folds)),
        "with" if predictor.mirroring else "without",
        predictor.device,
    )
    seconds, problems = _segment_images(predictor, cases, folder)
    write_json(
        folder / "prediction.json",
        PredictionRecord(
            autoseg=__version__,
            dataset=predictor.plan.dataset,
            configuration=predictor.configuration.name,
            folds=predictor.folds,
            mirrored=predictor.mirroring,
            labels=predictor.plan.labels,
            seconds=seconds,
        ),
    )
    logger.info("%d label maps in %s after %s", len(seconds), folder, format_duration(time.monotonic() - started))
    if problems:
        headline = f"{len(problems)} of {len(cases)} images could not be segmented; the others are done."
        raise PredictionError(describe_problems(headline, problems))
    return [_output_file(folder, case) for case in seconds]


def _output_file(folder: Path, case: str) -> Path:
    return folder / f"{case}.nii.gz"


def _segment_images(
    predictor: Predictor, cases: Mapping[str, Sequence[Path]], folder: Path
) -> tuple[dict[str, float], list[Problem]]:
    """Segments case by case; what cannot be read does not stop the others.

    Returns:
        Seconds for each case that is done, and what is wrong with the others.
    """
    seconds: dict[str, float] = {}
    problems = []
    with track("segmenting", total=len(cases)) as advance:
        for case, files in cases.items():
            started = time.monotonic()
            try:
                image, geometry = load_image(files, n_channels=len(predictor.plan.channels))
            except FormatError as error:
                advice = "mend or replace the image, then run the same command again"
                problems.append(Problem(kind="image cannot be used", case=case, text=str(error), advice=advice))
                continue
            label = predictor.predict_canonical(image, geometry)
            write_volume(_output_file(folder, case), label, geometry, like=files[0])
            seconds[case] = round(time.monotonic() - started, 3)
            advance(1, case)
    return seconds, problems


def _find_model(work: Path, configuration: str | None) -> Path:
    """The folder of the model: of a configuration in a work folder, or the folder itself."""
    from autoseg.inference.predictor import trained_folds

    if trained_folds(work):
        return work
    workspace = Workspace(root=work)
    made = workspace.read_plan()
    model = workspace.model(default_configuration(made, configuration).name)
    if not trained_folds(model):
        trained = [name for name in made.configurations if trained_folds(workspace.model(name))]
        hint = f"; trained is {', '.join(trained)}, name it with -c" if trained else ""
        raise PredictionError(f"{model}: no fold is trained yet; run 'autoseg train' first{hint}")
    return model


def find_images(path: Path, *, n_channels: int) -> dict[str, list[Path]]:
    """The images to segment, case by case.

    Args:
        path: a folder, or one image.
        n_channels: the model was trained on.

    Returns:
        Files of each case: one with all channels, or CASE_0000, CASE_0001, ... with one each.

    Raises:
        PredictionError: no image there, or a case that lacks a channel.
        DatasetError: two files of one case.
    """
    if not path.exists():
        raise PredictionError(f"{path}: no such file or folder")
    files = list_images(path) if path.is_dir() else [path] if file_ending(path) else []
    if not files:
        raise PredictionError(f"{path}: found no image, expected files such as CASE.nii.gz")
    names = [split_channel(file) for file in files]
    # CASE_0000, CASE_0001 are channels if there are several, and numbered cases otherwise.
    firsts = {name[0] for name in names if name is not None and name[1] == "0000"}
    if n_channels == 1:
        is_channel = [name is not None and name[1] == "0000" for name in names]
    else:
        is_channel = [name is not None and bool(firsts) for name in names]
    if not all(is_channel):
        return {case: [file] for case, file in by_name(files).items()}
    cases = group_channels(files, folder=path)
    problems = [p for case, members in cases.items() for p in channel_problems(case, members, n_channels=n_channels)]
    if problems:
        raise PredictionError(describe_problems(f"{path}: some images lack a channel.", problems))
    return cases
