"""Several trained configurations as one: their probabilities are averaged on the scan's grid."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from autoseg.core.geometry import Geometry
from autoseg.core.steps import Step
from autoseg.inference.postprocess import apply_steps
from autoseg.inference.predictor import Predictor, PreparedImage, Segmentation
from autoseg.inference.quality import Agreement
from autoseg.inference.volumes import (
    LabelMap,
    change_along,
    in_step,
    make_soft_maps,
    mean_probability,
    ready_rows,
    to_scan,
)


class Ensemble:
    """Predictors of one dataset, ready to segment together. Safe to use from several threads."""

    def __init__(self, members: Sequence[Predictor], *, steps: Sequence[Step] = ()) -> None:
        """Combines predictors.

        Args:
            members: of one plan; their own steps of post-processing are not done.
            steps: of post-processing of the result.
        """
        self.members, self.steps = tuple(members), tuple(steps)
        first = self.members[0]
        self.plan, self.device, self.step_fraction = first.plan, first.device, first.step_fraction
        self.configuration = first.configuration

    @property
    def name(self) -> str:
        """Such as "2d + 3d_fullres"."""
        return " + ".join(member.name for member in self.members)

    @property
    def folds(self) -> tuple[int, ...]:
        """That any of the members averages."""
        return tuple(sorted({fold for member in self.members for fold in member.folds}))

    @property
    def mirroring(self) -> bool:
        """Whether any of the members averages mirrored copies."""
        return any(member.mirroring for member in self.members)

    @property
    def low_dice(self) -> float | None:
        """Estimates below this are doubtful; None where there are none."""
        known = [member.low_dice for member in self.members if member.low_dice is not None]
        return float(np.mean(known)) if known else None

    @property
    def digest(self) -> str:
        """The sha256 that tells models apart: of the members' own."""
        return hashlib.sha256("".join(f"{member.digest}\n" for member in self.members).encode()).hexdigest()

    def prepare(self, image: NDArray[np.float32], geometry: Geometry) -> list[PreparedImage]:
        """Brings an image to the grid of each member.

        Args:
            image: (C, Z, Y, X) float32 canonical, finite; not changed.
            geometry: of the image.
        """
        return [member.prepare(image, geometry) for member in self.members]

    def segment(
        self,
        prepared: Sequence[PreparedImage],
        *,
        probabilities: bool = False,
        uncertainty: bool = False,
        scratch: Path | None = None,
    ) -> Segmentation:
        """Segments an image; see `Predictor.segment`.

        Args:
            prepared: from `prepare`.
            probabilities: make a map of each class' probability.
            uncertainty: make maps of the entropy and of the disagreement between all networks.
            scratch: a folder for a file of the probabilities; None keeps them in memory.
        """
        pairs = [(member, member.with_first_stage(image)) for member, image in zip(self.members, prepared, strict=True)]
        record, outputs = prepared[0].record, self.members[0].outputs
        # One axis for all, as the rows of the scan have to come in step.
        largest, image = max(pairs, key=lambda pair: math.prod(pair[1].record.shape))
        axis = largest.choose_axis(image)
        agreements = [member.make_agreement(image, axis=axis) for member, image in pairs]
        separate = [uncertainty or agreement is not None for agreement in agreements]
        needed = (
            member.needed_gib(image, axis=axis, separate=apart)
            for (member, image), apart in zip(pairs, separate, strict=True)
        )
        self.members[0].check_memory(sum(needed))
        labels = LabelMap(record, axis=axis, outputs=outputs)
        soft = make_soft_maps(
            record,
            axis=axis,
            outputs=outputs,
            probabilities=probabilities,
            uncertainty=uncertainty,
            scratch=scratch,
        )
        streams = [
            _rows_of_scan(member, image, axis=axis, separate=apart, agreement=agreement)
            for (member, image), apart, agreement in zip(pairs, separate, agreements, strict=True)
        ]
        for rows, groups in in_step(streams):
            labels.set(rows, outputs.decide_probabilities(mean_probability(groups, outputs)))
            if soft is not None:
                soft.add(rows, groups)
            del groups
        label = self.plan.labels.classes_to_values(labels.whole())
        estimates = [
            member.estimate_dice(agreement) for member, agreement in zip(self.members, agreements, strict=True)
        ]
        known = [value for value in estimates if value is not None]
        found = [value for value in known if not math.isnan(value)]
        return Segmentation(
            label=apply_steps(label, self.steps, voxel_ml=record.geometry.voxel_volume_ml),
            soft=soft,
            estimated_dice=float(np.mean(found or known)) if known else None,
        )


def _rows_of_scan(
    member: Predictor, prepared: PreparedImage, *, axis: int, separate: bool, agreement: Agreement | None
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the scan and the logits (F, K, n, A, B) there."""
    change = change_along(prepared.record, axis)
    n_networks = len(member.folds) if separate else 1
    swept = member.sweep(prepared, axis=axis, separate=separate, agreement=agreement)
    for rows, logits, first_row in ready_rows(swept, change):
        yield from to_scan(logits, change, rows, first_row=first_row, n_networks=n_networks)
        del logits
