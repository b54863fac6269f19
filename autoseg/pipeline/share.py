"""Giving a trained model to others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from autoseg.core.errors import PredictionError
from autoseg.core.runtime import format_memory
from autoseg.pipeline.inputs import choose_models
from autoseg.pipeline.workspace import DEFAULT_WORK

logger = logging.getLogger(__name__)


def export(
    work: Path | str = DEFAULT_WORK,
    target: Path | str | None = None,
    *,
    configuration: str | None = None,
    folds: Sequence[int] | None = None,
) -> Path:
    """Writes a trained model into one file, which `autoseg.predict` and `autoseg.Predictor` take as it is.

    The file holds the plan and the weights, no image, no name of a case, and no path of this machine.

    Example:
        >>> import autoseg
        >>> file = autoseg.export("work", "phantom.autoseg")
        >>> autoseg.Predictor(file, device="cpu").folds
        (0,)

    Args:
        work: the work folder, or a model: the folder of a trained configuration, or such a file.
        target: the file to write, `NAME.autoseg`; an older one is replaced. None for one beside the model's folder,
            `models/<configuration>.autoseg` in a work folder.
        configuration: its name; None as for `predict`.
        folds: which; None for all that are trained to their end. Others that are named are exported as their last
            checkpoint has them.

    Returns:
        The file.

    Raises:
        PredictionError: no fold is trained, or not those that are named; or an ensemble was selected.
        FormatError: the target's name has another ending, or the model is damaged.
    """
    from autoseg.inference.archive import SUFFIX
    from autoseg.inference.model import export_model

    choice = choose_models(Path(work), configuration)
    model = choice.models[0]
    if len(choice.models) > 1:
        named = " and ".join(known.configuration.name for known in choice.models)
        raise PredictionError(
            f"{work}: what was selected is an ensemble of {named}, and a file holds one of them; name it with -c"
        )
    beside = model.path.resolve()
    file = beside.with_name(beside.name + SUFFIX) if target is None else Path(target)
    export_model(model, file, folds=folds)
    size = format_memory(file.stat().st_size / 2**30)
    logger.info("%s of %s in %s, %s", model.configuration.name, model.plan.dataset, file, size)
    return file
