"""One fold that validates on cases that the user names: trained, scored, selected and reported like many."""

from __future__ import annotations

import html
from pathlib import Path

import pytest

import autoseg
from autoseg.core.errors import TrainingError
from autoseg.core.serialize import read_json, write_json
from autoseg.data.splits import Fold, Splits
from autoseg.pipeline import Workspace
from autoseg.pipeline.crossval import read_cross_validation
from autoseg.training.config import Budget, TrainConfig


def test_a_fixed_validation_is_scored_and_selected_on(tiny_dataset: Path, tmp_path: Path) -> None:
    names = sorted(file.name.removesuffix(".nii.gz") for file in (tiny_dataset / "labelsTr").iterdir())
    (tmp_path / "held.txt").write_text("\n".join(names[:2]))
    workspace = Workspace(root=tmp_path / "work")
    autoseg.plan(tiny_dataset, workspace.root, splits=autoseg.SplitChoices(validation=tmp_path / "held.txt"))
    scores = autoseg.train(workspace.root, config=TrainConfig(budget=Budget(iterations=2)), device="cpu")
    assert list(scores) == [0]
    selection = autoseg.select(workspace.root, device="cpu")
    known = read_cross_validation(workspace, selection.chosen)
    assert known is not None
    assert known.folds == dict.fromkeys(names[:2], 0)
    assert sorted(score.case for score in known.evaluation.cases) == names[:2]
    page = html.unescape(autoseg.report(workspace.root).read_text())
    assert "It is trained once: one fold, which validates on the cases that held.txt lists." in page

    # Folds of other cases do not count, and one that has learned from what it validates on is never judged.
    folds = workspace.read_splits().folds
    write_json(workspace.splits_file, Splits(folds=(Fold(training=folds[0].validation, validation=folds[0].training),)))
    with pytest.raises(TrainingError, match="fold 0 was trained on other cases than the splits have now"):
        autoseg.select(workspace.root, device="cpu")
    write_json(workspace.splits_file, Splits(folds=(Fold(training=tuple(names), validation=tuple(names)),)))
    with pytest.raises(TrainingError, match=r"judged on the same cases, .* or tell with --groups"):
        autoseg.select(workspace.root, device="cpu")
    assert read_json(workspace.selection_file)["chosen"] == selection.chosen
