"""Segmenting a folder of images."""

from __future__ import annotations

import logging
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoseg import __version__
from autoseg.core.errors import (
    AutosegError,
    FormatError,
    ImageTooLargeError,
    PredictionError,
    Problem,
    describe_problems,
    first_line,
)
from autoseg.core.faults import DeviceError, describe_fault, describe_lost_device, is_device_lost, is_out_of_memory
from autoseg.core.runtime import autocast_dtype, format_duration, peak_memory_gib, run_ahead, track
from autoseg.core.serialize import write_json
from autoseg.data.load import load_image
from autoseg.inference.record import DONE, FAILED, CaseResult, PredictionRecord, has_records, read_records, record_file
from autoseg.pipeline.inputs import ChosenModels, choose_models, find_images
from autoseg.pipeline.outputs import OutputFolder, ending_of, measure_volumes
from autoseg.pipeline.workspace import DEFAULT_WORK

if TYPE_CHECKING:
    from autoseg.core.geometry import Geometry
    from autoseg.core.labels import LabelSpec
    from autoseg.inference.ensemble import Ensemble
    from autoseg.inference.predictor import Predictor, Segmentation

logger = logging.getLogger(__name__)

RECORD_INTERVAL_S = 10.0
N_LABELS_SHOWN = 5


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
    run = _Run(predictor, output_folder, part=part, problems=problems, fix=fix, request=request)
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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Opened:
    """An image that has been read, or what is wrong with it."""

    case: str
    files: Sequence[Path]
    geometry: Geometry | None = None
    prepared: Any = None
    warnings: tuple[str, ...] = ()
    error: AutosegError | None = None


class _Run:
    """Images go through it one by one; the next is read and the one before is written meanwhile, never more."""

    def __init__(
        self,
        predictor: Predictor | Ensemble,
        output: OutputFolder,
        *,
        part: tuple[int, int],
        problems: Sequence[Problem],
        fix: bool,
        request: str,
    ) -> None:
        self._fix, self._request = fix, request
        self._writing: tuple[str, Future[None]] | None = None
        self.predictor, self.output, self.problems = predictor, output, list(problems)
        self._record_file = record_file(output.root, part)
        self._results: dict[str, CaseResult] = {}
        for problem in problems:
            self._results[str(problem.case)] = CaseResult(status=FAILED, error=f"{problem.kind}: {problem.found}")
        self._started, self._started_at = time.monotonic(), datetime.now(timezone.utc)
        self._written_at = -math.inf

    def continue_with(self, cases: Mapping[str, Sequence[Path | None]]) -> dict[str, Sequence[Path | None]]:
        """The cases that have no label map yet, or only one of an older run.

        Raises:
            PredictionError: another model or other settings made those that are there.
        """
        done = {case for case in cases if self.output.label_map(case).is_file()}
        own_settings, records = self._record().settings, read_records(self.output.root, request=self._request)
        # Other processes may have segmented other parts into this folder, and other parts before.
        for earlier in records:
            # A label map beside which a later run has failed is of an older one.
            done -= {case for case, found in earlier.cases.items() if found.status != DONE}
            known = {case: found for case, found in earlier.cases.items() if case in done}
            if known and earlier.settings != own_settings:
                raise PredictionError(
                    f"{self.output.root}: its label maps were made by another model or with other folds, mirroring, "
                    "step or post-processing; --overwrite makes all anew"
                )
            self._results |= known
        if self._request or records:
            # By what is written down, not by times: clocks differ, and jump. The other label maps are of a run before.
            done &= self._results.keys()
        todo = {case: files for case, files in cases.items() if case not in done}
        logger.info("%d of %d images have a label map already", len(cases) - len(todo), len(cases))
        return todo

    def segment(self, cases: Mapping[str, Sequence[Path | None]]) -> None:
        """Segments all cases; one that can't be does not stop the others."""
        # From now on, label maps that are there already are of a run before.
        self._write_record()
        self._written_at = -math.inf
        try:
            self._segment_all(cases)
        except BaseException:
            # What went wrong first is what to tell.
            with suppress(OSError):
                self._write_record()
            raise
        self._write_record()
        text = "%d label maps in %s after %s"
        n_done = sum(known.status == DONE for known in self._results.values())
        logger.info(text, n_done, self.output.root, format_duration(time.monotonic() - self._started))

    def _segment_all(self, cases: Mapping[str, Sequence[Path | None]]) -> None:
        before = time.monotonic()
        with (
            track("segmenting", total=len(cases)) as advance,
            ThreadPoolExecutor(1, thread_name_prefix="writing") as pool,
            closing(run_ahead(self._open, cases.items(), depth=2)) as opened,
        ):
            written: Callable[[], None] | None = None
            for number, image in enumerate(opened, start=1):
                with self.output.scratch() as scratch:
                    segmentation = self._segment(image, scratch)
                    if written is not None:
                        written()
                        written = None
                    if segmentation is not None:
                        self._writing = image.case, pool.submit(self._write, image, segmentation)
                        written = partial(self._finish, image, self._writing[1])
                        if scratch is not None:
                            written()
                now = time.monotonic()
                self._note(image, segmentation, seconds=now - before, number=number, n_cases=len(cases))
                before = now
                advance(1, image.case)
            if written is not None:
                written()

    def _finish(self, image: _Opened, written: Future[None]) -> None:
        """Waits until a label map is written; where it can't be, its case does not count as done."""
        try:
            written.result()
        except Exception as error:
            told = describe_fault(error) or first_line(error)
            files = tuple(str(file.absolute()) for file in image.files)
            self._results[image.case] = CaseResult(status=FAILED, files=files, error=f"could not be written: {told}")
            raise

    def _open(self, item: tuple[str, Sequence[Path | None]]) -> _Opened:
        """Reads an image and brings it to the network's grid."""
        from autoseg.inference.compare import find_differences

        case, by_channel = item
        predictor, files = self.predictor, [file for file in by_channel if file is not None]
        channels = predictor.plan.channels
        lacking = [name for name, file in zip(channels, by_channel, strict=False) if file is None]
        try:
            image, geometry, mended = load_image(by_channel, n_channels=len(channels), fix=self._fix)
            warnings = [*mended, *(f"lacks the channel {name}: it is segmented without" for name in lacking)]
            warnings += find_differences(image, geometry, predictor.plan, predictor.configuration)
            prepared = predictor.prepare(image, geometry)
        except (FormatError, ImageTooLargeError) as error:
            return _Opened(case=case, files=files, error=error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return _Opened(case=case, files=files, error=PredictionError(describe_fault(error)))
        return _Opened(case=case, files=files, geometry=geometry, prepared=prepared, warnings=tuple(warnings))

    def _segment(self, image: _Opened, scratch: Path | None) -> Segmentation | None:
        if image.prepared is None:
            self._fail(image, image.error)
            return None
        for text in image.warnings:
            logger.warning("%s: %s", image.case, text)
        try:
            return self.predictor.segment(
                image.prepared,
                probabilities=self.output.probabilities,
                uncertainty=self.output.uncertainty,
                scratch=scratch,
            )
        except PredictionError as error:
            self._fail(image, error)
        except (MemoryError, RuntimeError) as error:
            if is_device_lost(error):
                # No other image can be segmented by this process.
                raise DeviceError(
                    f"{image.case}: {describe_lost_device(error)}; then give the same command again with --continue"
                ) from error
            if not is_out_of_memory(error):
                raise
            self._fail(image, PredictionError(describe_fault(error)))
        return None

    def _fail(self, image: _Opened, error: AutosegError | None) -> None:
        again = "run the same command again with --continue"
        advice = f"then {again}"
        if isinstance(error, FormatError):
            advice = f"mend or replace the image, then {again}"
        elif isinstance(error, ImageTooLargeError):
            advice = f"give more with --max-ram, or cut the image to the part that matters, then {again}"
        self.problems.append(Problem(kind="image cannot be segmented", case=image.case, text=str(error), advice=advice))
        logger.warning("%s: could not be segmented: %s", image.case, error)

    def _write(self, image: _Opened, segmentation: Segmentation) -> None:
        assert image.geometry is not None
        self.output.write(image.case, segmentation, image.geometry, like=image.files[0])

    def _note(
        self, image: _Opened, segmentation: Segmentation | None, *, seconds: float, number: int, n_cases: int
    ) -> None:
        """Keeps what became of a case, and says it."""
        if segmentation is None:
            self._results[image.case] = CaseResult(
                status=FAILED,
                seconds=round(seconds, 3),
                files=tuple(str(file.absolute()) for file in image.files),
                warnings=image.warnings,
                error=self.problems[-1].text,
            )
        else:
            assert image.geometry is not None
            volumes = measure_volumes(segmentation, image.geometry, self.predictor.plan.labels)
            estimate = segmentation.estimated_dice
            doubtful = estimate is not None and estimate < (self.predictor.low_dice or 0)
            self._results[image.case] = CaseResult(
                status=DONE,
                seconds=round(seconds, 3),
                volumes_ml=volumes,
                estimated_dice=None if estimate is None else round(estimate, 4),
                is_doubtful=doubtful,
                files=tuple(str(file.absolute()) for file in image.files),
                label_map=self.output.label_map(image.case).name,
                warnings=image.warnings,
            )
            if doubtful:
                text = "%s: the folds agree so little that a Dice of %.2f is to be expected; look at it"
                logger.warning(text, image.case, estimate)
            found = [f"{name} {volume:.4g} ml" for name, volume in volumes.items() if volume > 0]
            shown = ", ".join(found[:N_LABELS_SHOWN])
            if len(found) > N_LABELS_SHOWN:
                shown += f" and {len(found) - N_LABELS_SHOWN} labels more"
            left = (time.monotonic() - self._started) / number * (n_cases - number)
            logger.info(
                "%s (%d of %d): %s, %s%s",
                image.case,
                number,
                n_cases,
                format_duration(seconds),
                shown or "nothing found",
                f"; {format_duration(left)} left" if number < n_cases else "",
            )
        if time.monotonic() - self._written_at > RECORD_INTERVAL_S:
            self._write_record()

    def _write_record(self) -> None:
        write_json(self._record_file, self._record())
        self._written_at = time.monotonic()

    def _record(self) -> PredictionRecord:
        import torch

        predictor, cases = self.predictor, dict(self._results)
        if self._writing is not None and not _is_well(self._writing[1]):
            cases.pop(self._writing[0], None)
        on_gpu = predictor.device.type == "cuda"
        return PredictionRecord(
            autoseg=__version__,
            torch=torch.__version__,
            python=platform.python_version(),
            dataset=predictor.plan.dataset,
            configuration=predictor.name,
            model=predictor.digest,
            folds=tuple(predictor.folds),
            mirrored=predictor.mirroring,
            step_fraction=predictor.step_fraction,
            device=torch.cuda.get_device_name(predictor.device) if on_gpu else str(predictor.device),
            precision=str(autocast_dtype(predictor.device) or torch.float32).removeprefix("torch."),
            labels=predictor.plan.labels,
            postprocessing=tuple(predictor.steps),
            started=self._started_at.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - self._started, 1),
            peak_memory_gib=round(peak_memory_gib(), 2),
            peak_gpu_memory_gib=round(torch.cuda.max_memory_allocated(predictor.device) / 2**30, 2) if on_gpu else None,
            cases=cases,
            request=self._request,
        )


def _is_well(written: Future[None]) -> bool:
    return written.done() and not written.cancelled() and written.exception() is None
