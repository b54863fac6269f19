"""What a plan means: the page that explains it, and what it takes on a real GPU."""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.core.errors import AutosegError, TrainingError
from autoseg.core.labels import LabelSpec
from autoseg.core.runtime import resolve_device
from autoseg.core.serialize import read_json, write_json
from autoseg.data.dataset import Case, Dataset
from autoseg.data.io import read_raw
from autoseg.data.references import read_shown_reference
from autoseg.pipeline.configurations import default_configuration
from autoseg.pipeline.workspace import DEFAULT_WORK, Workspace
from autoseg.planning.estimates import Estimates, estimate
from autoseg.planning.fingerprint import Fingerprint
from autoseg.planning.plan import Plan
from autoseg.training.config import ITERATIONS_PER_EPOCH
from autoseg.training.folds import PLAN
from autoseg.training.record import FoldFiles, read_log

if TYPE_CHECKING:
    from autoseg.reporting.figures import OverlayRow

logger = logging.getLogger(__name__)

N_CASES_SHOWN = 3


def require_gpu(device: str) -> None:
    """Makes sure that there is a GPU to measure on.

    Raises:
        TrainingError: there is none.
    """
    found = resolve_device(device).type
    if found != "cuda":
        raise TrainingError(
            f"--measure needs an NVIDIA GPU, found the device '{found}'; run it where the training will run. "
            "Without --measure, the plan estimates the memory."
        )


def measure(
    work: Path | str = DEFAULT_WORK, *, configurations: Sequence[str] | None = None, device: str = "auto"
) -> Plan:
    """Runs real training steps on a GPU to find their peak memory and the largest batch, and records both.

    Args:
        work: the work folder, planned.
        configurations: their names; None for the one that is trained by default.
        device: "auto" or "cuda:1".

    Returns:
        The plan with the measurements, which is also in `work/plan.json`.

    Raises:
        TrainingError: there is no GPU, or the plan does not fit it.
    """
    require_gpu(device)
    workspace = Workspace(root=Path(work))
    workspace.read_plan()  # Before anything is written into a folder that is none.
    with workspace.planning():
        plan = workspace.read_plan()
        plan = measure_plan(workspace, plan, configurations or (default_configuration(plan).name,), device=device)
        fingerprint = workspace.read_fingerprint()
        write_report(workspace, workspace.read_dataset(), plan, fingerprint, estimate(fingerprint, plan))
    return plan


def measure_plan(workspace: Workspace, plan: Plan, configurations: Sequence[str], *, device: str) -> Plan:
    """The plan with measurements of some of its configurations; written down after each of them."""
    from autoseg.training.measure import measure_configuration

    for name in configurations:
        chosen = default_configuration(plan, name)
        measured = measure_configuration(plan, chosen, device=resolve_device(device))
        others = (known for known in plan.measurements if known.configuration != name)
        plan = dataclasses.replace(plan, measurements=(*others, measured))
        write_json(workspace.plan_file, plan)
    return plan


def write_report(
    workspace: Workspace, index: Dataset, plan: Plan, fingerprint: Fingerprint, estimates: Estimates
) -> Path:
    """Writes `report/plan.html`: the plan and its reasons, the fingerprint, and a few cases with their labels."""
    from autoseg.reporting.plan_page import write_plan_page

    # Of typical size: one of the middle, and those that are larger and smaller than most.
    by_size = sorted(range(len(index.cases)), key=lambda number: prod(fingerprint.cases[number].cropped_shape))
    shown = sorted({by_size[len(by_size) * part // (2 * N_CASES_SHOWN)] for part in range(1, 2 * N_CASES_SHOWN, 2)})
    return write_plan_page(
        workspace.plan_page,
        plan,
        fingerprint,
        estimates,
        # One after the other: of large scans no more than one should be in memory.
        overlays=(_load_overlay(index.cases[number], plan.labels) for number in shown),
        epoch_times_s=_epoch_times_s(workspace, plan),
    )


def _load_overlay(case: Case, labels: LabelSpec) -> OverlayRow:
    """The first channel of a case and its labels. They have been checked; only the slices to show are converted."""
    from autoseg.reporting.figures import OverlayRow

    raw = read_raw(case.image_files[0])
    label = read_shown_reference(case, labels)
    return OverlayRow(title=case.id, image=raw.load_shown(), spacing_mm=raw.geometry.spacing_mm, reference=label)


def _epoch_times_s(workspace: Workspace, plan: Plan) -> dict[str, float]:
    """Median time of a full epoch of every configuration that was trained here as it is planned now."""
    times = {}
    for name, configuration in plan.configurations.items():
        model = workspace.model(name)
        try:
            trained: Plan = read_json(model / PLAN, Plan)
            if trained.configurations.get(name) != configuration:
                continue
            logs = [read_log(FoldFiles(folder=fold).log) for fold in model.glob("fold_*")]
        except AutosegError as error:
            # Most often there is no model yet; one that is damaged must not keep anybody from planning.
            logger.debug("no time per epoch of %s: %s", name, error)
            continue
        # Epochs of short trainings have fewer steps.
        step_times_s = [
            (epochs[-1].time_s - epochs[0].time_s) / (epochs[-1].iteration - epochs[0].iteration)
            for epochs in logs
            if len(epochs) > 1
        ]
        if step_times_s:
            times[name] = statistics.median(step_times_s) * ITERATIONS_PER_EPOCH
    return times
