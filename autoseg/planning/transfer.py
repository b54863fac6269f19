"""The plan of one dataset for another: its spacing, patches and networks, with this one's sizes and intensities."""

from __future__ import annotations

import logging
from dataclasses import replace

from autoseg import __version__
from autoseg.core.errors import PlanError
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import digest
from autoseg.planning.configurations import QUICK_NAMES
from autoseg.planning.fingerprint import Fingerprint, check_fingerprint
from autoseg.planning.grid import Grid, adopt_grid, choose_grid
from autoseg.planning.memory import count_feature_map_values
from autoseg.planning.mirroring import explain_mirroring
from autoseg.planning.plan import ConfigurationPlan, Plan, Reason
from autoseg.planning.planner import choose_normalization, recommend
from autoseg.planning.presets import Preset, find_preset
from autoseg.planning.topology import MAX_SPACING_RATIO

logger = logging.getLogger(__name__)

PADDING_FACTOR = 2
"""A patch that is this many times longer than every case along some axis is mostly padding."""


def transfer_plan(
    source: Plan, fingerprint: Fingerprint, labels: LabelSpec, *, dataset: str, n_folds: int, name: str
) -> Plan:
    """The plan of another dataset for this one: its spacings, patches, batches and networks.

    Sizes of the cases and normalization are this dataset's own, and so is the through-plane axis where its slices are
    thick; configurations that it has no room for are left out.

    Args:
        source: the other plan.
        fingerprint: what the scans of this dataset are like.
        labels: the classes of this dataset.
        dataset: this dataset's name.
        n_folds: folds of cross-validation.
        name: of the other plan, for the reasons.

    Returns:
        The plan.

    Raises:
        PlanError: the fingerprint holds impossible numbers, not even one patch fits with so many classes, or the other
            plan has no configuration that suits single slices.
    """
    check_fingerprint(fingerprint)
    own = choose_grid(fingerprint.cases)
    axis_order, axis_text = _choose_axis_order(source, own, name)
    like = f"as in {name}"
    normalization, normalization_reasons = choose_normalization(
        fingerprint.channels, fingerprint.median_cropped_fraction
    )
    reasons = [
        Reason(subject="preset", text=like),
        Reason(subject="gpu_memory_gib", text=like),
        Reason(subject="axis_order", text=axis_text),
        *normalization_reasons,
        Reason(subject="mirroring", text=explain_mirroring(labels)),
    ]
    preset = find_preset(source.preset, source.gpu_memory_gib)
    configurations = {}
    for key, configuration in source.configurations.items():
        if key in QUICK_NAMES.values():
            # It was made for the time that there was for another dataset.
            continue
        if configuration.n_axes == 3 and not own.has_slices:
            text = f"{name} has it, but the median case here is a single slice"
            reasons.append(Reason(subject=f"configurations.{key}", text=text))
            continue
        # Where slices keep their distance, any spacing along the first axis leaves the in-plane sizes as they are.
        first, second, third = (*configuration.spacing_mm, *configuration.spacing_mm)[-3:]
        grid = adopt_grid(fingerprint.cases, spacing_mm=(first, second, third), axis_order=axis_order, reason=like)
        configurations[key], more = _transfer(configuration, grid, labels.n_outputs, preset, name)
        reasons += more
    if not configurations:
        raise PlanError(
            f"{name} has 3D configurations only, and the median case here is a single slice; plan without it"
        )
    recommended, why = recommend(configurations)
    return replace(
        source,
        dataset=dataset,
        labels=labels,
        normalization=normalization,
        axis_order=axis_order,
        optional_channels=(),
        n_folds=n_folds,
        configurations=configurations,
        recommended=recommended,
        reasons=(*reasons, Reason(subject="recommended", text=why)),
        measurements=(),
        provenance={"autoseg": __version__, "fingerprint": digest(fingerprint), "like": name},
        spacing_range_mm=fingerprint.spacing_range_mm,
    ).signed()


def _choose_axis_order(source: Plan, own: Grid, name: str) -> tuple[tuple[int, int, int], str]:
    """The other plan's, unless the slices of these scans are thick, or single, along another axis."""
    is_thick = max(own.spacing_mm) / min(own.spacing_mm) >= MAX_SPACING_RATIO
    if own.axis_order == source.axis_order or (own.has_slices and not is_thick):
        return source.axis_order, f"as in {name}"
    return own.axis_order, f"not as in {name}: {own.axis_order_reason}"


def _transfer(
    configuration: ConfigurationPlan, grid: Grid, n_outputs: int, preset: Preset, name: str
) -> tuple[ConfigurationPlan, list[Reason]]:
    """One configuration with the sizes that these cases have on its grid, and with a batch that fits."""
    n_axes, key, like = configuration.n_axes, configuration.name, f"as in {name}"
    values = count_feature_map_values(configuration.network, configuration.patch_size, n_outputs)
    fitting = preset.budgets[n_axes].largest_batch_size(values)
    if not fitting:
        raise PlanError(
            f"{key} of {name} does not fit {preset.memory_gib:g} GiB with the {n_outputs} outputs that this dataset "
            "needs; take another plan, or plan without one"
        )
    batch_size = min(configuration.batch_size, fitting)
    fewer = f", but with {n_outputs} outputs no more than {batch_size} fit"
    largest = grid.largest_shape[-n_axes:]
    is_padded = any(size >= PADDING_FACTOR * most for size, most in zip(configuration.patch_size, largest, strict=True))
    padding = "; larger than any case here, so that much of it is padding"
    if is_padded:
        logger.warning("%s: the patch of %s is%s", key, name, padding.removeprefix(";"))
    texts = {
        "spacing_mm": like,
        "patch_size": like + padding * is_padded,
        "network": like,
        "batch_size": like + fewer * (batch_size != configuration.batch_size),
        "batch_dice": like,
    }
    made = replace(
        configuration,
        median_shape=grid.median_shape[-n_axes:],
        largest_shape=largest,
        batch_size=batch_size,
    )
    return made, [Reason(subject=f"configurations.{key}.{decision}", text=text) for decision, text in texts.items()]
