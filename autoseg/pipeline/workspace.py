"""The work folder: where everything is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autoseg.core.errors import WorkspaceError
from autoseg.core.serialize import read_json
from autoseg.data.dataset import Dataset
from autoseg.data.splits import Splits
from autoseg.planning.plan import Plan

DEFAULT_WORK = Path("autoseg-work")


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """The work folder: where everything is kept. Nothing else knows these names."""

    root: Path

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

    def preprocessed(self, configuration: str, case: str) -> Path:
        """Folder of a preprocessed case."""
        return self.root / "preprocessed" / configuration / case

    def model(self, configuration: str) -> Path:
        """Folder of a trained configuration; complete in itself for prediction."""
        return self.root / "models" / configuration

    def read_plan(self) -> Plan:
        """The plan.

        Raises:
            WorkspaceError: there is none yet.
        """
        self._require(self.plan_file)
        plan: Plan = read_json(self.plan_file, Plan)
        return plan

    def read_dataset(self) -> Dataset:
        """The index of cases, see `read_plan`."""
        self._require(self.dataset_file)
        dataset: Dataset = read_json(self.dataset_file, Dataset)
        return dataset

    def read_splits(self) -> Splits:
        """The folds, see `read_plan`."""
        self._require(self.splits_file)
        splits: Splits = read_json(self.splits_file, Splits)
        return splits

    def _require(self, file: Path) -> None:
        if not file.is_file():
            raise WorkspaceError(
                f"{file}: no such file. Run 'autoseg plan DATASET' here first, or name the work folder with -w."
            )
