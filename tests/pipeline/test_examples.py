"""The examples in the docstrings of the public functions run as they stand."""

from __future__ import annotations

import doctest
import shutil
from pathlib import Path

import numpy as np
import pytest

import autoseg
from autoseg.core.errors import AutosegError


@pytest.fixture(scope="module")
def folder(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples run: `dataset` is there, and what an earlier example left."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(tiny_dataset, folder / "dataset")
    return folder


@pytest.mark.parametrize("name", ["plan", "train", "predict", "evaluate", "Predictor", "export", "select", "report"])
def test_example_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In the order of the parameters: each needs what those before it have made."""
    monkeypatch.chdir(folder)
    public = getattr(autoseg, name)
    examples = doctest.DocTestFinder(recurse=False).find(public, name, globs={"np": np})
    assert sum(len(example.examples) for example in examples) >= 2, "there is no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in examples:
        runner.run(example)
    assert not runner.failures


def test_public_names_are_listed_and_others_are_not() -> None:
    stages = {"check", "plan", "train", "select", "predict", "evaluate", "report", "export"}
    assert set(autoseg.__all__) == {"Choices", "Predictor", "SplitChoices", "__version__", *stages}
    with pytest.raises(AttributeError, match="nonsense"):
        _ = autoseg.nonsense


def test_errors_are_of_one_kind(tmp_path: Path) -> None:
    with pytest.raises(AutosegError):
        autoseg.plan(tmp_path / "missing", tmp_path / "work")
    with pytest.raises(AutosegError):
        autoseg.train(tmp_path / "work")
    with pytest.raises(AutosegError):
        autoseg.Predictor(tmp_path / "work")
    with pytest.raises(AutosegError):
        autoseg.evaluate(tmp_path / "a", tmp_path / "b")
