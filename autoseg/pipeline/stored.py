"""Cases of the training data from the store, as networks take them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoseg.data.dataset import Case
    from autoseg.inference.predictor import Predictor, PreparedImage
    from autoseg.pipeline.workspace import Workspace
    from autoseg.planning.plan import Plan
    from autoseg.preprocessing.store import PreprocessedCase


def open_stored(workspace: Workspace, predictor: Predictor, case: Case) -> PreprocessedCase:
    """A case of the training data on the grid of a predictor, from the store."""
    return open_preprocessed(workspace, predictor.plan, predictor.name, case.id)


def open_preprocessed(workspace: Workspace, plan: Plan, configuration: str, case: str) -> PreprocessedCase:
    """A case on the grid of a configuration; of a cascade, with what its first stage has found."""
    from autoseg.preprocessing.store import PreprocessedCase

    is_second = plan.configuration(configuration).previous is not None
    previous = workspace.first_stage(configuration, case) if is_second else None
    return PreprocessedCase(workspace.preprocessed(plan.grid(configuration), case), previous=previous)


def prepare_stored(stored: PreprocessedCase) -> PreparedImage:
    """Its image, for the predictor whose grid it is on."""
    import numpy as np
    import torch

    from autoseg.inference.predictor import PreparedImage

    image = torch.from_numpy(np.asarray(stored.image, np.float32))
    if stored.previous is not None:
        found = torch.from_numpy(np.asarray(stored.previous, np.float32))
        image = torch.cat([image, found.unsqueeze(0)])
    return PreparedImage(image=image, record=stored.record, occupied=stored.occupied)
