"""Where the folds of a model are read from: the folder that training makes, or a file."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from autoseg.core.errors import FormatError
from autoseg.core.serialize import from_plain, read_json
from autoseg.core.steps import Step
from autoseg.inference.archive import POSTPROCESSING, Archive, training_member, weights_member
from autoseg.inference.quality import QualityModel
from autoseg.training.checkpoint import Progress, format_weights, parse_weights, read_network
from autoseg.training.record import FoldFiles, FoldRecord


@dataclass(frozen=True, kw_only=True)
class Postprocessing:
    """What is to be done after the network, as cross-validation found it to help, for `postprocessing.json`.

    Attributes:
        weights: the sha256 of each fold's weights that this was found with; it tells nothing about others.
        steps: in order.
        quality: how the agreement of folds tells the Dice; None where that is not known.
    """

    weights: dict[int, str]
    steps: tuple[Step, ...]
    quality: QualityModel | None


@dataclass(frozen=True, kw_only=True)
class FoldWeights:
    """The weights of one fold.

    Attributes:
        data: a safetensors file.
        progress: how far the training had come; None for one that has come to its end.
    """

    data: bytes
    progress: Progress | None

    @property
    def sha256(self) -> str:
        """Of the data, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()


class Source(Protocol):
    """Where the folds of a model are read from."""

    advice: str
    """What to do where a fold is missing."""

    def read_record(self, fold: int) -> FoldRecord:
        """How a fold was trained."""

    def read_weights(self, fold: int) -> FoldWeights:
        """The weights of a fold, whole in memory."""

    def hash_weights(self, fold: int) -> str:
        """The sha256 of a fold's weights."""

    def read_postprocessing(self) -> Postprocessing | None:
        """What was found to help; None where that was not looked for."""


class FolderSource:
    """The folder that training makes. What is being trained meanwhile is whole, be it older or newer."""

    advice = "run 'autoseg train' first"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _files(self, fold: int) -> FoldFiles:
        return FoldFiles.of(self._folder, fold)

    def read_record(self, fold: int) -> FoldRecord:
        file = self._files(fold).training
        content = read_json(file, dict[str, Any])
        kept = {field.name for field in dataclasses.fields(FoldRecord)}
        try:
            return from_plain(FoldRecord, {key: value for key, value in content.items() if key in kept})
        except FormatError as error:
            raise FormatError(f"{file}: {error}") from error

    def read_weights(self, fold: int) -> FoldWeights:
        files = self._files(fold)
        try:
            data = files.weights.read_bytes()
        except FileNotFoundError:
            tensors, progress = read_network(files.checkpoint)
            return FoldWeights(data=format_weights(tensors), progress=progress)
        parse_weights(data, files.weights)
        return FoldWeights(data=data, progress=None)

    def hash_weights(self, fold: int) -> str:
        return self.read_weights(fold).sha256

    def read_postprocessing(self) -> Postprocessing | None:
        file = self._folder / POSTPROCESSING
        if not file.is_file():
            return None
        content: Postprocessing = read_json(file, Postprocessing)
        return content


class FileSource:
    """A one-file model."""

    advice = "the file was exported without; export it again with them"

    def __init__(self, archive: Archive) -> None:
        self._archive = archive

    def read_record(self, fold: int) -> FoldRecord:
        return self._archive.read_json(training_member(fold), FoldRecord)

    def read_weights(self, fold: int) -> FoldWeights:
        data = self._archive.read(weights_member(fold))
        return FoldWeights(data=data, progress=self._archive.manifest.folds[fold])

    def hash_weights(self, fold: int) -> str:
        return self._archive.manifest.members[weights_member(fold)].sha256

    def read_postprocessing(self) -> Postprocessing | None:
        if POSTPROCESSING not in self._archive.manifest.members:
            return None
        return self._archive.read_json(POSTPROCESSING, Postprocessing)
