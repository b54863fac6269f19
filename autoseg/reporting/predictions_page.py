"""The page about a folder of predictions without references: how they look, their volumes, and what stands out."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from autoseg.core.errors import AutosegError
from autoseg.core.runtime import format_duration
from autoseg.core.serialize import atomic_path
from autoseg.reporting import label_slices
from autoseg.reporting.figures import OverlayRow
from autoseg.reporting.html import (
    NO_VALUE,
    Child,
    Column,
    Html,
    classed,
    element,
    figure,
    format_number,
    join,
    table,
)
from autoseg.reporting.report_parts import PictureFolder, assemble_page, fold_away, show_facts
from autoseg.reporting.results_figures import draw_volumes
from autoseg.reporting.slice_pictures import write_strip
from autoseg.reporting.standouts import PredictedCase as PredictedCase
from autoseg.reporting.standouts import Standout, find_standouts, find_typical, tell_reasons

MAX_STANDOUTS_SHOWN = 6
MAX_STANDOUTS_LISTED = 50
N_TYPICAL = 3
MAX_VOLUMES_LISTED = 6000
N_LABELS_DESCRIBED = 6

HOW_TO_READ = (
    "Slices are seen from the feet, anterior up: the patient's right (R) is on the left. Every label has a colour; "
    "where colours repeat, its value is written on it."
)

LoadOverlay = Callable[[str], OverlayRow]
"""By the name of the case."""


def write_predictions_page(
    path: Path,
    title: str,
    facts: Sequence[tuple[str, str]],
    cases: Sequence[PredictedCase],
    overlays: LoadOverlay,
    *,
    values: Sequence[int],
    names: Sequence[str],
    structures: Sequence[str],
) -> Path:
    """Writes a page about predictions that nobody has drawn references for. It is one file that needs no other.

    Args:
        path: of the HTML file; pictures go to the folder of the same name without ending.
        title: of the page.
        facts: about the run, as title and value.
        cases: all of them, those that failed too.
        overlays: loads the image and the prediction of a case by its name. Where it raises an `AutosegError`, the page
            says so in words.
        values: of the labels in the label maps.
        names: of the same labels.
        structures: what volumes are of: the labels, or regions.

    Returns:
        The path.
    """
    standouts = find_standouts(cases, structures)
    segmented = [case for case in cases if case.error is None]
    with atomic_path(path.with_suffix("")) as folder:
        folder.mkdir(parents=True)
        pictures = PictureFolder(folder=folder)
        labels = dict(zip(values, names, strict=True))
        sections: dict[str, tuple[Child, Html | None]] = {
            "standouts": ("Cases that stand out", _show_standouts(standouts, cases, overlays, pictures, labels)),
            "typical": ("Typical cases", _show_typical(cases, structures, overlays, pictures, labels)),
            "volumes": ("Volumes", _show_volumes(segmented, structures, pictures) if segmented else None),
            "cases": ("All cases", _list_cases(cases, structures)),
        }
        text = assemble_page(
            title,
            kicker="autoseg report",
            heading=[
                show_facts([(name, value, "") for name, value in facts]),
                classed("p", "lead", _tell_result(cases, standouts)),
            ],
            sections=sections,
        )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _tell_result(cases: Sequence[PredictedCase], standouts: Sequence[Standout]) -> str:
    n_failed = sum(case.error is not None for case in cases)
    text = f"{len(cases) - n_failed} of {len(cases)} scans were segmented."
    if standouts:
        text += f" {len(standouts)} stand{'s' if len(standouts) == 1 else ''} out and should be looked at first."
    return text + " There is no reference, so that nothing here says how right they are."


def _show_standouts(
    standouts: Sequence[Standout],
    cases: Sequence[PredictedCase],
    load: LoadOverlay,
    pictures: PictureFolder,
    labels: Mapping[int, str],
) -> Html:
    if not standouts:
        return element("p", "None: all were segmented, without warnings, and their volumes are much alike.")
    text = (
        "Without a label map, with folds that agree little, without a label that nearly all others have, with a volume "
        "that is far from the others', or with a scan unlike those of the training. That need not be an error: it may "
        "be the patient."
    )
    rows: list[list[Child]] = [[standout.case, tell_reasons(standout)] for standout in standouts[:MAX_STANDOUTS_LISTED]]
    n_more = len(standouts) - len(rows)
    listed = table([Column(title="case"), Column(title="why", kind="prose")], rows, is_stacked=True)
    segmented = {case.case for case in cases if case.error is None}
    shown = [standout for standout in standouts if standout.case in segmented][:MAX_STANDOUTS_SHOWN]
    overlays = [
        _show_case(standout.case, tell_reasons(standout), load, pictures, labels, name=f"standout-{place}.png")
        for place, standout in enumerate(shown, start=1)
    ]
    return join(
        element("p", text),
        fold_away(f"All {len(standouts)} of them", listed, n_rows=len(rows)),
        classed("p", "note", f"... and {n_more} more") if n_more > 0 else "",
        element("p", HOW_TO_READ) if overlays else "",
        *overlays,
    )


def _show_typical(
    cases: Sequence[PredictedCase],
    structures: Sequence[str],
    load: LoadOverlay,
    pictures: PictureFolder,
    labels: Mapping[int, str],
) -> Html | None:
    typical = find_typical(cases, structures, n=N_TYPICAL)
    if not typical:
        return None
    parts: list[Child] = [element("p", f"Their volumes are the most usual ones. {HOW_TO_READ}")]
    for place, case in enumerate(typical, start=1):
        told = ""
        if case.estimated_dice is not None and math.isfinite(case.estimated_dice):
            told = f"a Dice of about {case.estimated_dice:.2f} is to be expected"
        parts.append(_show_case(case.case, told, load, pictures, labels, name=f"typical-{place}.png"))
    try:
        row = replace(load(typical[0].case), reference=None)
    except AutosegError:
        return join(*parts)  # what is wrong with it has just been said
    caption = "The red line with white dashes is the border of the labels."
    parts.append(pictures.add_animation("typical-1.gif", row, title=typical[0].case, caption=caption))
    return join(*parts)


def _show_case(
    case: str, told: str, load: LoadOverlay, pictures: PictureFolder, labels: Mapping[int, str], *, name: str
) -> Html:
    """A case with its labels in their colours."""
    heading = join(element("strong", case), f": {told}" if told else "")
    try:
        row = replace(load(case), reference=None)
    except AutosegError as error:
        return element("p", heading, classed("span", "note", f" It cannot be shown: {error}"))
    drawn = label_slices.draw_label_slices(row, list(labels))
    files = [Image.open(io.BytesIO(data)) for data in drawn.pictures]
    write_strip(pictures.folder / name, files, title=case)
    caption = join(heading, label_slices.show_legend(drawn, labels) or ". No labels here.")
    return figure(label_slices.show_label_slices(drawn, title=case), caption)


def _show_volumes(cases: Sequence[PredictedCase], names: Sequence[str], pictures: PictureFolder) -> Html:
    """A chart and a table, label by label."""
    volumes_ml = {
        name: np.array([volume for case in cases if (volume := case.volumes_ml.get(name, 0.0)) > 0], np.float64)
        for name in names
    }
    columns = [Column(title="label")]
    columns += [Column(title=title, kind="number") for title in ("present in", "median ml", "smallest", "largest")]
    rows: list[list[Child]] = []
    for name, known in volumes_ml.items():
        numbers = (np.median(known), known.min(), known.max()) if known.size else (math.nan,) * 3
        rows.append([name, f"{known.size} of {len(cases)}", *(_format_volume(float(number)) for number in numbers)])
    described = "; ".join(
        f"{name}: median {_format_volume(float(np.median(known)))} ml"
        for name, known in list(volumes_ml.items())[:N_LABELS_DESCRIBED]
        if known.size
    )
    caption = (
        "Each dot is a case that has the label. The red, solid line is the mean, the green, dashed line the median; "
        "the box holds the middle half. Dots far from all others are listed above."
    )
    return join(
        pictures.add_chart(
            "volumes.png",
            lambda path: draw_volumes(path, volumes_ml),
            description=f"Volumes per label. {described}",
            caption=caption,
        ),
        fold_away(f"The volumes of all {len(rows)} labels", table(columns, rows, is_stacked=True), n_rows=len(rows)),
    )


def _list_cases(cases: Sequence[PredictedCase], names: Sequence[str]) -> Html:
    """Every case; with the volumes of its labels where they are not too many."""
    has_estimate = any(case.estimated_dice is not None for case in cases)
    has_volumes = len(cases) * len(names) <= MAX_VOLUMES_LISTED
    columns = [Column(title="case")]
    columns += [Column(title="Dice to expect", kind="number")] if has_estimate else []
    columns += [Column(title="time", kind="number")]
    columns += [Column(title=f"{name}, ml", kind="number") for name in names] if has_volumes else []
    rows: list[list[Child]] = []
    for case in cases:
        row: list[Child] = [case.case]
        if has_estimate:
            row.append(_tell_estimate(case))
        row.append(NO_VALUE if case.error is not None else format_duration(case.seconds))
        if has_volumes:
            row += [
                NO_VALUE if case.error is not None else _format_volume(case.volumes_ml.get(name, 0.0)) for name in names
            ]
        rows.append(row)
    note = (
        "" if has_volumes else element("p", "Their volumes are too many to be listed here; prediction.json has them.")
    )
    return join(note, fold_away(f"All {len(rows)} cases", table(columns, rows), n_rows=len(rows)))


def _tell_estimate(case: PredictedCase) -> Html:
    if case.estimated_dice is None or not math.isfinite(case.estimated_dice):
        return join(NO_VALUE)
    return join(f"{case.estimated_dice:.2f}", " low" if case.is_flagged else "")


def _format_volume(volume_ml: float) -> str:
    return format_number(volume_ml, n_digits=3)
