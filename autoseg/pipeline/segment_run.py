"""Segmenting images one after the other, and the record of what became of each."""

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
from autoseg.core.errors import AutosegError, FormatError, ImageTooLargeError, PredictionError, Problem, first_line
from autoseg.core.faults import DeviceError, describe_fault, describe_lost_device, is_device_lost, is_out_of_memory
from autoseg.core.runtime import autocast_dtype, format_duration, peak_memory_gib, run_ahead, track
from autoseg.core.serialize import write_json
from autoseg.data.load import load_image
from autoseg.inference.record import CASE_DONE, CASE_FAILED, CaseResult, PredictionRecord, read_records, record_file
from autoseg.pipeline.outputs import OutputFolder, measure_volumes

if TYPE_CHECKING:
    from autoseg.core.geometry import Geometry
    from autoseg.inference.ensemble import Ensemble
    from autoseg.inference.predictor import Predictor, Segmentation

logger = logging.getLogger(__name__)

RECORD_INTERVAL_S = 10.0
N_LABELS_SHOWN = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedImage:
    """An image that has been read, or what is wrong with it."""

    case: str
    files: Sequence[Path]
    geometry: Geometry | None = None
    prepared: Any = None
    warnings: tuple[str, ...] = ()
    error: AutosegError | None = None

    @property
    def file_names(self) -> tuple[str, ...]:
        """The full paths."""
        return tuple(str(file.absolute()) for file in self.files)


def _failed(image: OpenedImage, error: str) -> CaseResult:
    return CaseResult(status=CASE_FAILED, files=image.file_names, warnings=image.warnings, error=error)


def _describe_volumes(result: CaseResult) -> str:
    """Of the first labels that were found."""
    found = [f"{name} {volume:.4g} ml" for name, volume in result.volumes_ml.items() if volume > 0]
    more = f" and {len(found) - N_LABELS_SHOWN} labels more" if len(found) > N_LABELS_SHOWN else ""
    return ", ".join(found[:N_LABELS_SHOWN]) + more or "nothing found"


class SegmentationRun:
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
            self._results[str(problem.case)] = CaseResult(status=CASE_FAILED, error=f"{problem.kind}: {problem.found}")
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
            done -= {case for case, found in earlier.cases.items() if found.status != CASE_DONE}
            known = {case: found for case, found in earlier.cases.items() if case in done}
            if known and earlier.settings != own_settings:
                raise PredictionError(
                    f"{self.output.root}: its label maps were made by another model or with other folds, mirroring, "
                    "step or post-processing; --overwrite makes all anew"
                )
            self._results |= known
        if self._request or records:
            # Only what a record names counts, as times of files cannot be trusted; the others are of an older run.
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
        n_done = sum(known.status == CASE_DONE for known in self._results.values())
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

    def _finish(self, image: OpenedImage, written: Future[None]) -> None:
        """Waits until a label map is written; where it can't be, its case does not count as done."""
        try:
            written.result()
        except Exception as error:
            told = describe_fault(error) or first_line(error)
            self._results[image.case] = _failed(image, f"could not be written: {told}")
            self._writing = None
            raise

    def _open(self, item: tuple[str, Sequence[Path | None]]) -> OpenedImage:
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
            return OpenedImage(case=case, files=files, error=error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return OpenedImage(case=case, files=files, error=PredictionError(describe_fault(error)))
        return OpenedImage(case=case, files=files, geometry=geometry, prepared=prepared, warnings=tuple(warnings))

    def _segment(self, image: OpenedImage, scratch: Path | None) -> Segmentation | None:
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

    def _fail(self, image: OpenedImage, error: AutosegError | None) -> None:
        again = "run the same command again with --continue"
        advice = f"then {again}"
        if isinstance(error, FormatError):
            advice = f"mend or replace the image, then {again}"
        elif isinstance(error, ImageTooLargeError):
            advice = f"give more with --max-ram, or cut the image to the part that matters, then {again}"
        self.problems.append(Problem(kind="image cannot be segmented", case=image.case, text=str(error), advice=advice))
        self._results[image.case] = _failed(image, str(error))
        logger.warning("%s: could not be segmented: %s", image.case, error)

    def _write(self, image: OpenedImage, segmentation: Segmentation) -> None:
        assert image.geometry is not None
        self.output.write(image.case, segmentation, image.geometry, like=image.files[0])

    def _note(
        self, image: OpenedImage, segmentation: Segmentation | None, *, seconds: float, number: int, n_cases: int
    ) -> None:
        """Keeps what became of a case, and says it; what went wrong is kept and said already."""
        known = self._results[image.case] if segmentation is None else self._done(image, segmentation)
        result = self._results[image.case] = replace(known, seconds=round(seconds, 3))
        if segmentation is not None:
            left_s = (time.monotonic() - self._started) / number * (n_cases - number)
            time_told = f"; {format_duration(left_s)} left" if number < n_cases else ""
            found, duration = _describe_volumes(result), format_duration(seconds)
            logger.info("%s (%d of %d): %s, %s%s", image.case, number, n_cases, duration, found, time_told)
        if time.monotonic() - self._written_at > RECORD_INTERVAL_S:
            self._write_record()

    def _done(self, image: OpenedImage, segmentation: Segmentation) -> CaseResult:
        """What became of a case that is segmented; where the result is doubtful, that is said."""
        assert image.geometry is not None
        estimate = segmentation.estimated_dice
        is_doubtful = estimate is not None and estimate < (self.predictor.low_dice or 0)
        if is_doubtful:
            text = "%s: the folds agree so little that a Dice of %.2f is to be expected; look at it"
            logger.warning(text, image.case, estimate)
        return CaseResult(
            status=CASE_DONE,
            volumes_ml=measure_volumes(segmentation, image.geometry, self.predictor.plan.labels),
            estimated_dice=None if estimate is None else round(estimate, 4),
            is_doubtful=is_doubtful,
            files=image.file_names,
            label_map=self.output.label_map(image.case).name,
            warnings=image.warnings,
        )

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
