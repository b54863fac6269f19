"""A trained model on disk: the folder that training makes, or the one file that is given to others.

Both hold the plan, and for each fold how it was trained and its weights. A fold whose training has not come to its end
has the weights of its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autoseg import __version__
from autoseg.core.errors import FormatError, PredictionError, TrainingError
from autoseg.core.serialize import encode_json, read_json
from autoseg.core.versions import refuse_newer
from autoseg.inference.archive import (
    FORMAT,
    FORMAT_VERSION,
    POSTPROCESSING,
    SUFFIX,
    Manifest,
    Member,
    read_archive,
    training_member,
    weights_member,
    write_archive,
)
from autoseg.inference.sources import FileSource, FolderSource, FoldWeights, Postprocessing, Source
from autoseg.networks.build import build_trainable
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.training.checkpoint import Progress, load_into
from autoseg.training.folds import PLAN, trained_folds, unfinished_folds, usable_folds

logger = logging.getLogger(__name__)

PROVENANCE_SHOWN = ("autoseg", "fingerprint", "like", "decisions")
"""What of a plan's provenance goes with a model: versions, digests and the name of a plan."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedFold:
    """One fold in memory.

    Attributes:
        network: with its weights, in evaluation mode, on the CPU.
        sha256: of the weights as a safetensors file.
        progress: as in `FoldWeights`.
    """

    network: nn.Module
    sha256: str
    progress: Progress | None


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trained configuration on disk. Folds are read when they are asked for.

    Attributes:
        path: the folder or file.
        plan: recommends the configuration that was trained.
        finished: folds that are trained to their end, in order.
        unfinished: folds that have a checkpoint only, in order.
        source: reads the folds.
        previous: the first stage of a cascade; None for a model that is one by itself.
    """

    path: Path
    plan: Plan
    finished: tuple[int, ...]
    unfinished: tuple[int, ...]
    source: Source
    previous: Model | None = None

    @property
    def configuration(self) -> ConfigurationPlan:
        """What was trained."""
        return self.plan.configuration(self.plan.recommended)

    def choose_folds(self, folds: Sequence[int] | None = None) -> tuple[int, ...]:
        """The folds to use where a user names some or none.

        Args:
            folds: those named; None for all that are trained to their end, or if none is, for all with a checkpoint.

        Raises:
            PredictionError: the model does not have them, or has none.
        """
        chosen = (self.finished or self.unfinished) if folds is None else tuple(folds)
        missing = sorted(set(chosen) - {*self.finished, *self.unfinished})
        if missing or not chosen:
            kinds = {"trained": self.finished, "unfinished": self.unfinished}
            known = " and ".join(f"the {kind} folds {_join(has)}" for kind, has in kinds.items() if has)
            expected = f", expected also {_join(missing)}" if missing else ""
            raise PredictionError(f"{self.path}: found {known or 'no trained fold'}{expected}; {self.source.advice}")
        return chosen

    def read_fold(self, fold: int) -> TrainedFold:
        """Reads a fold and builds its network.

        Raises:
            FormatError, TrainingError: the fold is missing or damaged, or is of another network.
        """
        weights = self.source.read_weights(fold)
        return TrainedFold(network=self.build(fold, weights), sha256=weights.sha256, progress=weights.progress)

    def read_postprocessing(self, weights: Mapping[int, str]) -> Postprocessing | None:
        """What is to be done after the network; None where that is not known.

        Args:
            weights: the sha256 of each fold that is used.

        Raises:
            FormatError: the file is damaged.
        """
        known = self.source.read_postprocessing()
        if known is None or weights.items() <= known.weights.items():
            return known
        logger.warning(
            "%s: its post-processing was decided for other weights and is left out; run 'autoseg select'", self.path
        )
        return None

    def build(self, fold: int, weights: FoldWeights) -> nn.Module:
        """The network of a fold, in evaluation mode, on the CPU.

        Raises:
            TrainingError: the weights are damaged, or of another network.
        """
        tensors = self._parse(fold, weights)
        self._check_size(tensors)
        network = build_trainable(self.plan, self.configuration)
        load_into(network, tensors, self.path)
        return network.eval()

    def _check_size(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuses a plan whose network is larger than its weights, before any memory is taken for it.

        Raises:
            TrainingError: the weights are of another network.
        """
        most = sum(tensor.numel() for tensor in tensors.values())
        try:
            with torch.device("meta"):
                known = build_trainable(self.plan, self.configuration).state_dict()
            is_larger = sum(tensor.numel() for tensor in known.values()) > most
        except (RuntimeError, OverflowError, TypeError):  # numbers beyond what any tensor may have
            is_larger = True
        if is_larger:
            raise TrainingError(
                f"{self.path}: the weights are of another network; was the plan changed after training? Train again."
            )

    def _parse(self, fold: int, weights: FoldWeights) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(weights.data)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise TrainingError(
                f"{self.path}: the weights of fold {fold} are damaged ({error}); delete them and train again, or copy "
                "the model again"
            ) from error

    def digest(self, folds: Sequence[int] | None = None) -> str:
        """What tells models apart, see `digest_model`; equal for a folder and a file made from it.

        Args:
            folds: as in `choose_folds`.
        """
        hashes = {fold: self.source.hash_weights(fold) for fold in self.choose_folds(folds)}
        return digest_model(self.plan, hashes, previous=self.previous)


def digest_model(plan: Plan, weights: Mapping[int, str], *, previous: Model | None = None) -> str:
    """The sha256 of the list of hashes, as `sha256sum` prints it, of the plan and the weights in a one-file model.

    Args:
        plan: of the model.
        weights: the sha256 of each fold's weights.
        previous: the first stage of a cascade, whose digest then counts too.
    """
    hashes = {PLAN: hashlib.sha256(encode_json(_plan_to_give(plan))).hexdigest()}
    hashes |= {weights_member(fold): weights[fold] for fold in sorted(weights)}
    if previous is not None:
        hashes["previous"] = previous.digest()
    return hashlib.sha256("".join(f"{value}  {name}\n" for name, value in hashes.items()).encode()).hexdigest()


def warn_of_unfinished(path: Path, folds: Mapping[int, Progress | None]) -> None:
    """Says which of the folds that are used are not trained to their end, if any."""
    found = [
        f"fold {fold} at step {progress.step} (epoch {progress.epoch})"
        for fold, progress in sorted(folds.items())
        if progress is not None
    ]
    if found:
        logger.warning("%s: not trained to the end, so its last checkpoint is used: %s", path, ", ".join(found))


def read_model(path: Path | str) -> Model:
    """Opens a trained model; its folds are read later.

    Args:
        path: the folder of a trained configuration, such as `autoseg-work/models/3d_fullres`, or a `.autoseg` file.

    Raises:
        PredictionError: there is no model.
        FormatError, PlanError: it is damaged, or made by another version of autoseg.
    """
    path = Path(path)
    return _read_file(path) if path.is_file() else _read_folder(path)


def _read_folder(folder: Path) -> Model:
    refuse_newer(folder)
    file = folder / PLAN
    if not file.is_file():
        expected = f"the folder of a trained configuration or a {SUFFIX} file"
        raise PredictionError(f"{folder}: found no {PLAN}, expected {expected}")
    plan: Plan = read_json(file, Plan)
    # What only a work folder has, see `autoseg.pipeline.workspace`.
    if (folder / "splits.json").is_file():
        expected = f"the folder of a trained configuration, such as {folder / 'models' / plan.recommended}"
        raise PredictionError(f"{folder}: is a work folder, expected {expected}; to use all of it, name it with -w")
    first = plan.configuration(plan.recommended).previous
    return Model(
        path=folder,
        plan=plan,
        finished=trained_folds(folder),
        unfinished=unfinished_folds(folder),
        source=FolderSource(folder),
        previous=None if first is None else _read_first_stage(folder, first),
    )


def _read_first_stage(folder: Path, name: str) -> Model:
    """The model whose predictions a cascade refines, which lies beside it."""
    first = folder.parent / name
    if not usable_folds(first):
        raise PredictionError(
            f"{folder}: is the second stage of a cascade, and {first} is not trained; run 'autoseg train -c {name}', "
            "or copy both folders together"
        )
    return _read_folder(first)


def _read_file(path: Path) -> Model:
    archive = read_archive(path)
    plan = archive.read_json(PLAN, Plan)
    folds = archive.manifest.folds
    if archive.manifest.configuration != plan.recommended:
        found = f"{archive.manifest.configuration} and {plan.recommended}"
        raise FormatError(f"{path}: is not an autoseg model (its manifest and its plan are of {found})")
    return Model(
        path=path,
        plan=plan,
        finished=tuple(sorted(fold for fold, progress in folds.items() if progress is None)),
        unfinished=tuple(sorted(fold for fold, progress in folds.items() if progress is not None)),
        source=FileSource(archive),
    )


def export_model(model: Model, target: Path, *, folds: Sequence[int] | None = None) -> None:
    """Writes a model into one file, without cases, images, or paths of this machine. Equal models give equal bytes.

    Args:
        model: from `read_model`.
        target: the file; its name ends in `.autoseg`. An older one is replaced.
        folds: which; None for all that are trained to their end. Others are exported from their last checkpoint.

    Raises:
        FormatError: the name does not end so, or what the model holds is damaged.
        PredictionError: the model has no such fold.
        TrainingError: the weights are damaged, or of another network.
    """
    if target.suffix != SUFFIX or target.is_dir():
        raise FormatError(f"{target}: expected the name of a file that ends in {SUFFIX}")
    if model.previous is not None:
        raise FormatError(
            f"{model.path}: is a cascade, which does not go into one file yet; copy its folder and that of "
            f"{model.previous.configuration.name} side by side"
        )
    chosen = sorted(set(model.choose_folds(folds)))
    if folds is None and not model.finished:
        raise PredictionError(
            f"{model.path}: no fold is trained to its end; name those whose last checkpoint is to be exported: "
            f"{_join(chosen)}"
        )
    plan = _plan_to_give(model.plan)
    reached: dict[int, Progress | None] = {}
    hashes: dict[int, str] = {}

    def members() -> Iterator[tuple[str, bytes]]:
        yield PLAN, encode_json(plan)
        for fold in chosen:
            weights = model.source.read_weights(fold)
            # What cannot be loaded here cannot be loaded by whoever gets the file.
            model.build(fold, weights)
            reached[fold] = weights.progress
            yield training_member(fold), encode_json(model.source.read_record(fold))
            yield weights_member(fold), weights.data
            hashes[fold] = weights.sha256
        after = model.read_postprocessing(hashes)
        if after is not None:
            yield POSTPROCESSING, encode_json(dataclasses.replace(after, weights=hashes))

    def describe(listed: dict[str, Member]) -> Manifest:
        return Manifest(
            format=FORMAT,
            version=FORMAT_VERSION,
            autoseg=__version__,
            dataset=plan.dataset,
            configuration=plan.recommended,
            folds=reached,
            members=listed,
        )

    write_archive(target, members(), describe)
    warn_of_unfinished(model.path, reached)


def _plan_to_give(plan: Plan) -> Plan:
    """The plan with nothing but what is known to be harmless in its provenance."""
    provenance = {key: plan.provenance[key] for key in PROVENANCE_SHOWN if key in plan.provenance}
    return dataclasses.replace(plan, provenance=provenance)


def _join(folds: Sequence[int]) -> str:
    return ", ".join(map(str, folds))
