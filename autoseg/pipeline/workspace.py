"""The work folder: where everything is kept."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TypeVar

from autoseg.core.errors import FormatError, PlanError, WorkspaceError
from autoseg.core.locks import locked
from autoseg.core.serialize import read_json
from autoseg.core.versions import note_writer, refuse_newer, tell_writer
from autoseg.data.dataset import Dataset
from autoseg.data.splits import Splits
from autoseg.planning.checks import check_plan
from autoseg.planning.fingerprint import Fingerprint
from autoseg.planning.plan import Plan

T = TypeVar("T")

logger = logging.getLogger(__name__)

DEFAULT_WORK = Path("autoseg-work")


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
