"""What all folds of a configuration share, settled by the first one that is trained: the plan beside the weights, and
how the recipe has adapted it to budget, machine and data."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg import __version__
from autoseg.core.errors import FormatError, TrainingError, list_some
from autoseg.core.locks import is_free, locked
from autoseg.core.serialize import digest, holds_json, read_json, write_json
from autoseg.core.versions import note_writer, refuse_newer
from autoseg.planning.plan import ConfigurationPlan, Plan, Reason
from autoseg.training.adapt import choose_training, with_requests
from autoseg.training.folds import BEGUN_MARK, PLAN, TRAINING, folds_with, usable_folds
from autoseg.training.ladder import LADDER, MAX_ENLARGEMENT, WIDTHS
from autoseg.training.recipe import RECIPES
from autoseg.training.record import FoldFiles, TrainingChoices

if TYPE_CHECKING:
    import torch

    from autoseg.training.config import TrainConfig

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.json"


@dataclass(frozen=True, kw_only=True)
class SettledTraining:
    """How the folds of a model are trained, for `recipe.json` in its folder.

    Attributes:
        planned: digest of what the weights take from the plan of the work folder.
        request: digest of what was asked for; who asks the same gets the same.
        choices: that were made.
    """

    planned: str
    request: str
    choices: TrainingChoices


def settle_training(
    model: Path,
    plan: Plan,
    configuration: ConfigurationPlan,
    config: TrainConfig,
    *,
    folds: Sequence[int],
    resume: bool,
    n_cases: int,
    device: torch.device,
    n_processes: int = 1,
) -> tuple[Plan, TrainingChoices, float]:
    """The plan and the choices that the folds of a model are trained with: those it has, or new ones.

    Folds that begin at the same moment in several processes wait for the first one to choose.

    Args:
        model: its folder.
        plan: the plan of the work folder.
        configuration: of that plan.
        config: what the user asks for.
        folds: that are to be trained now.
        resume: whether they go on where they stopped; otherwise what they have is deleted.
        n_cases: to train on.
        device: to train on.
        n_processes: that train a fold together.

    Returns:
        The plan with the configuration as it is trained, also written to the model's folder; the choices; and the
        seconds that were spent on making them.

    Raises:
        TrainingError: the folder holds folds of another plan, recipe or network; or a fold that is to begin anew is
            being trained.
        WorkspaceError: a newer autoseg has trained folds of the model.
    """
    with locked(model / ".settling.lock", waiting_for=f"chooses how {model.name} is trained"):
        refuse_newer(model)
        if not resume:
            refuse_while_trained([FoldFiles.of(model, fold) for fold in folds])
        file, planned = model / RECIPE_FILE, planned_digest(plan, configuration.name)
        asked = dataclasses.replace(config, seed=0, compile=None)
        rules = RECIPES[config.recipe], LADDER, MAX_ENLARGEMENT, WIDTHS, __version__
        request = digest((planned, asked, n_cases, device.type, n_processes, rules))
        known = read_settled(model)
        staying = staying_folds(model, folds, resume=resume)
        spent_s = 0.0
        if known is None or known.request != request:
            if staying:
                known = _check_kept(known, model=model, planned=planned, configuration=configuration, config=config)
                text = "%s: the network stays as it is in fold %s, chosen for a training of %s"
                folds_told = ", ".join(map(str, staying))
                logger.info(text, model.name, folds_told, known.choices.budget.describe())
            else:
                logger.info("%s: looking how large a network the budget allows", configuration.name)
                choices, spent_s = choose_training(
                    plan, configuration, config, n_cases=n_cases, device=device, n_processes=n_processes
                )
                known = SettledTraining(planned=planned, request=request, choices=choices)
        if not resume:
            for fold in folds:
                FoldFiles.of(model, fold).forget()
        adapted = _adapted(plan, known.choices)
        note_writer(model)
        # Folds that run side by side write nothing that is there already.
        for path, content in ((file, known), (model / PLAN, adapted)):
            if not holds_json(path, content):
                write_json(path, content)
        # Marked as begun now, so that other folds take these choices even while this one is still loading.
        if folds and folds[0] not in usable_folds(model):
            begun = FoldFiles.of(model, folds[0]).begun
            begun.parent.mkdir(exist_ok=True)
            begun.touch()
    choices = with_requests(known.choices, config, n_cases=n_cases, on_cpu=device.type == "cpu")
    for reason in choices.reasons:
        logger.info("%s: %s: %s", configuration.name, reason.subject.removeprefix("training."), reason.text)
    return adapted, choices, spent_s


def refuse_other_training(
    model: Path,
    plan: Plan,
    configuration: ConfigurationPlan,
    config: TrainConfig,
    *,
    folds: Sequence[int],
    resume: bool,
) -> None:
    """Makes sure that folds which stay were trained as these are to be; the arguments are those of `settle_training`.

    Raises:
        TrainingError: they were not.
    """
    if staying_folds(model, folds, resume=resume):
        planned = planned_digest(plan, configuration.name)
        _check_kept(read_settled(model), model=model, planned=planned, configuration=configuration, config=config)


def refuse_while_trained(folds: Sequence[FoldFiles]) -> None:
    """Makes sure that nothing is deleted that another process works on.

    Raises:
        TrainingError: it would be.
    """
    busy = [files.folder for files in folds if not is_free(files.lock)]
    if busy:
        raise TrainingError(
            f"{list_some([str(folder) for folder in busy])}: another process trains it; wait for it or end it, then "
            "begin anew"
        )


def discard_folds(models: Sequence[Path], folds: Sequence[int]) -> None:
    """Deletes what earlier trainings of folds have left, so that they begin anew.

    Args:
        models: their folders.
        folds: of each.

    Raises:
        TrainingError: another process trains one of them; all are as they were.
    """
    found = [FoldFiles.of(model, fold) for model in models for fold in folds]
    refuse_while_trained(found)
    for files in found:
        files.forget()


def staying_folds(model: Path, folds: Sequence[int], *, resume: bool) -> list[int]:
    """What a model has of folds, and keeps when these are trained: they go on, or else are deleted.

    Folds that are trained elsewhere count from their beginning, with or without a checkpoint.
    """
    begun = usable_folds(model)
    announced = {*begun, *folds_with(model, TRAINING), *folds_with(model, BEGUN_MARK)}
    return sorted(fold for fold in announced if fold not in folds or (resume and fold in begun))


def planned_digest(plan: Plan, configuration: str) -> str:
    """Of what weights cannot do without, of a plan in a work folder."""
    return digest((plan.configuration(configuration), plan.labels, plan.normalization, plan.axis_order))


def read_settled(model: Path) -> SettledTraining | None:
    """How the folds of a model are trained; None where none has begun, or what is there cannot be read."""
    file = model / RECIPE_FILE
    try:
        return read_json(file, SettledTraining) if file.exists() else None
    except FormatError as error:
        logger.warning("%s", error)
        return None


def _check_kept(
    known: SettledTraining | None, *, model: Path, planned: str, configuration: ConfigurationPlan, config: TrainConfig
) -> SettledTraining:
    """What the folds that stay were trained with.

    Raises:
        TrainingError: it is not what is asked for now.
    """
    advice = how_to_begin_anew(model)
    if known is None:
        raise TrainingError(f"{model}: holds folds, but no {RECIPE_FILE} that says how they were trained; {advice}")
    if known.planned != planned:
        raise TrainingError(f"{model}: holds folds that another plan has trained; {advice}")
    if known.choices.recipe != config.recipe:
        raise TrainingError(
            f"{model}: holds folds of the recipe '{known.choices.recipe}', '{config.recipe}' is wanted; give --recipe "
            f"{known.choices.recipe}, or {advice}"
        )
    if config.network == "planned" and known.choices.configuration != configuration:
        raise TrainingError(f"{model}: holds folds of a smaller network than the planned one; {advice}")
    return known


def how_to_begin_anew(model: Path) -> str:
    """What to do with folds that no others can be added to."""
    return (
        f"train all folds anew with 'autoseg train -c {model.name} --no-resume', which deletes them, or move {model} "
        "away to keep them"
    )


def _adapted(plan: Plan, choices: TrainingChoices) -> Plan:
    """The plan with the configuration as it is trained, recommended, and the reasons."""
    name = choices.configuration.name
    reasons = {reason.subject: reason for reason in (*plan.reasons, *choices.reasons)}
    chosen = reasons.get("training.network")
    if chosen is not None:
        for part in ("patch_size", "network"):
            subject = f"configurations.{name}.{part}"
            reasons[subject] = Reason(subject=subject, text=chosen.text)
    adapted = dataclasses.replace(
        plan,
        configurations={**plan.configurations, name: choices.configuration},
        recommended=name,
        reasons=tuple(reasons.values()),
    )
    return adapted.signed()
