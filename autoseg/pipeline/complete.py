"""Whether a configuration is trained on all folds, as cross-validation, the second stage and the choice need it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoseg.core.serialize import read_json
from autoseg.pipeline.settle import how_to_begin_anew, planned_digest, read_settled
from autoseg.training.folds import trained_folds
from autoseg.training.record import FoldFiles, TrainingRecord

if TYPE_CHECKING:
    from autoseg.pipeline.workspace import Workspace
    from autoseg.planning.plan import Plan


def why_incomplete(workspace: Workspace, configuration: str) -> str | None:
    """Why a configuration cannot be cross-validated, and what to do; None where it can.

    Folds that were trained by another plan or on other cases must not count: their validation cases may be among those
    that they have learned from.
    """
    model, splits = workspace.model(configuration), workspace.read_splits()
    if any(set(fold.training) & set(fold.validation) for fold in splits.folds):
        return (
            "the network is trained and judged on the same cases, which are of one group; add cases of other patients, "
            "or tell with --groups which cases belong together, and plan again"
        )
    finished, wanted = set(trained_folds(model)), set(range(len(splits.folds)))
    if missing := sorted(wanted - finished):
        folds = ",".join(map(str, missing))
        return f"folds {folds} are not trained to their end; run 'autoseg train -c {configuration} --fold {folds}'"
    advice = how_to_begin_anew(model)
    settled = read_settled(model)
    if settled is None:
        return f"nothing says how its folds were trained; {advice}"
    if settled.planned != planned_digest(workspace.read_plan(), configuration):
        return f"its folds were trained by another plan than that of now; {advice}"
    if finished != wanted:
        return f"it holds folds that the splits do not have; move or delete {model}, then train again"
    for fold, split in enumerate(splits.folds):
        record: TrainingRecord = read_json(FoldFiles.of(model, fold).training, TrainingRecord)
        cases = sorted(record.training_cases), sorted(record.validation_cases)
        if cases != (sorted(split.training), sorted(split.validation)):
            return f"fold {fold} was trained on other cases than the splits have now; {advice}"
    return None


def find_complete(workspace: Workspace, plan: Plan) -> tuple[list[str], dict[str, str]]:
    """Configurations that are trained on all folds, cascades with their first stages, and why the others are not."""
    complete, missing = [], {}
    for name, configuration in plan.configurations.items():
        first = configuration.previous
        if first is not None and (why := why_incomplete(workspace, first)) is not None:
            missing[name] = f"its first stage, {first}: {why}"
            continue
        why = why_incomplete(workspace, name)
        if why is None:
            complete.append(name)
        else:
            missing[name] = why
    return complete, missing
