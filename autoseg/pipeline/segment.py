"""Segmenting a folder of images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.core.errors import PredictionError, Problem, describe_problems
from autoseg.inference.record import has_records
from autoseg.pipeline.inputs import ChosenModels, choose_models, find_images
from autoseg.pipeline.outputs import OutputFolder, ending_of
from autoseg.pipeline.segment_run import SegmentationRun
from autoseg.pipeline.workspace import DEFAULT_WORK

if TYPE_CHECKING:
    from autoseg.core.labels import LabelSpec
    from autoseg.inference.ensemble import Ensemble
    from autoseg.inference.predictor import Predictor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What is done for the sake of a good result, and what is left out for the sake of time.

    Attributes:
        mirroring: average over mirrored copies; None where the folds were trained on such.
        step_fraction: distance of tiles as a fraction of the patch.
        n_folds: that are averaged; None for all.
    """

    mirroring: bool | None
    step_fraction: float
    n_folds: int | None


SPEEDS: dict[str, Speed] = {
    "best": Speed(mirroring=None, step_fraction=0.5, n_folds=None),
    "balanced": Speed(mirroring=False, step_fraction=0.5, n_folds=None),
    "fast": Speed(mirroring=False, step_fraction=0.75, n_folds=1),
}


def predict(
    images: Path | str | Sequence[Path | str],
    output: Path | str,
    work: Path | str = DEFAULT_WORK,
    *,
    model: Path | str | None = None,
    configuration: str | None = None,
    folds: Sequence[int] | None = None,
    device: str = "auto",
    speed: str = "best",
    mirroring: bool | None = None,
    step_fraction: float | None = None,
    overwrite: bool = True,
    request: str = "",
    part: tuple[int, int] = (1, 1),
    save_probabilities: bool = False,
    save_uncertainty: bool = False,
    max_ram_gib: float | None = None,
    max_vram_gib: float | None = None,
    compile: bool = False,
    postprocess: bool = True,
    fix: bool = False,
) -> list[Path]:
    """Segments every image of a folder with what was selected, or with the trained folds of a configuration.

    Beside the label maps, `prediction.json` says what was run with what on what.

    Example:
        >>> import autoseg
        >>> files = autoseg.predict("dataset/imagesTs", "segmentations", "work", device="cpu")
        >>> sorted(file.name for file in files)[0]
        'phantom_test_000.nii.gz'

    Args:
        images: a folder of images, one image, or several of either. Several channels are CASE_0000.nii.gz,
            CASE_0001.nii.gz, ... or CASE_flair.nii.gz, CASE_t1.nii.gz, ... as the channels of the plan are called; the
            files of a case may be in a folder of its name.
        output: the folder for the label maps; made where it is missing.
        work: the work folder, or a model as for `model`.
        model: a file that `autoseg export` has made, or the folder of a trained configuration (`models/<configuration>`
            of a work folder); where it is given, `work` does not count.
        configuration: its name; None for what `select` chose in the work folder, which may be an ensemble, or else the
            recommended one; or the one that the model is of.
        folds: which to average; None for all that are trained to their end, see `Predictor`.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        speed: a name in `SPEEDS`.
        mirroring: average over mirrored copies; None as the speed has it.
        step_fraction: distance of tiles as a fraction of the patch; None as the speed has it.
        overwrite: segment all images; otherwise only those that have no label map yet, with the model and settings of
            the others. Where `prediction.json` tells of other cases alone, their label maps are an older run's.
        request: where not all are segmented: label maps that no call with the same text has made do not count; empty
            for all that are there.
        part: (2, 8) takes the second of eight parts of the images, so that eight processes can share them.
        save_probabilities: also write a map of each label's probability, to `probabilities/CASE/`.
        save_uncertainty: also write the entropy, and how much the folds disagree, to `uncertainty/CASE/`.
        max_ram_gib: images that need more memory are refused; None for what the machine has.
        max_vram_gib: of the GPU's memory for the sums over tiles; None for half of what is free.
        compile: `torch.compile` the networks; pays for many images on a GPU.
        postprocess: do the steps that cross-validation found to help, and estimate the Dice of each label map where
            the agreement of folds tells it.
        fix: resample channels that lie on another grid than the first, and give voxels that are NaN or infinite the
            lowest value of the others; images with such are refused otherwise.

    Returns:
        The label maps, one per case, in each image's own geometry.

    Raises:
        PredictionError: no image, no trained model, label maps in the way that no prediction has made; or, after all
            others are done, the images that could not be segmented.
        FormatError: the model is damaged, or is none.
    """
    if speed not in SPEEDS:
        raise PredictionError(f"speed '{speed}' is unknown; known are {', '.join(SPEEDS)}")
    if not 1 <= part[0] <= part[1]:
        raise PredictionError(f"found the part {part[0]}/{part[1]}, expected for instance 1/8, 2/8, ... 8/8")
    chosen = SPEEDS[speed]
    choice = choose_models(Path(work if model is None else model), configuration, is_model=model is not None)
    predictor = _load(
        choice,
        device=device,
        folds=folds,
        speed=replace(
            chosen,
            mirroring=chosen.mirroring if mirroring is None else mirroring,
            step_fraction=chosen.step_fraction if step_fraction is None else step_fraction,
        ),
        max_ram_gib=max_ram_gib,
        max_vram_gib=max_vram_gib,
        compile=compile,
        postprocess=postprocess,
    )
    paths = [Path(images)] if isinstance(images, (str, Path)) else [Path(path) for path in images]
    cases, problems = find_images(paths, channels=predictor.plan.channels, optional=predictor.plan.optional_indices)
    folder = Path(output)
    if folder.resolve() in {(path if path.is_dir() else path.parent).resolve() for path in paths}:
        raise PredictionError(f"{folder}: is the folder of the images; name another one for the label maps")
    _refuse_to_replace(folder, cases, predictor.plan.labels)
    cases, problems = _take_part(cases, problems, part)
    output_folder = OutputFolder(
        root=folder,
        labels=predictor.plan.labels,
        endings={case: _ending(files, predictor.plan.labels) for case, files in cases.items()},
        probabilities=save_probabilities,
        uncertainty=save_uncertainty,
    )
    run = SegmentationRun(predictor, output_folder, part=part, problems=problems, fix=fix, request=request)
    todo = cases if overwrite else run.continue_with(cases)
    logger.info(
        "segmenting %d images with %s, folds %s, %s mirroring, on %s",
        len(todo),
        predictor.name,
        ", ".join(map(str, predictor.folds)),
        "with" if predictor.mirroring else "without",
        predictor.device,
    )
    run.segment(todo)
    if run.problems:
        n_failed = len({problem.case for problem in run.problems})
        n_images = len({*cases, *(str(problem.case) for problem in run.problems)})
        headline = f"{n_failed} of {n_images} images could not be segmented; the others are done."
        raise PredictionError(describe_problems(headline, run.problems))
    return [output_folder.label_map(case) for case in cases]


def _refuse_to_replace(folder: Path, cases: Mapping[str, Sequence[Path | None]], labels: LabelSpec) -> None:
    """Makes sure that label maps in the folder are of predictions, and not somebody's references.

    Raises:
        PredictionError: there is a label map of a case, of whichever part, and no record of any prediction.
    """
    label_maps = (folder / f"{case}{_ending(files, labels)}" for case, files in cases.items())
    there = next((file for file in label_maps if file.exists()), None)
    # In this order: another part may write its record and a label map meanwhile.
    if there is not None and not has_records(folder):
        raise PredictionError(
            f"{there}: is there already, and no prediction has made it; name another folder for the label maps"
        )


def _ending(files: Sequence[Path | None], labels: LabelSpec) -> str:
    return ending_of(next(filter(None, files)), labels)


def _take_part(
    cases: Mapping[str, list[Path | None]], problems: Sequence[Problem], part: tuple[int, int]
) -> tuple[dict[str, list[Path | None]], list[Problem]]:
    """The images of a part; one that lacks a channel is of one part too, and told by that alone."""
    names = sorted({*cases, *(str(problem.case) for problem in problems)})
    mine = set(names[part[0] - 1 :: part[1]])
    own_problems = [problem for problem in problems if str(problem.case) in mine]
    return {case: files for case, files in cases.items() if case in mine}, own_problems


def _load(
    choice: ChosenModels,
    *,
    device: str,
    folds: Sequence[int] | None,
    speed: Speed,
    max_ram_gib: float | None,
    max_vram_gib: float | None,
    compile: bool,
    postprocess: bool,
) -> Predictor | Ensemble:
    """What was chosen, ready to segment."""
    from autoseg.inference.ensemble import Ensemble
    from autoseg.inference.predictor import Predictor

    members = [
        Predictor(
            model,
            device=device,
            folds=model.choose_folds()[: speed.n_folds] if folds is None and speed.n_folds is not None else folds,
            mirroring=speed.mirroring,
            step_fraction=speed.step_fraction,
            max_ram_gib=max_ram_gib,
            max_vram_gib=max_vram_gib,
            compile=compile,
            postprocess=postprocess,
            n_sharing=len(choice.models),
        )
        for model in choice.models
    ]
    return members[0] if len(members) == 1 else Ensemble(members, steps=choice.steps if postprocess else ())
