"""The page about results: how good the trained configurations are, where they fail, and which one was chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.core.errors import list_some
from autoseg.core.serialize import atomic_path
from autoseg.evaluation.crossval import CrossValidation
from autoseg.evaluation.selection import Selection
from autoseg.planning.plan import Plan
from autoseg.reporting.figures import OverlayRow
from autoseg.reporting.html import Child, Html, bullets, classed, element, format_size, join
from autoseg.reporting.report_parts import PictureFolder, assemble_page, file_name, show_facts
from autoseg.reporting.results_charts import (
    show_calibration,
    show_cases,
    show_confusion,
    show_curves,
    show_label_dice,
    show_volumes,
)
from autoseg.reporting.results_examples import LoadOverlay, show_examples, show_suspects
from autoseg.reporting.results_tables import (
    estimate_mean_dice,
    format_dice,
    format_interval,
    show_dice,
    show_metrics,
    show_selection,
    tell_plan,
)
from autoseg.training.record import EpochFigures, TrainingChoices


@dataclass(frozen=True, kw_only=True, eq=False)
class ConfigurationResults:
    """What is known of a configuration.

    Attributes:
        name: of the configuration.
        curves: epochs by fold; folds that have not been trained may be missing.
        crossval: None while folds are missing.
        choices: how the folds are trained; None where that is not known.
    """

    name: str
    curves: dict[int, list[EpochFigures]]
    crossval: CrossValidation | None
    choices: TrainingChoices | None = None


def write_results_page(
    path: Path,
    plan: Plan,
    configurations: Sequence[ConfigurationResults],
    *,
    selection: Selection | None,
    overlays: Callable[[str, str], OverlayRow],
    max_examples: int = 3,
) -> Path:
    """Writes a page about results. It is one file that needs no other; its pictures are in a folder beside it too.

    Args:
        path: of the HTML file; pictures go to the folder of the same name without ending.
        plan: that the configurations are of.
        configurations: trained or not.
        selection: which of them predicts; None where that was not decided.
        overlays: loads image, reference and out-of-fold prediction of a case, from the names of configuration and case.
            Where it raises an `AutosegError`, the page says so in words.
        max_examples: so many of the worst, best and suspected cases are shown as slices.

    Returns:
        The path.
    """
    detailed = _choose_detailed(plan, configurations, selection)
    ordered = sorted(configurations, key=lambda results: results.name not in detailed)
    described = [plan.configuration(name) for name in detailed if name in plan.configurations]
    with atomic_path(path.with_suffix("")) as folder:
        folder.mkdir(parents=True)
        pictures = PictureFolder(folder=folder)
        sections: dict[str, tuple[Child, Html | None]] = {
            "plan": ("The plan", element("p", tell_plan(plan, described or [plan.configuration(plan.recommended)]))),
            "model": ("Which model", show_selection(selection) if selection else None),
        }
        for results in ordered:
            load = functools.partial(overlays, results.name)
            n_shown = max_examples if results.name in detailed else None
            shown = _show_configuration(plan, results, load, pictures, n_shown)
            sections[f"configuration-{file_name(results.name)}"] = (results.name, shown)
        text = assemble_page(
            f"Results for {plan.dataset}",
            kicker="autoseg report",
            heading=[show_facts(_list_facts(plan, ordered, selection)), _tell_result(ordered, selection)],
            sections=sections,
        )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _choose_detailed(
    plan: Plan, configurations: Sequence[ConfigurationResults], selection: Selection | None
) -> list[str]:
    """The configurations that are shown with all there is: those chosen, or else the recommended or the first."""
    complete = [results.name for results in configurations if results.crossval is not None]
    chosen = [name for name in selection.candidate.configurations if name in complete] if selection else []
    if chosen or not complete:
        return chosen
    return [plan.recommended if plan.recommended in complete else complete[0]]


def _list_facts(
    plan: Plan, configurations: Sequence[ConfigurationResults], selection: Selection | None
) -> list[tuple[str, str, str]]:
    crossval = next((found.crossval for found in configurations if found.crossval is not None), None)
    n_labels = len(plan.labels.names)
    facts = [("labels", str(n_labels), list_some(plan.labels.names))]
    if crossval is not None:
        detail = f"{plan.n_folds} folds of cross-validation" if plan.n_folds > 1 else "no cross-validation"
        facts.insert(0, ("cases", str(len(crossval.evaluation.cases)), detail))
    if selection is not None:
        facts.append(("chosen model", selection.chosen, _tell_choice(selection)))
        chosen = selection.candidate
        detail = f"{format_dice(chosen.raw_dice)} before post-processing"
        if chosen.interval is not None:
            detail += f", 95% interval {format_interval(*chosen.interval)}"
        facts.append(("mean Dice", format_dice(chosen.mean_dice), detail))
    elif crossval is not None:
        detail = f"95% interval {format_interval(*estimate_mean_dice(crossval.evaluation))}, {crossval.configuration}"
        facts.append(("mean Dice", format_dice(crossval.evaluation.mean_dice), detail))
    return facts


def _tell_choice(selection: Selection) -> str:
    n = len(selection.candidates)
    return f"of {n} that were compared" if n > 1 else "the only one with all folds"


def _tell_result(configurations: Sequence[ConfigurationResults], selection: Selection | None) -> Html:
    """What the page is about, and what is missing, in a sentence."""
    if selection is not None:
        text = (
            f"New scans are segmented with {selection.chosen}. All figures come from cross-validation: every case was "
            "segmented by a network that had not seen it."
        )
    elif any(results.crossval is not None for results in configurations):
        text = "Which model predicts has not been decided yet: run 'autoseg select'."
    elif any(epochs for results in configurations for epochs in results.curves.values()):
        text = "No configuration is trained on all folds yet, so that there are only learning curves to look at."
    else:
        text = "Nothing has been trained yet: run 'autoseg train'."
    return classed("p", "lead", text)


def _show_configuration(
    plan: Plan,
    results: ConfigurationResults,
    load: LoadOverlay,
    pictures: PictureFolder,
    max_examples: int | None,
) -> Html:
    """One configuration, without details where `max_examples` is None."""
    parts = [_tell_state(plan, results)] if results.crossval is None else []
    prefix = file_name(results.name)
    crossval = results.crossval
    if crossval is not None:
        parts.append(element("h3", "Dice per label"))
        parts.append(element("p", "Of label maps as the network makes them, before any post-processing."))
        if crossval.evaluation.labels and crossval.evaluation.cases:
            parts.append(show_label_dice(crossval.evaluation, pictures, prefix))
        parts.append(show_dice(crossval.evaluation))
    if any(results.curves.values()):
        parts += [element("h3", "Learning curves"), show_curves(results.curves, pictures, prefix)]
    if results.choices is not None:
        parts += [element("h3", "How it is trained"), _show_choices(results.choices)]
    if crossval is not None and max_examples is not None:
        parts += _show_details(plan, crossval, load, pictures, max_examples=max_examples)
    return join(*parts)


def _show_choices(choices: TrainingChoices) -> Html:
    """What the recipe has chosen, with the reasons it gave."""
    reasons = {reason.subject.removeprefix("training."): f": {reason.text}" for reason in choices.reasons}
    chosen = {
        "recipe": f"Recipe {choices.recipe}",
        "budget": f"Budget of each fold: {choices.budget.describe()}",
        "network": f"Patches of {format_size(choices.configuration.patch_size)}, features "
        f"{format_size(choices.configuration.network.features)}",
        "batch_size": f"{choices.batch_size} patches per step",
        "sampling": f"Sampling {choices.sampling}",
        "foreground_fraction": f"{choices.foreground_fraction:.0%} of the patches are centred on foreground",
        "mirror": "Mirrored" if choices.mirror else "Not mirrored",
    }
    return bullets(f"{text}{reasons.get(name, '')}." for name, text in chosen.items())


def _show_details(
    plan: Plan, crossval: CrossValidation, load: LoadOverlay, pictures: PictureFolder, *, max_examples: int
) -> list[Html]:
    prefix, evaluation = file_name(crossval.configuration), crossval.evaluation
    examples = show_examples(crossval, load, pictures, max_examples=max_examples)
    parts = [show_metrics(evaluation)]
    if evaluation.cases:
        parts += [element("h3", "Case by case"), show_cases(evaluation, pictures, prefix)]
    if examples is not None:
        parts.append(examples)
    suspects = show_suspects(crossval, load, pictures, max_examples=max_examples)
    parts += [element("h3", "Cases whose labels a person should look at"), suspects]
    parts += [element("h3", "Which labels are taken for which"), show_confusion(plan, crossval, pictures, prefix)]
    parts += [element("h3", "Volumes"), show_volumes(evaluation, pictures, prefix)]
    if sum(crossval.calibration.n_voxels):
        parts += [element("h3", "How sure the network is"), show_calibration(crossval.calibration, pictures, prefix)]
    if crossval.quality is not None:
        parts.append(_tell_quality(crossval))
    return parts


def _tell_state(plan: Plan, results: ConfigurationResults) -> Html:
    begun = sorted(fold for fold, epochs in results.curves.items() if epochs)
    missing = [fold for fold in range(plan.n_folds) if fold not in begun]
    if not begun:
        text = f"Not trained yet: run 'autoseg train -c {results.name}'."
    elif missing:
        text = (
            f"Fold{'s' if len(begun) > 1 else ''} {list_some([str(fold) for fold in begun], most=20)} of "
            f"{plan.n_folds} {'have' if len(begun) > 1 else 'has'} begun to train. Scores follow when all folds are "
            f"trained: run 'autoseg train -c {results.name} --fold {','.join(map(str, missing))}'."
        )
    else:
        text = "All folds have begun to train, but there is no cross-validation yet: run 'autoseg select'."
    return element("p", text)


def _tell_quality(crossval: CrossValidation) -> Html:
    quality = crossval.quality
    assert quality is not None
    text = (
        "Where folds agree on a new scan, they are mostly right, so that their agreement tells about what Dice to "
        f"expect. On {quality.n_cases} cases the estimate was off by about {quality.residual_std:.3f} (correlation "
        f"{quality.correlation:.2f}). Scans with an estimate below {format_dice(quality.low_dice)} are flagged."
    )
    return join(element("h3", "What can be told of a new scan"), element("p", text))
