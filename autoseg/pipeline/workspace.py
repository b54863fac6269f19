"""The work folder: where everything is kept."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from glob import escape
from math import prod
from pathlib import Path
from typing import TypeVar

from autoseg.core.errors import FormatError, PlanError, WorkspaceError
from autoseg.core.locks import locked
from autoseg.core.runtime import format_duration
from autoseg.core.serialize import read_json
from autoseg.core.versions import note_writer, refuse_newer, tell_writer
from autoseg.data.dataset import Dataset
from autoseg.data.splits import Splits
from autoseg.planning.checks import check_plan
from autoseg.planning.configurations import largest_voxel_ml
from autoseg.planning.fingerprint import Fingerprint
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.training.config import Budget

T = TypeVar("T")

logger = logging.getLogger(__name__)

DEFAULT_WORK = Path("autoseg-work")
CASCADE = "cascade"
"""What a user may call the second stage of a cascade, however it is called in the plan."""

MIN_CASCADE_TIME_S = 3600.0
"""For a fold. With less, a recommended cascade is not trained: its second stage waits for the first stages of all
folds, and then has too little time to add to them."""


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """The work folder: where everything is kept that more than one part of the pipeline uses.

    Raises:
        WorkspaceError: a newer autoseg has made it.
    """

    root: Path

    def __post_init__(self) -> None:
        refuse_newer(self.root)

    @property
    def dataset_file(self) -> Path:
        """Index of the cases."""
        return self.root / "dataset.json"

    @property
    def check_file(self) -> Path:
        """What was found wrong."""
        return self.root / "check.json"

    @property
    def fingerprint_file(self) -> Path:
        """Geometry and intensities."""
        return self.root / "fingerprint.json"

    @property
    def plan_file(self) -> Path:
        """Every decision with its reason."""
        return self.root / "plan.json"

    @property
    def splits_file(self) -> Path:
        """The folds."""
        return self.root / "splits.json"

    @property
    def plan_page(self) -> Path:
        """The plan explained, for a browser."""
        return self.root / "report" / "plan.html"

    @property
    def selection_file(self) -> Path:
        """Which configuration or ensemble predicts."""
        return self.root / "selection.json"

    @property
    def results_page(self) -> Path:
        """How good the trained configurations are, for a browser."""
        return self.root / "report" / "results.html"

    def preprocessed(self, grid: str, case: str) -> Path:
        """Folder of a case on a grid, see `Plan.grid`."""
        return self.root / "preprocessed" / grid / case

    def first_stage(self, configuration: str, case: str) -> Path:
        """Folder of what the first stage has found in a case, on the grid of the second stage of that name."""
        return self.root / "preprocessed" / f"{configuration}.first_stage" / case

    def model(self, configuration: str) -> Path:
        """Folder of a trained configuration; complete in itself for prediction."""
        return self.root / "models" / configuration

    def crossval_file(self, configuration: str) -> Path:
        """The cross-validation of a trained configuration."""
        return self.model(configuration) / "cv.json"

    def ensemble(self, configurations: Sequence[str]) -> Path:
        """Folder of the out-of-fold label maps of several configurations together."""
        return self.root / "models" / "ensembles" / "+".join(configurations)

    def read_plan(self) -> Plan:
        """The plan.

        Raises:
            WorkspaceError: there is none yet.
            AutosegError: a person has edited it, and its decisions do not go together any more.
        """
        plan: Plan = self._read(self.plan_file, Plan)
        try:
            check_plan(plan)
        except PlanError as error:
            raise PlanError(f"{self.plan_file}: {error}") from error
        return plan

    def read_fingerprint(self) -> Fingerprint:
        """What the scans are like, see `read_plan`."""
        return self._read(self.fingerprint_file, Fingerprint)

    def read_dataset(self) -> Dataset:
        """The index of cases, see `read_plan`."""
        return self._read(self.dataset_file, Dataset)

    def read_splits(self) -> Splits:
        """The folds, see `read_plan`."""
        return self._read(self.splits_file, Splits)

    def _read(self, file: Path, kind: type[T]) -> T:
        if not file.is_file():
            raise WorkspaceError(
                f"{file}: no such file. Run 'autoseg plan DATASET' here first, or name the work folder with -w."
            )
        try:
            content: T = read_json(file, kind)
        except FormatError as error:
            raise FormatError(
                f"{error}. Mend the file, or delete it and run 'autoseg plan DATASET' again.{tell_writer(self.root)}"
            ) from error
        return content

    # -- locks ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def planning(self) -> Iterator[None]:
        """While the block runs, no other process plans or preprocesses what it has planned; this one writes here."""
        with locked(self.root / ".planning.lock", waiting_for=f"plans in {self.root}"):
            # It may have been a newer one that was waited for.
            refuse_newer(self.root)
            note_writer(self.root)
            yield

    @contextmanager
    def selecting(self) -> Iterator[None]:
        """While the block runs, no other process selects."""
        with locked(self.root / ".select.lock", waiting_for="selects"):
            yield

    @contextmanager
    def preprocessing(self, grid: str, part: tuple[int, int] = (1, 1)) -> Iterator[None]:
        """While the block runs, no other process makes these cases on a grid.

        Processes that share the cases in the same number of parts run side by side. One that takes all cases waits
        for every part, and those that come later wait for it.
        """
        folder, is_part = self.root / "preprocessed", part[1] > 1
        waiting_for = f"preprocesses {grid}"
        with ExitStack() as held:
            with ExitStack() as entering:
                entering.enter_context(locked(folder / f".{grid}.lock", waiting_for=waiting_for))
                for name in {path.name.removesuffix(".soft") for path in folder.glob(f".{escape(grid)}.part-*")}:
                    other = re.fullmatch(rf"\.{re.escape(grid)}\.part-\d+-of-(\d+)\.lock", name)
                    if other is not None and int(other[1]) != part[1]:
                        # None of them begins before this process has a lock of its own.
                        with locked(folder / name, waiting_for=waiting_for):
                            pass
                if is_part:
                    own = folder / f".{grid}.part-{part[0]}-of-{part[1]}.lock"
                    held.enter_context(locked(own, waiting_for=waiting_for))
                else:
                    held.enter_context(entering.pop_all())
            yield


def default_configuration(plan: Plan, name: str | None = None) -> ConfigurationPlan:
    """The configuration to train and to predict with, where a user names one or none.

    Args:
        plan: the plan.
        name: of a configuration, "cascade" for the second stage of the cascade, or None for the recommended one.

    Raises:
        PlanError: there is none of that name.
    """
    if name == CASCADE and name not in plan.configurations:
        if plan.cascade is None:
            raise why_no_cascade(plan)
        return plan.cascade
    return plan.configuration(plan.recommended if name is None else name)


def configuration_to_train(
    plan: Plan, name: str | None, budget: Budget | None, *, on_cpu: bool, fingerprint: Callable[[], Fingerprint]
) -> ConfigurationPlan:
    """`default_configuration`, but for a recommended cascade for which there is little time.

    Of that it is the first stage, or 3d_fullres where the smallest structures have too few voxels in the first stage.

    Args:
        plan: the plan.
        name: as in `default_configuration`.
        budget: of each fold; None for a full training.
        on_cpu: whether it is trained there.
        fingerprint: reads that of the dataset.
    """
    chosen = default_configuration(plan, name)
    if name is not None or chosen.previous is None:
        return chosen
    time_s = None if budget is None else budget.max_time_s
    if not on_cpu and (time_s is None or time_s >= MIN_CASCADE_TIME_S):
        return chosen
    first = plan.configuration(chosen.previous)
    text = (
        "a cascade takes at least %s for each fold, on a GPU: its first stage, %s, is trained alone; -c cascade trains "
        "both"
    )
    if "3d_fullres" in plan.configurations and prod(first.spacing_mm) / 1000 > largest_voxel_ml(fingerprint()):
        first = plan.configuration("3d_fullres")
        text = (
            "a cascade takes at least %s for each fold, on a GPU, and the voxels of its first stage are too large for "
            "the smallest structures: %s is trained; -c cascade trains the cascade"
        )
    logger.info(text, format_duration(MIN_CASCADE_TIME_S), first.name)
    return first


def why_no_cascade(plan: Plan) -> PlanError:
    """Says why a plan has no cascade, and how to get one."""
    subjects = ("configurations.3d_lowres", "configurations")
    why = next((reason.text for subject in subjects for reason in plan.reasons if reason.subject == subject), "")
    advice = "'autoseg train -c cascade --force' makes one all the same"
    if "3d_fullres" not in plan.configurations:
        advice = "there is no 3d_fullres either, which it would refine"
    return PlanError(f"the plan has no cascade{': ' if why else ''}{why}; {advice}")
