"""What a prediction leaves beside its label maps, in `prediction.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from autoseg.core.errors import FormatError
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import read_json
from autoseg.core.steps import Step

CASE_DONE, CASE_FAILED = "done", "failed"


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """What became of one image.

    Attributes:
        status: "done" or "failed".
        seconds: that it took; reading, preprocessing and writing go on beside the case before and after.
        volumes_ml: of each label.
        estimated_dice: mean Dice to expect, from how the folds agree; None where that is not known.
        is_doubtful: whether that is low for this model: a person should look at the label map.
        files: the image, absolute paths.
        label_map: name of the file, in the folder of the record.
        warnings: how the image differs from those of the training.
        error: why there is no label map.
    """

    status: str
    seconds: float = 0.0
    volumes_ml: dict[str, float] = field(default_factory=dict)
    estimated_dice: float | None = None
    is_doubtful: bool = False
    files: tuple[str, ...] = ()
    label_map: str | None = None
    warnings: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class PredictionRecord:
    """What was run with what on what, for `prediction.json` in the folder of the label maps.

    Attributes:
        autoseg, torch, python: versions.
        dataset: the model was trained on.
        configuration: of the model; several of an ensemble.
        model: the sha256 that tells models apart, see `autoseg.inference.model.digest_model`.
        folds: that were averaged.
        mirrored: whether mirrored copies were averaged.
        step_fraction: distance of tiles as a fraction of the patch.
        device: that it ran on.
        precision: of the network's arithmetic.
        labels: names and values in the label maps.
        postprocessing: steps that were done after the network.
        started: date and time, UTC.
        seconds: in all.
        peak_memory_gib: of the process.
        peak_gpu_memory_gib: None without a GPU.
        cases: what became of each; a label map is whole where it says "done".
        request: the same for all calls that go on with each other's work; empty for a single call.
    """

    autoseg: str
    torch: str
    python: str
    dataset: str
    configuration: str
    model: str
    folds: tuple[int, ...]
    mirrored: bool
    step_fraction: float
    device: str
    precision: str
    labels: LabelSpec
    postprocessing: tuple[Step, ...]
    started: str
    seconds: float
    peak_memory_gib: float
    peak_gpu_memory_gib: float | None
    cases: dict[str, CaseResult]
    request: str = ""

    @property
    def settings(self) -> tuple[object, ...]:
        """What label maps depend on, so that those of two runs can stand in one folder."""
        return self.model, self.folds, self.mirrored, self.step_fraction, self.postprocessing


def record_file(folder: Path, part: tuple[int, int]) -> Path:
    """Where the record of a part of the images is, such as (2, 8); of (1, 1) that of all."""
    return folder / ("prediction.json" if part == (1, 1) else f"prediction.part-{part[0]}-of-{part[1]}.json")


def has_records(folder: Path) -> bool:
    """Whether a prediction was ever run into a folder."""
    return any(file.is_file() for file in _record_files(folder))


def read_records(folder: Path, *, request: str = "") -> list[PredictionRecord]:
    """What was run on the images of a folder of label maps, the last run at the end: one record, or one per part.

    Each has the cases that no later run has taken up; one that has none of them left is not told.

    Args:
        folder: of the label maps.
        request: only runs with this one count; empty for all.

    Raises:
        FormatError: one cannot be read, or names a case that leads to another folder.
    """
    files = [file for file in _record_files(folder) if file.is_file()]
    found: list[PredictionRecord] = [read_json(file, PredictionRecord) for file in files]
    records = [record for record in found if not request or record.request == request]
    records.sort(key=lambda record: record.started)
    last = {case: number for number, record in enumerate(records) for case in record.cases}
    if odd := sorted(case for case in last if Path(case).name != case):
        raise FormatError(f"{folder}: the case {odd[0]!r} leads to another folder")
    current = []
    for number, record in enumerate(records):
        cases = {case: known for case, known in record.cases.items() if last[case] == number}
        if cases:
            current.append(replace(record, cases=cases))
    # A run that was stopped before its first image tells what it was to do, where there is no other.
    return current or records[-1:]


def _record_files(folder: Path) -> list[Path]:
    return [record_file(folder, (1, 1)), *folder.glob("prediction.part-*-of-*.json")]


def labels_of(records: Sequence[PredictionRecord], folder: Path) -> LabelSpec:
    """The labels of all label maps in a folder.

    Raises:
        FormatError: they are of models with different labels.
    """
    if any(record.labels != records[0].labels for record in records):
        raise FormatError(
            f"{folder}: its label maps are of models with different labels; predict all anew, into a new folder"
        )
    return records[0].labels
