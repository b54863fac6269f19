"""Single cases of a cross-validation: the worst, the best, a typical one, and those whose labels may be wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence

from autoseg.core.errors import AutosegError, list_some
from autoseg.evaluation.crossval import CrossValidation, Suspect
from autoseg.evaluation.scores import MISSED, ONLY_PREDICTED, CaseScore
from autoseg.reporting.figures import OverlayRow
from autoseg.reporting.html import NO_VALUE, Child, Column, Html, classed, element, format_number, join, table
from autoseg.reporting.report_parts import (
    HOW_TO_READ_BORDERS,
    HOW_TO_READ_SLICES,
    PictureFolder,
    file_name,
)
from autoseg.reporting.results_tables import format_dice
from autoseg.reporting.slice_pictures import draw_slices

MAX_LISTED_SUSPECTS = 20
N_LABELS_TOLD = 3

LoadOverlay = Callable[[str], OverlayRow]
"""By the name of the case."""


def show_examples(
    known: CrossValidation, load: LoadOverlay, pictures: PictureFolder, *, max_examples: int
) -> Html | None:
    """The worst and the best cases as slices, and a walk through the typical one.

    Returns:
        None where no case has a Dice.
    """
    cases = _sort_cases(known)
    if not cases:
        return None
    worst = cases[:max_examples]
    best = cases[max(len(worst), len(cases) - max_examples) :][::-1]
    prefix = file_name(known.configuration)
    parts: list[Child] = [element("p", f"{HOW_TO_READ_SLICES} {HOW_TO_READ_BORDERS}")]
    for name, title, chosen in (("worst", "Worst cases", worst), ("best", "Best cases", best)):
        if not chosen:
            continue
        text = "The slices where reference and prediction differ most." if name == "worst" else ""
        parts += [element("h3", title), element("p", text) if text else ""]
        parts += [
            _show_case(
                case, known, load, pictures, name=f"{prefix}-{name}-{place}.png", is_about_errors=name == "worst"
            )
            for place, case in enumerate(chosen, start=1)
        ]
    typical = cases[(len(cases) - 1) // 2]
    parts += [element("h3", "A typical case"), _walk_through(typical, load, pictures, name=f"{prefix}-typical.gif")]
    return join(*parts)


def _sort_cases(known: CrossValidation) -> list[CaseScore]:
    """Those that have a Dice, the worst first."""
    cases = [case for case in known.evaluation.cases if math.isfinite(case.mean_dice)]
    return sorted(cases, key=lambda case: (case.mean_dice, case.case))


def _show_case(
    case: CaseScore,
    known: CrossValidation,
    load: LoadOverlay,
    pictures: PictureFolder,
    *,
    name: str,
    is_about_errors: bool,
) -> Html:
    facts: list[Child] = [element("strong", case.case), f": {_tell_case(case)}"]
    if case.case in known.folds:
        facts.append(f" Segmented by fold {known.folds[case.case]}, which had not seen it.")
    try:
        row = load(case.case)
    except AutosegError as error:
        return element("p", *facts, classed("span", "note", f" It cannot be shown: {error}"))
    slices = draw_slices(row, is_about_errors=is_about_errors)
    title = f"{case.case}, mean Dice {format_dice(case.mean_dice)}"
    return pictures.add_slices(name, slices, title=title, caption=join(*facts))


def _tell_case(case: CaseScore) -> str:
    """Its Dice, and what went wrong, in words."""
    text = f"mean Dice {format_dice(case.mean_dice)}"
    scored = sorted((score for score in case.labels if math.isfinite(score.dice)), key=lambda score: score.dice)
    if len(case.labels) > 1 and scored:
        listed = ", ".join(f"{score.label} {format_dice(score.dice)}" for score in scored[:N_LABELS_TOLD])
        text += f" ({'lowest: ' if len(scored) > N_LABELS_TOLD else ''}{listed})"
    missed = [score.label for score in case.labels if score.status == MISSED]
    false = [score.label for score in case.labels if score.status == ONLY_PREDICTED]
    text += f"; missed: {list_some(missed)}" if missed else ""
    text += f"; found, but not in the reference: {list_some(false)}" if false else ""
    return f"{text}."


def _walk_through(case: CaseScore, load: LoadOverlay, pictures: PictureFolder, *, name: str) -> Html:
    try:
        row = load(case.case)
    except AutosegError as error:
        return element("p", element("strong", case.case), classed("span", "note", f" cannot be shown: {error}"))
    caption = f"Half of the cases have a higher Dice, half a lower one: {_tell_case(case)}"
    return pictures.add_animation(name, row, title=case.case, caption=caption)


def show_suspects(known: CrossValidation, load: LoadOverlay, pictures: PictureFolder, *, max_examples: int) -> Html:
    """Cases whose labels a person should look at, and why; the first few with slices, unless those are above."""
    worst = {case.case for case in _sort_cases(known)[:max_examples]}
    if not known.reviews or len(set(known.folds.values())) < 2:
        return element(
            "p", "Several folds are needed to find them: what all of them contradict may be labelled wrongly."
        )
    n_seen, n_all = len(known.reviews), len(known.folds)
    seen: Html | str = ""
    if n_seen < n_all:
        text = f"All folds together looked at {n_seen} of {n_all} cases: time or memory were short for the others."
        seen = classed("p", "note", text)
    if not known.suspects:
        return join(element("p", "No case stands out."), seen)
    columns = [Column(title="case"), Column(title="why", kind="prose"), Column(title="how suspicious", kind="number")]
    rows: list[list[Child]] = [
        [suspect.case, suspect.why, format_number(suspect.score, n_digits=3)]
        for suspect in known.suspects[:MAX_LISTED_SUSPECTS]
    ]
    n_more = len(known.suspects) - len(rows)
    text = (
        "The folds have learned from most of the labels; where all of them contradict a label, a person should look at "
        "it. It may be wrong, or the case may be unusual and the label right. 0 is not suspicious at all."
    )
    return join(
        element("p", text),
        table(columns, rows, is_stacked=True),
        classed("p", "note", f"... and {n_more} more") if n_more > 0 else "",
        seen,
        _show_suspects(known.suspects[:max_examples], known, load, pictures, worst=worst),
    )


def _show_suspects(
    suspects: Sequence[Suspect],
    known: CrossValidation,
    load: LoadOverlay,
    pictures: PictureFolder,
    *,
    worst: Container[str],
) -> Html:
    cases = {case.case: case for case in known.evaluation.cases}
    shown: list[Html] = []
    above = [suspect.case for suspect in suspects if suspect.case in worst]
    if above:
        text = " is among the worst cases, see above." if len(above) == 1 else " are among the worst cases, see above."
        shown.append(element("p", element("strong", list_some(above, most=len(above))), text))
    for place, suspect in enumerate(suspects, start=1):
        if suspect.case in worst:
            continue
        dice = format_dice(cases[suspect.case].mean_dice) if suspect.case in cases else NO_VALUE
        try:
            slices = draw_slices(load(suspect.case), is_about_errors=True)
        except AutosegError as error:
            note = classed("span", "note", f" cannot be shown: {error}")
            shown.append(element("p", element("strong", suspect.case), note))
            continue
        caption = join(element("strong", suspect.case), f": {suspect.why}. Mean Dice {dice}.")
        name = f"{file_name(known.configuration)}-suspect-{place}.png"
        shown.append(pictures.add_slices(name, slices, title=f"{suspect.case}, suspected", caption=caption))
    return join(*shown)
