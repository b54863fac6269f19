"""A trained model in memory: arrays in, label maps out. No files after loading, no processes, no global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from autoseg.core.errors import FormatError, PredictionError
from autoseg.core.geometry import Geometry, from_canonical, make_geometry, to_canonical
from autoseg.core.runtime import resolve_device
from autoseg.core.serialize import read_json
from autoseg.inference.sliding_window import WindowConfig, predict_logits
from autoseg.networks.build import build_network
from autoseg.planning.mirroring import plan_mirroring
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.preprocessing.preprocess import CaseRecord, preprocess_image, record_case, restore_classes
from autoseg.training.checkpoint import load_weights
from autoseg.training.record import FoldFiles, TrainingRecord


class Predictor:
    """Trained folds of one configuration, ready to segment. Safe to use from several threads.

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
        model: Path | str,
        *,
        device: str = "auto",
        folds: Sequence[int] | None = None,
        mirroring: bool | None = None,
        step_fraction: float = 0.5,
    ) -> None:
        """Loads a model.

        Args:
            model: the folder of a trained configuration, such as `autoseg-work/models/3d_fullres`.
            device: "auto", "cpu", "cuda", "cuda:1" or "mps".
            folds: which folds to average; None for all that are trained.
            mirroring: average over mirrored copies along all axes; None where all folds were trained on mirrored ones.
            step_fraction: distance of tiles as a fraction of the patch.

        Raises:
            PredictionError: there is no such model, or a fold is not trained.
            FormatError, TrainingError: the model's files are damaged.
        """
        folder = Path(model)
        self.device = resolve_device(device)
        self.plan, self.configuration = _read_model(folder)
        trained = trained_folds(folder)
        self.folds = trained if folds is None else tuple(folds)
        missing = sorted(set(self.folds) - set(trained))
        if missing or not self.folds:
            found = f"the trained folds {_join(trained)}" if trained else "no trained fold"
            expected = f", expected also {_join(missing)}" if missing else ""
            raise PredictionError(f"{folder}: found {found}{expected}; run 'autoseg train' first")
        self._networks = [
            _load_network(folder, fold, self.plan, self.configuration).to(self.device) for fold in self.folds
        ]
        if mirroring is None:
            mirroring = all(_read_record(folder, fold).mirrored for fold in self.folds)
        self.mirroring = mirroring
        self._window = window_config(self.plan, self.configuration, mirroring=mirroring, step_fraction=step_fraction)

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
        array = np.asarray(image)
        array = array[None] if array.ndim == 3 else array
        if array.ndim != 4 or array.shape[0] != len(self.plan.channels) or 0 in array.shape:
            expected = f"({len(self.plan.channels)}, Z, Y, X) with the channels {', '.join(self.plan.channels)}"
            raise PredictionError(f"found an image of shape {np.shape(image)}, expected {expected}")
        spacing = tuple(float(value) for value in spacing_mm)
        if len(spacing) != 3 or not all(np.isfinite(spacing)) or min(spacing) <= 0:
            raise PredictionError(f"found the spacing {spacing} mm, expected three positive numbers (z, y, x)")
        if array.dtype.kind not in "biuf":
            raise PredictionError(f"found voxels of type {array.dtype}, expected real numbers")
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise PredictionError("found voxels that are NaN or infinite, expected finite numbers")
        matrix = np.diag([*spacing[::-1], 1.0]) if affine is None else np.asarray(affine, np.float64)
        try:
            geometry = make_geometry(array.shape[:0:-1], matrix, header_spacing_mm=spacing[::-1])
        except FormatError as error:
            raise PredictionError(str(error)) from error
        lengths = np.linalg.norm(matrix[:3, :3], axis=0)[::-1]
        if not np.allclose(lengths, spacing, rtol=1e-3):
            raise PredictionError(
                f"found the spacing {spacing} mm, expected {tuple(lengths.tolist())} mm as the affine has it"
            )
        # The array is (Z, Y, X), a file would be (X, Y, Z).
        canonical = np.ascontiguousarray(to_canonical(array.transpose(0, 3, 2, 1), geometry.file_axcodes))
        label = self.predict_canonical(canonical, geometry)
        return np.ascontiguousarray(from_canonical(label, geometry.file_axcodes).transpose(2, 1, 0))

    def predict_canonical(self, image: NDArray[np.float32], geometry: Geometry) -> NDArray[np.unsignedinteger]:
        """Segments an image that is already in canonical orientation.

        Args:
            image: (C, Z, Y, X) float32, finite; not changed.
            geometry: of the image.

        Returns:
            (Z, Y, X) canonical, with the label values of the dataset.
        """
        record = record_case(image, geometry, self.plan, self.configuration.name)
        return self.predict_preprocessed(preprocess_image(image, record, self.plan), record)

    def predict_preprocessed(self, image: Tensor, record: CaseRecord) -> NDArray[np.unsignedinteger]:
        """Segments an image that is on the network's grid already.

        Args:
            image: (C, *record.shape) float32 in the network's axes.
            record: how to get back to the scan.

        Returns:
            (Z, Y, X) canonical, with the label values of the dataset.
        """
        n_classes = self.plan.labels.n_classes
        logits = predict_logits(image.to(self.device), self._networks, n_classes=n_classes, config=self._window)
        return self.plan.labels.classes_to_values(restore_classes(logits, record))


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
        opposite=mirrored.opposite,
    )


def fold_folder(model: Path, fold: int) -> Path:
    """Where a fold of a model is kept."""
    return model / f"fold_{fold}"


def trained_folds(model: Path) -> tuple[int, ...]:
    """Folds of a model that have final weights, in order."""
    folds = (path.parent.name.removeprefix("fold_") for path in model.glob("fold_*/weights.safetensors"))
    return tuple(sorted(int(fold) for fold in folds if fold.isdigit()))


def _join(folds: Sequence[int]) -> str:
    return ", ".join(map(str, folds))


def _read_model(folder: Path) -> tuple[Plan, ConfigurationPlan]:
    file = folder / "plan.json"
    if not file.is_file():
        raise PredictionError(f"{folder}: found no plan.json, expected the folder of a trained configuration")
    # The plan in a model's folder recommends the configuration that was trained there.
    plan: Plan = read_json(file, Plan)
    return plan, plan.configuration(plan.recommended)


def _read_record(folder: Path, fold: int) -> TrainingRecord:
    record: TrainingRecord = read_json(FoldFiles(folder=fold_folder(folder, fold)).training, TrainingRecord)
    return record


def _load_network(folder: Path, fold: int, plan: Plan, configuration: ConfigurationPlan) -> nn.Module:
    n_channels, n_classes = len(plan.channels), plan.labels.n_classes
    network = build_network(configuration.network, n_channels=n_channels, n_classes=n_classes)
    load_weights(FoldFiles(folder=fold_folder(folder, fold)).weights, network)
    return network.eval()
