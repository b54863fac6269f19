"""What a dataset is: cases, their files, channels and labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import later


@dataclass(frozen=True, kw_only=True)
class LabelMend:
    """How a label map is read that is not quite in order; the file stays as it is.

    Attributes:
        rounded: its values lie near whole numbers, and are rounded.
        values: what a value of the file stands for, such as 255 for 1.
        halved: it is a mask in black and white with grey borders; what is brighter than half is white, before that.
    """

    rounded: bool = False
    values: dict[int, int] = field(default_factory=dict)
    halved: bool = later(False)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One examination.

    Attributes:
        id: unique within the dataset; names every file that is made of it.
        group: cases of one group never straddle folds; the case's own id where nothing else is known.
        images: files with one channel each, or one file with all of them; None for a channel that the case lacks.
        label: the label map; None where there is a file for each structure.
        masks: the file of each structure, by name, where there is no label map.
        annotated: structures that were looked for in this case; None for all, or for those that have a mask.
        attributes: what else a manifest tells of it, by column.
        mend: how its label map is read; None as it is.
    """

    id: str
    group: str
    images: tuple[Path | None, ...]
    label: Path | None
    masks: dict[str, Path] = field(default_factory=dict)
    annotated: tuple[str, ...] | None = None
    attributes: dict[str, str] = field(default_factory=dict)
    mend: LabelMend | None = None

    @property
    def image_files(self) -> tuple[Path, ...]:
        """Of the channels that the case has."""
        return tuple(file for file in self.images if file is not None)

    @property
    def label_files(self) -> tuple[Path, ...]:
        """All that tell what is annotated: the label map, or the masks."""
        return tuple(self.masks.values()) if self.label is None else (self.label,)

    @property
    def files(self) -> tuple[Path, ...]:
        """All that the case is read from."""
        return (*self.image_files, *self.label_files)

    def knows(self, structure: str) -> bool:
        """Whether a structure was looked for in this case."""
        if self.annotated is not None:
            return structure in self.annotated
        return not self.masks or structure in self.masks


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """An index of the user's files.

    Attributes:
        name: of the dataset.
        layout: how it was recognised.
        channels: names, in order.
        labels: the classes; None where the layout does not say and the label maps have to be asked.
        cases: sorted by id.
        fix: what can be mended safely is mended in memory: channels on another grid than the first are resampled onto
            it, voxels without a value get one, and label maps are read with a `LabelMend`.
    """

    name: str
    layout: str
    channels: tuple[str, ...]
    labels: LabelSpec | None
    cases: tuple[Case, ...]
    fix: bool = False
