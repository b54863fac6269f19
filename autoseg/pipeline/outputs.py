"""The files that a segmented image becomes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.core.labels import LabelSpec, mask_of
from autoseg.core.leftovers import temporary_path
from autoseg.data.io import output_ending, write_volume
from autoseg.data.raw import in_pieces

if TYPE_CHECKING:
    from autoseg.core.geometry import Geometry
    from autoseg.inference.predictor import Segmentation


@dataclass(frozen=True, kw_only=True)
class OutputFolder:
    """Where label maps go, and what is written besides.

    Attributes:
        root: the folder.
        labels: what is segmented.
        endings: of the label maps, by case.
        probabilities: write a map of each label's probability, too.
        uncertainty: write the entropy and the disagreement of the folds, too.
    """

    root: Path
    labels: LabelSpec
    endings: Mapping[str, str]
    probabilities: bool
    uncertainty: bool

    def label_map(self, case: str) -> Path:
        """The file of a case, in the format of its image where that can hold one."""
        return self.root / f"{case}{self.endings[case]}"

    @contextmanager
    def scratch(self) -> Iterator[Path | None]:
        """A folder for probabilities, which are as many volumes as there are labels; None where none are kept."""
        if not self.probabilities:
            yield None
            return
        # Of a name by which it is removed should this process be killed.
        folder = temporary_path(self.root / "probabilities")
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def write(self, case: str, segmentation: Segmentation, geometry: Geometry, *, like: Path) -> None:
        """Writes what there is of a case, its label map last: who finds one finds everything.

        Args:
            case: its name.
            segmentation: on the grid of the image.
            geometry: of the image.
            like: the image, whose place in space the files have to the last bit.
        """
        soft, labels = segmentation.soft, self.labels
        names = _file_names(labels.structures)
        if soft is not None and self.probabilities:
            written = [region.written for region in labels.regions] or labels.values
            for index, (name, value) in enumerate(zip(labels.structures, written, strict=True)):
                path = self.root / "probabilities" / case / f"{value}_{names[name]}.nii.gz"
                # The first of exclusive classes is the background.
                channel = index if labels.regions else index + 1
                write_volume(path, soft.probability(channel), geometry, like=like, scale=1 / 255)
        if soft is not None and self.uncertainty:
            folder = self.root / "uncertainty" / case
            write_volume(folder / "entropy.nii.gz", soft.entropy(), geometry, like=like, scale=1 / 255)
            write_volume(folder / "disagreement.nii.gz", soft.disagreement(), geometry, like=like, scale=1 / 255)
        if labels.one_file_each:
            for name, values in labels.structure_values.items():
                path = self.root / "structures" / case / f"{names[name]}{self.endings[case]}"
                write_volume(path, mask_of(segmentation.label, values).astype("uint8"), geometry, like=like)
        write_volume(self.label_map(case), segmentation.label, geometry, like=like)


def ending_of(image: Path, labels: LabelSpec) -> str:
    """The ending of the label map of an image."""
    ending = output_ending(image)
    return ".png" if ending in (".bmp", ".gif") and max(labels.values) > 255 else ending


def measure_volumes(segmentation: Segmentation, geometry: Geometry, labels: LabelSpec) -> dict[str, float]:
    """Millilitres of each structure in a label map, to six digits: in a mouse all are small."""
    import numpy as np

    n_values, voxel_ml = max(labels.values, default=0) + 1, geometry.voxel_volume_ml
    counts = sum(
        (np.bincount(piece, minlength=n_values) for piece in in_pieces(segmentation.label)), np.zeros(n_values)
    )
    return {
        name: float(f"{float(counts[list(values)].sum()) * voxel_ml:.6g}")
        for name, values in labels.structure_values.items()
    }


def _file_names(structures: Sequence[str]) -> dict[str, str]:
    """Names of files for structures, all different."""
    names: dict[str, str] = {}
    for number, structure in enumerate(structures, start=1):
        name = re.sub(r"[^\w.-]+", "_", structure)
        names[structure] = f"{name}_{number}" if name in names.values() else name
    return names
