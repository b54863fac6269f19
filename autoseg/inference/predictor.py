"""A trained model in memory: arrays in, label maps out. No files after loading, no processes, no global state."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.core.errors import ImageTooLargeError
from autoseg.core.geometry import Geometry
from autoseg.core.runtime import format_memory, machine_memory_gib, resolve_device, use_granted_cpus
from autoseg.inference.arrays import canonical_image, to_input_axes
from autoseg.inference.empty import air_values, is_air, is_zero
from autoseg.inference.model import Model, digest_model, read_model, warn_of_unfinished
from autoseg.inference.postprocess import apply_steps
from autoseg.inference.quality import Agreement
from autoseg.inference.sliding_window import CompiledNetwork, Place, SlidingWindow, WindowConfig
from autoseg.inference.volumes import LabelMap, SoftMaps, change_along, make_soft_maps, ready_rows, to_scan
from autoseg.networks.outputs import Outputs
from autoseg.planning.mirroring import plan_mirroring
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.preprocessing.occupied import crop_occupied, find_occupied
from autoseg.preprocessing.preprocess import (
    CaseRecord,
    preprocess_image,
    preprocess_label,
    record_case,
    resampling_gib,
)

MAX_AGREEMENT_BYTES = 2**30
"""Sums over tiles that are kept apart by fold, so that their agreement is known, take no more than this."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedImage:
    """An image on the network's grid.

    Attributes:
        image: (C, *record.shape) float32, in the network's axes.
        record: how to get back to the scan.
        occupied: where the scan has content, see `autoseg.preprocessing.occupied.crop_occupied`.
        first: the same image for the first stage of a cascade, whose prediction `image` is to have as its last
            channel; None where it has it, or where there is no first stage.
    """

    image: Tensor
    record: CaseRecord
    occupied: NDArray[np.bool_]
    first: PreparedImage | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Segmentation:
    """What was found in an image.

    Attributes:
        label: (Z, Y, X) canonical, with the label values of the dataset.
        soft: probabilities and uncertainty, where they were asked for.
        estimated_dice: mean Dice to expect, from the agreement of folds; None where the model does not know how they
            are related, NaN where nothing was found.
    """

    label: NDArray[np.unsignedinteger]
    soft: SoftMaps | None
    estimated_dice: float | None = None


class Predictor:
    """Trained folds of one configuration, ready to segment. Safe to use from several threads.

    Attributes:
        plan, configuration: what was trained.
        outputs: what the channels of the networks' output mean.
        folds: that are averaged.
        mirroring: whether mirrored copies are averaged.
        step_fraction: distance of tiles as a fraction of the patch.
        device: that it runs on.
        digest: the sha256 that tells models apart, see `autoseg.inference.model.digest_model`.
        steps: of post-processing, as cross-validation found them to help.
        quality: how the agreement of folds tells the Dice; None where that is not known.

    Example:
        >>> import autoseg
        >>> import numpy as np
        >>> predictor = autoseg.Predictor("work/models/3d_fullres", device="cpu")
        >>> image = np.zeros((1, 13, 32, 36))  # (C, Z, Y, X)
        >>> label_map = predictor.predict(image, spacing_mm=(10.0, 6.0, 6.0))
        >>> label_map.shape
        (13, 32, 36)
    """

    def __init__(
        self,
        model: Path | str | Model,
        *,
        device: str = "auto",
        folds: Sequence[int] | None = None,
        mirroring: bool | None = None,
        step_fraction: float = 0.5,
        max_ram_gib: float | None = None,
        max_vram_gib: float | None = None,
        compile: bool = False,
        postprocess: bool = True,
        n_sharing: int = 1,
    ) -> None:
        """Loads a model.

        Args:
            model: the folder of a trained configuration, such as `autoseg-work/models/3d_fullres`, or a file that
                `autoseg export` has made of one.
            device: "auto", "cpu", "cuda", "cuda:1" or "mps".
            folds: which folds to average; None for all that are trained to their end. Those that are not are used as
                their last checkpoint has them, with a warning, where they are named or where there are no others.
            mirroring: average over mirrored copies, see `plan_mirroring`; None where all folds were trained on
                some.
            step_fraction: distance of tiles as a fraction of the patch.
            max_ram_gib: an image that needs more memory than this is refused; None for what the machine has.
            max_vram_gib: of the GPU's memory, for the sums over tiles; larger ones are kept in the memory of the
                machine. None for half of what is free there.
            compile: `torch.compile` the networks, which takes a minute or more and pays for many images on a GPU; where
                it fails they run as they are.
            postprocess: do the steps that the model brings.
            n_sharing: predictors that share the memory of the device.

        Raises:
            PredictionError: there is no such model, or a fold is not there.
            FormatError, TrainingError: the model's files are damaged.
        """
        model = model if isinstance(model, Model) else read_model(model)
        self.device = resolve_device(device)
        self.plan, self.configuration = model.plan, model.configuration
        self.outputs = Outputs.of(model.plan.labels)
        self.folds = model.choose_folds(folds)
        trained = {fold: model.read_fold(fold) for fold in self.folds}
        warn_of_unfinished(model.path, {fold: known.progress for fold, known in trained.items()})
        networks = [trained[fold].network.to(self.device) for fold in self.folds]
        hashes = {fold: known.sha256 for fold, known in trained.items()}
        self.digest = digest_model(self.plan, hashes, previous=model.previous)
        after = model.read_postprocessing(hashes)
        self.steps = after.steps if after and postprocess else ()
        self.quality = after.quality if after else None
        # As the first stage was trained, not as this one was.
        self._make_first_stage = partial(
            Predictor,
            device=device,
            folds=_folds_of_first_stage(model.previous, folds),
            mirroring=mirroring,
            step_fraction=step_fraction,
            max_ram_gib=max_ram_gib,
            max_vram_gib=max_vram_gib,
            compile=compile,
            postprocess=False,
            n_sharing=n_sharing,
        )
        if mirroring is None:
            mirroring = all(model.source.read_record(fold).mirrored for fold in self.folds)
        self.mirroring, self.step_fraction = mirroring, step_fraction
        self._previous, self._loading = model.previous, threading.Lock()
        self._first: Predictor | None = None
        use_granted_cpus()
        self._max_ram_gib = machine_memory_gib() if max_ram_gib is None else max_ram_gib
        self._window = SlidingWindow(
            [CompiledNetwork(network) for network in networks] if compile else networks,
            window_config(self.plan, self.configuration, mirroring=mirroring, step_fraction=step_fraction),
            n_outputs=self.outputs.n,
            empty_logits=self.outputs.empty_logits,
            device=self.device,
            max_device_bytes=(_device_bytes(self.device) if max_vram_gib is None else max_vram_gib * 2**30) / n_sharing,
        )

    @property
    def _first_stage(self) -> Predictor | None:
        """That of a cascade, with all of its folds; loaded when it is first needed."""
        if self._previous is None:
            return None
        with self._loading:
            if self._first is None:
                self._first = self._make_first_stage(self._previous)
            return self._first

    @property
    def name(self) -> str:
        """Of the configuration."""
        return self.configuration.name

    @property
    def low_dice(self) -> float | None:
        """Estimates below this are doubtful; None where there are none."""
        return self.quality.low_dice if self.quality is not None else None

    def predict(
        self, image: NDArray, *, spacing_mm: Sequence[float], affine: NDArray | None = None
    ) -> NDArray[np.unsignedinteger]:
        """Segments one image.

        Args:
            image: (C, Z, Y, X) or, with one channel, (Z, Y, X); any real type; finite.
            spacing_mm: (Z, Y, X).
            affine: 4x4 from the indices (x, y, z) of the array to RAS+ millimetres, where its axes are not canonical
                (x to the right, y to the front, z to the top).

        Returns:
            (Z, Y, X) in the orientation of the input, with the label values of the dataset, uint8 or uint16.

        Raises:
            PredictionError: wrong number of axes or channels, NaN or infinity, or a spacing that is not positive.
        """
        canonical, geometry = canonical_image(image, self.plan.channels, spacing_mm=spacing_mm, affine=affine)
        return to_input_axes(self.predict_canonical(canonical, geometry), geometry)

    def predict_canonical(self, image: NDArray[np.float32], geometry: Geometry) -> NDArray[np.unsignedinteger]:
        """Segments an image that is already in canonical orientation.

        Args:
            image: (C, Z, Y, X) float32, finite; not changed.
            geometry: of the image.

        Returns:
            (Z, Y, X) canonical, with the label values of the dataset.
        """
        return self.segment(self.prepare(image, geometry)).label

    def prepare(self, image: NDArray[np.float32], geometry: Geometry) -> PreparedImage:
        """Brings an image to the network's grid; needs no network, so it can be done while another is segmented.

        Args:
            image: (C, Z, Y, X) float32 canonical, finite; not changed.
            geometry: of the image.

        Raises:
            ImageTooLargeError: it becomes too many voxels.
        """
        first = self._first_stage
        occupied = find_occupied(image)
        record = record_case(occupied, geometry, self.plan, self.configuration.name)
        self.check_memory(image.nbytes / 2**30 + resampling_gib(record.shape, self.plan))
        return PreparedImage(
            image=preprocess_image(image, record, self.plan),
            record=record,
            occupied=crop_occupied(occupied, record),
            first=None if first is None else first.prepare(image, geometry),
        )

    def with_first_stage(self, prepared: PreparedImage) -> PreparedImage:
        """An image with what the first stage of a cascade finds in it; any other as it is.

        Raises:
            PredictionError: the device or the machine has not enough memory.
        """
        if prepared.first is None:
            return prepared
        assert self._first_stage is not None
        label = self._first_stage.segment(prepared.first).label
        classes = preprocess_label(self.plan.labels.values_to_classes(label), prepared.record)
        found = classes.unsqueeze(0).to(prepared.image.dtype)
        return replace(prepared, image=torch.cat([prepared.image, found]), first=None)

    def segment(
        self,
        prepared: PreparedImage,
        *,
        probabilities: bool = False,
        uncertainty: bool = False,
        scratch: Path | None = None,
    ) -> Segmentation:
        """Segments an image that is on the network's grid already.

        Args:
            prepared: from `prepare`, or from the store.
            probabilities: make a map of the probability of each class, or region.
            uncertainty: make maps of the entropy and of the disagreement between folds.
            scratch: a folder for a file of the probabilities, which are as many volumes as there are classes; None
                keeps them in memory.

        Raises:
            PredictionError: the device or the machine has not enough memory.
        """
        prepared = self.with_first_stage(prepared)
        record = prepared.record
        axis = self.choose_axis(prepared)
        agreement = self.make_agreement(prepared, axis=axis)
        separate = uncertainty or agreement is not None
        self.check_memory(self.needed_gib(prepared, axis=axis, separate=separate))
        labels = LabelMap(record, axis=axis, outputs=self.outputs)
        soft = make_soft_maps(
            record,
            axis=axis,
            outputs=self.outputs,
            probabilities=probabilities,
            uncertainty=uncertainty,
            scratch=scratch,
        )
        change, n_networks = change_along(record, axis), len(self.folds) if separate else 1
        swept = self.sweep(prepared, axis=axis, separate=separate, agreement=agreement)
        for rows, logits, first_row in ready_rows(swept, change):
            mean = logits.unflatten(0, (-1, self.outputs.n)).mean(dim=0) if separate else logits
            labels.add(rows, mean, first_row)
            if soft is not None:
                for part, values in to_scan(logits, change, rows, first_row=first_row, n_networks=n_networks):
                    soft.add(part, [values])
            del logits, mean
        label = self.plan.labels.classes_to_values(labels.whole())
        return Segmentation(
            label=apply_steps(label, self.steps, voxel_ml=record.geometry.voxel_volume_ml),
            soft=soft,
            estimated_dice=self.estimate_dice(agreement),
        )

    def choose_axis(self, prepared: PreparedImage) -> int:
        """The axis along which tiles should advance for the least memory."""
        return self._window.choose_axis(prepared.record.shape)

    def make_agreement(self, prepared: PreparedImage, *, axis: int) -> Agreement | None:
        """What counts how the folds agree; None where that tells nothing, or takes too much memory."""
        n_folds = len(self.folds)
        if self.quality is None or n_folds < 2:
            return None
        if self._window.sums_bytes(prepared.record.shape, axis=axis, n_groups=n_folds) > MAX_AGREEMENT_BYTES:
            return None
        return Agreement(n_folds, self.outputs)

    def estimate_dice(self, agreement: Agreement | None) -> float | None:
        """The mean Dice to expect where the folds agree like this; NaN where none of them finds anything."""
        if agreement is None or self.quality is None:
            return None
        return math.nan if agreement.is_of_nothing else self.quality.estimate(agreement.value)

    def sweep(
        self, prepared: PreparedImage, *, axis: int, separate: bool, agreement: Agreement | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the network's grid and their logits, see `SlidingWindow.sweep`.

        Args:
            prepared: the image.
            axis: along which the tiles advance.
            separate: keep the folds apart.
            agreement: counts how they agree, where they are kept apart.
        """
        air = air_values(self.plan)

        def is_empty(place: Place) -> bool:
            if is_zero(prepared.occupied, prepared.record.shape, place):
                return True
            return air is not None and is_air(prepared.image, place, air)

        for rows, logits in self._window.sweep(prepared.image, axis=axis, separate=separate, is_empty=is_empty):
            if agreement is not None:
                agreement.add(logits)
            yield rows, logits
            # Not kept until the next rows are complete: they can be gigabytes.
            del logits

    def needed_gib(self, prepared: PreparedImage, *, axis: int, separate: bool) -> float:
        """Memory that segmenting an image takes: the image on both grids, the sums over tiles and what is made of
        them at a time, the label map.
        """
        record, n_channels = prepared.record, len(self.plan.channels)
        voxels, native = math.prod(record.shape), math.prod(record.geometry.shape)
        sums = self._window.sums_bytes(record.shape, axis=axis, n_groups=len(self.folds) if separate else 1)
        return (4 * n_channels * (voxels + native) + 1.3 * sums + 3 * native) / 2**30

    def check_memory(self, needed_gib: float) -> None:
        """Refuses what does not fit.

        Raises:
            ImageTooLargeError: more is needed than may be taken.
        """
        if needed_gib > self._max_ram_gib:
            may_be = format_memory(self._max_ram_gib)
            raise ImageTooLargeError(
                f"needs about {format_memory(needed_gib)} of memory, more than the {may_be} it may take"
            )


def _folds_of_first_stage(previous: Model | None, folds: Sequence[int] | None) -> list[int] | None:
    """Those that a user names, as far as the first stage has them; None for all."""
    if previous is None or folds is None:
        return None
    return [fold for fold in folds if fold in previous.finished] or None


def _device_bytes(device: torch.device) -> float:
    """Half of what is free on a GPU; the rest is for the networks' activations."""
    if device.type != "cuda":
        return math.inf
    # What torch keeps for later counts as taken.
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0] / 2


def window_config(
    plan: Plan, configuration: ConfigurationPlan, *, mirroring: bool = True, step_fraction: float = 0.5
) -> WindowConfig:
    """How volumes are covered by the patches of a configuration."""
    mirrored = plan_mirroring(plan, configuration)
    return WindowConfig(
        patch_size=configuration.patch_size,
        step_fraction=step_fraction,
        mirror_axes=mirrored.axes if mirroring else (),
        side_axis=mirrored.side_axis,
        opposite=mirrored.opposite_outputs,
        opposite_previous=mirrored.opposite if configuration.previous is not None else (),
    )
