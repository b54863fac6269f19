"""Choosing what predicts: configurations and their ensembles compared on out-of-fold label maps."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.core.errors import FormatError, PredictionError, TrainingError, TrainingInterrupted
from autoseg.core.runtime import never, track
from autoseg.core.serialize import read_json, write_json
from autoseg.data.dataset import Case
from autoseg.data.io import read_geometry, read_label, write_volume
from autoseg.data.references import read_reference
from autoseg.pipeline.complete import find_complete
from autoseg.pipeline.crossval import cross_validate
from autoseg.pipeline.fold_validation import keep_label_maps_of, validation_label_map
from autoseg.pipeline.stored import open_stored, prepare_stored
from autoseg.pipeline.workspace import DEFAULT_WORK, Workspace
from autoseg.planning.plan import Plan
from autoseg.training.folds import usable_folds

if TYPE_CHECKING:
    from autoseg.evaluation.crossval import CrossValidation
    from autoseg.evaluation.postprocess import Postprocessed
    from autoseg.evaluation.selection import Candidate, Selection
    from autoseg.inference.model import Model

logger = logging.getLogger(__name__)


def select(
    work: Path | str = DEFAULT_WORK,
    *,
    device: str = "auto",
    ensembles: bool = True,
    stop: Callable[[], bool] = never,
) -> Selection:
    """Compares configurations and their ensembles, decides post-processing, and writes `selection.json`.

    Configurations all of whose folds are trained take part; what is missing of their cross-validation is made. From
    then on `predict` uses the one that was chosen.

    Example:
        >>> import autoseg
        >>> from autoseg.training.config import Budget, TrainConfig
        >>> plan = autoseg.plan("dataset", "other", n_folds=2)
        >>> scores = autoseg.train("other", config=TrainConfig(budget=Budget(iterations=4)), device="cpu")
        >>> autoseg.select("other", device="cpu").chosen
        '3d_fullres'

    Args:
        work: the work folder.
        device: as in `train`.
        ensembles: also compare ensembles of two configurations, which have to segment all cases once more.
        stop: asked after every case; True raises.

    Returns:
        The decision, with everything it rests on.

    Raises:
        TrainingError: no configuration is trained on all folds.
        TrainingInterrupted: `stop` said so.
    """
    from autoseg.evaluation import select as rule

    workspace = Workspace(root=Path(work))
    plan, cases = workspace.read_plan(), workspace.read_dataset().cases
    with workspace.selecting():
        complete, missing = find_complete(workspace, plan)
        if not complete:
            listed = "\n".join(f"  - {name}: {why}" for name, why in missing.items())
            raise TrainingError(f"{workspace.root}: no configuration is trained on all folds\n{listed}")
        crossvals = {name: cross_validate(work, configuration=name, device=device, stop=stop) for name in complete}
        members: list[tuple[str, ...]] = [(name,) for name in complete]
        if ensembles:
            members += list(itertools.combinations(complete, 2))
        costs = {name: _cost(workspace, name, cases) for name in complete}
        candidates, dice = [], {}
        for names in members:
            if len(names) > 1:
                try:
                    _predict_together(workspace, [crossvals[name] for name in names], cases, device=device, stop=stop)
                except PredictionError as error:
                    # What single configurations need is less.
                    missing[" + ".join(names)] = str(error)
                    continue
            cost = sum(costs[name] for name in names)
            candidate, decided = _judge(workspace, plan, [crossvals[name] for name in names], cases, cost=cost)
            if len(names) == 1:
                _write_postprocessing(workspace, crossvals[names[0]], decided)
            candidates.append(candidate)
            dice[candidate.name] = decided.dice
        selection = rule.select(candidates, dice, missing=missing)
        write_json(workspace.selection_file, selection)
        logger.info("selected %s: %s", selection.chosen, selection.why)
        for decision in selection.candidate.decisions:
            if decision.adopted:
                text = "post-processing: %s, Dice %+.4f (%+.4f to %+.4f)"
                logger.info(text, decision.step, decision.gain, decision.low, decision.high)
        return selection


def read_selection(workspace: Workspace) -> Selection | None:
    """What was selected; None where nothing was, or where it cannot be read, which is said."""
    from autoseg.evaluation.selection import Selection

    if not workspace.selection_file.is_file():
        return None
    try:
        content: Selection = read_json(workspace.selection_file, Selection)
    except FormatError as error:
        logger.warning("%s; it does not count until 'autoseg select' has made it anew", error)
        return None
    return content


def selected_models(workspace: Workspace) -> tuple[Selection, tuple[Model, ...]] | None:
    """What was selected, and its models; None where nothing was, or, with a warning, where weights have changed."""
    from autoseg.inference.model import read_model

    selection = read_selection(workspace)
    if selection is None:
        return None
    folders = [workspace.model(name) for name in selection.candidate.configurations]
    try:
        models = tuple(read_model(folder) for folder in folders if usable_folds(folder))
    except PredictionError as error:
        # The first stage of a cascade is not there.
        logger.warning("what was selected does not count: %s", error)
        return None
    if tuple(model.digest() for model in models) == selection.candidate.models:
        return selection, models
    logger.warning(
        "%s: was made with other weights than those there now, and does not count; run 'autoseg select'",
        workspace.selection_file,
    )
    return None


def _label_file(workspace: Workspace, names: Sequence[str], case: str, fold: int) -> Path:
    """The out-of-fold label map of a case."""
    if len(names) == 1:
        return validation_label_map(workspace, names[0], fold, case)
    return workspace.ensemble(names) / f"{case}.nii.gz"


def _judge(
    workspace: Workspace, plan: Plan, members: Sequence[CrossValidation], cases: Sequence[Case], *, cost: float
) -> tuple[Candidate, Postprocessed]:
    """Decides the post-processing of a configuration or ensemble, and scores it."""
    import numpy as np

    from autoseg.evaluation.postprocess import BYTES_PER_VOXEL, Pair, decide_steps
    from autoseg.evaluation.scores import targets_of
    from autoseg.evaluation.select import interval_of_labels, mean_of_labels
    from autoseg.evaluation.selection import Candidate
    from autoseg.preprocessing.store import PreprocessedCase

    names = [member.configuration for member in members]
    targets, by_id = targets_of(plan.labels), {case.id: case for case in cases}

    def load(case: str) -> Pair:
        reference, geometry = read_reference(by_id[case], plan.labels)
        prediction, _ = read_label(_label_file(workspace, names, case, members[0].folds[case]))
        ignored = None if plan.labels.ignore is None else reference == plan.labels.ignore
        return Pair(
            prediction=prediction,
            reference=reference if ignored is None else np.where(ignored, 0, reference),
            voxel_ml=geometry.voxel_volume_ml,
            ignored=ignored,
            unknown=frozenset(target.name for target in targets if not by_id[case].knows(target.name)),
        )

    def needed_gib(case: str) -> float:
        stored = PreprocessedCase(workspace.preprocessed(plan.grid(names[0]), case))
        return BYTES_PER_VOXEL * prod(stored.record.geometry.shape) / 2**30

    decided = decide_steps(sorted(members[0].folds), load, targets, needed_gib=needed_gib)
    candidate = Candidate(
        configurations=tuple(names),
        models=tuple(member.model for member in members),
        mean_dice=mean_of_labels(decided.dice),
        raw_dice=mean_of_labels(decided.raw_dice),
        label_dice={target.name: mean_of_labels(decided.dice[:, [index]]) for index, target in enumerate(targets)},
        cost=cost,
        interval=interval_of_labels(decided.dice),
        steps=decided.steps,
        decisions=decided.decisions,
    )
    logger.info(
        "%s: mean Dice %.4f, %.4f after post-processing", candidate.name, candidate.raw_dice, candidate.mean_dice
    )
    return candidate, decided


def _cost(workspace: Workspace, configuration: str, cases: Sequence[Case]) -> float:
    """Billions of multiply-adds for a case of the median shape, with the networks that were trained for it."""
    import numpy as np

    from autoseg.inference.cost import count_multiply_adds
    from autoseg.inference.model import read_model
    from autoseg.preprocessing.store import PreprocessedCase

    model = read_model(workspace.model(configuration))
    grid = model.plan.grid(configuration)
    shapes = [PreprocessedCase(workspace.preprocessed(grid, case.id)).record.shape for case in cases]
    median = [round(size) for size in np.median(shapes, axis=0).tolist()]
    first = model.configuration.previous
    cost_of_first = 0.0 if first is None else _cost(workspace, first, cases)
    return cost_of_first + count_multiply_adds(model.plan, model.configuration, median)


def _write_postprocessing(workspace: Workspace, crossval: CrossValidation, decided: Postprocessed) -> None:
    """Puts what helps a configuration beside its weights, where every prediction with it finds it."""
    from autoseg.inference.archive import POSTPROCESSING
    from autoseg.inference.model import read_model
    from autoseg.inference.sources import Postprocessing

    folder = workspace.model(crossval.configuration)
    model = read_model(folder)
    folds = sorted(set(crossval.folds.values()))
    if model.digest(folds) != crossval.model:
        raise TrainingError(f"{folder}: was trained on while it was compared; run 'autoseg select' again")
    weights = {fold: model.source.hash_weights(fold) for fold in folds}
    write_json(folder / POSTPROCESSING, Postprocessing(weights=weights, steps=decided.steps, quality=crossval.quality))


def _predict_together(
    workspace: Workspace,
    members: Sequence[CrossValidation],
    cases: Sequence[Case],
    *,
    device: str,
    stop: Callable[[], bool],
) -> None:
    """Out-of-fold label maps of several configurations together; those of these very models are not made again."""
    from autoseg.inference.ensemble import Ensemble
    from autoseg.inference.predictor import Predictor

    names = [member.configuration for member in members]
    folder = workspace.ensemble(names)
    # Which models, all folds of each, make them, of which cases.
    keep_label_maps_of({"keys": [member.key for member in members]}, folder / "ensemble.json")
    fold_of = members[0].folds
    validated = [case for case in cases if case.id in fold_of]
    label_maps = {case.id: _label_file(workspace, names, case.id, fold_of[case.id]) for case in validated}
    todo = [case for case in validated if not label_maps[case.id].is_file()]
    if not todo:
        return
    with track(f"{' and '.join(names)} together segment all cases", total=len(todo)) as advance:
        for fold in sorted({fold_of[case.id] for case in todo}):
            predictors = [
                Predictor(workspace.model(name), device=device, folds=[fold], postprocess=False, n_sharing=len(names))
                for name in names
            ]
            ensemble = Ensemble(predictors)
            for case in todo:
                if fold_of[case.id] != fold:
                    continue
                if stop():
                    raise TrainingInterrupted("stopped while comparing ensembles; the same command goes on from there")
                prepared = [prepare_stored(open_stored(workspace, predictor, case)) for predictor in predictors]
                geometry = read_geometry(case.label_files[0])
                label = ensemble.segment(prepared).label
                write_volume(label_maps[case.id], label, geometry, like=case.label_files[0])
                advance(1)
