"""The page about a plan: what was found in the scans, what was decided and why, and what it will take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from autoseg import __version__
from autoseg.core.errors import MAX_SHOWN_PER_KIND, Problem, group_problems, list_some
from autoseg.core.runtime import format_memory
from autoseg.core.serialize import atomic_path
from autoseg.planning.estimates import Estimates
from autoseg.planning.fingerprint import Fingerprint
from autoseg.planning.plan import ConfigurationPlan, Plan, Reason
from autoseg.reporting.figures import OverlayRow
from autoseg.reporting.html import (
    Child,
    Html,
    bullets,
    classed,
    element,
    figure,
    format_size,
    join,
    page,
    section,
)
from autoseg.reporting.label_slices import draw_label_slices, show_label_slices, show_legend
from autoseg.reporting.plan_figures import show_channels, show_geometry, show_labels
from autoseg.reporting.plan_tables import (
    OTHER_PURPOSE,
    PURPOSES,
    RECOMMENDED,
    WHOLE_DATASET,
    group_reasons,
    name_axes,
    show_configuration_decisions,
    show_costs,
    show_general_decisions,
    show_reason,
    show_stages,
    tell_extent,
)
from autoseg.reporting.report_parts import show_facts
from autoseg.reporting.text import EDITED


def write_plan_page(
    path: Path,
    plan: Plan,
    fingerprint: Fingerprint,
    estimates: Estimates,
    *,
    overlays: Iterable[OverlayRow] = (),
    epoch_times_s: Mapping[str, float] | None = None,
) -> Path:
    """Writes a page that explains a plan to clinicians and to engineers. It is one file that needs no other.

    Args:
        path: of the HTML file.
        plan: what was decided.
        fingerprint: of the dataset that it was decided for.
        estimates: what it will take.
        overlays: cases to show with their labels, which have the values of the files; drawn one by one.
        epoch_times_s: what an epoch took in earlier trainings, by configuration.

    Returns:
        The path.

    Raises:
        PlanError: a network's architecture is unknown.
    """
    reasons = group_reasons(plan)
    labels = show_labels(fingerprint, plan.labels)
    sections = {
        "warnings": ("Warnings", _show_warnings(estimates.warnings)),
        "geometry": ("The scans", show_geometry(fingerprint, plan)),
        "intensities": ("Intensities", show_channels(fingerprint.channels)),
        "labels": ("Labels", labels),
        "examples": ("Examples", _show_examples(plan, overlays)),
        "decisions": ("Decisions", show_general_decisions(plan, reasons[WHOLE_DATASET])),
        **{
            f"configuration-{name}": (name, _show_configuration(plan, configuration, reasons[name]))
            for name, configuration in plan.configurations.items()
        },
        "costs": ("Costs", show_costs(plan, estimates, epoch_times_s or {})),
    }
    shown = {key: (title, content) for key, (title, content) in sections.items() if content is not None}
    links = [element("a", title, attributes={"href": f"#{key}"}) for key, (title, _) in shown.items()]
    text = page(
        f"Plan for {plan.dataset}",
        header=join(_show_heading(plan, fingerprint, estimates, reasons[RECOMMENDED]), element("nav", *links)),
        body=[section(key, _add_badge(plan, title), content) for key, (title, content) in shown.items()],
        footer=_show_footer(plan),
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _show_heading(plan: Plan, fingerprint: Fingerprint, estimates: Estimates, reasons: Sequence[Reason]) -> Html:
    folds = f"{plan.n_folds} folds of cross-validation" if plan.n_folds > 1 else "one fold, no cross-validation"
    facts = [
        ("cases", str(len(fingerprint.cases)), folds),
        ("channels", str(len(plan.channels)), list_some(plan.channels)),
        ("labels", str(len(plan.labels.names)), list_some(plan.labels.names)),
        ("recommended", plan.recommended, f"of {len(plan.configurations)} planned"),
    ]
    return join(
        classed("p", "kicker", "autoseg plan"),
        element("h1", plan.dataset),
        show_facts(facts),
        classed("p", "lead", EDITED) if plan.is_edited else "",
        classed("p", "lead", *_tell_recommendation(plan, estimates)),
        classed("p", "lead", element("strong", "Why: "), *map(show_reason, reasons)) if reasons else "",
    )


def _tell_recommendation(plan: Plan, estimates: Estimates) -> list[Child]:
    """What is recommended, in words."""
    chosen = plan.configuration(plan.recommended)
    kind, part = ("pixels", "patches") if chosen.n_axes == 2 else ("voxels", "blocks")
    text = (
        f", which {PURPOSES.get(chosen.name, OTHER_PURPOSE)}. Every scan is first brought to {kind} of "
        f"{format_size(chosen.spacing_mm)} mm"
    )
    text += (
        f" ({name_axes(plan, chosen)}); the median case is then {format_size(chosen.median_shape)} {kind} large. "
        f"The network sees {part} of {format_size(chosen.patch_size)} {kind} at once, which is "
        f"{tell_extent(chosen)}."
    )
    for entry in estimates.configurations:
        if entry.configuration == chosen.name:
            text += (
                f" Training takes {chosen.batch_size} of them at a time and needs about "
                f"{format_memory(entry.training_memory_gib)} of a GPU's memory; the preprocessed cases take "
                f"{format_memory(entry.disk_gib)} on disk."
            )
    return ["The recommended configuration is ", element("strong", chosen.name), text]


def _show_warnings(problems: Sequence[Problem]) -> Html | None:
    """Equal kinds together, as `autoseg.core.errors.describe_problems` does."""
    boxes = []
    for (kind, advice), members in group_problems(problems).items():
        lines = [member.describe() for member in members[:MAX_SHOWN_PER_KIND] if member.describe()]
        if len(members) > MAX_SHOWN_PER_KIND:
            lines.append(f"... and {len(members) - MAX_SHOWN_PER_KIND} more")
        boxes.append(
            classed(
                "div",
                "warning",
                element("h3", f"{kind} ({len(members)})"),
                bullets(lines) if lines else "",
                element("p", element("strong", "What to do: "), advice) if advice else "",
            )
        )
    return join(*boxes) if boxes else None


def _show_examples(plan: Plan, overlays: Iterable[OverlayRow]) -> Html | None:
    names = dict(zip(plan.labels.values, plan.labels.names, strict=True))
    parts: list[Child] = []
    for row in overlays:
        drawn = draw_label_slices(row, plan.labels.values)
        caption = join(element("strong", row.title), show_legend(drawn, names) or ", no labels here")
        parts.append(figure(show_label_slices(drawn, title=row.title), caption))
    if not parts:
        return None
    return join(element("p", "Slices seen from the feet, anterior up: the patient's right (R) is on the left."), *parts)


def _show_configuration(plan: Plan, configuration: ConfigurationPlan, reasons: Sequence[Reason]) -> Html:
    return join(
        show_configuration_decisions(plan, configuration, reasons),
        element("h3", "The network, stage by stage"),
        show_stages(plan, configuration),
    )


def _add_badge(plan: Plan, title: str) -> Child:
    return join(title, classed("span", "badge", "recommended")) if title == plan.recommended else title


def _show_footer(plan: Plan) -> Html:
    made_of = "; ".join(f"{key}: {value}" for key, value in plan.provenance.items())
    return element("p", f"Written by autoseg {__version__}. Provenance of the plan: {made_of or 'not recorded'}.")
