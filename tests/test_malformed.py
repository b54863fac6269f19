"""The corpus of malformed datasets: each problem is found, told with what to do, and never as a traceback."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from malformed_datasets import CORPUS, write_entry, write_many

from autoseg.cli import main

MAX_CHARACTERS = 10_000

Run = Callable[..., tuple[int, str]]


MENDABLE = [name for name, entry in CORPUS.items() if entry.mendable]
OUTSIDE = [name for name, entry in CORPUS.items() if "--allow-outside" in entry.words]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All datasets of the corpus. Do not change them."""
    folder = tmp_path_factory.mktemp("corpus")
    for entry in CORPUS.values():
        write_entry(folder, entry)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process; the exit code, and all that it prints."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["autoseg", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        code = ended.value.code or 0
        assert isinstance(code, int)
        return code, printed.out + printed.err

    return run


def digests(folder: Path) -> dict[str, str]:
    """What the files of a folder hold."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_corpus_is_large_and_says_what_is_wrong(corpus: Path) -> None:
    malformed = [entry for entry in CORPUS.values() if entry.severity]
    assert len(malformed) >= 60
    assert len(CORPUS) - len(malformed) >= 10
    for name, entry in CORPUS.items():
        expected = json.loads((corpus / name / "expected.json").read_text())
        assert expected["problem"].endswith(".")
        assert len(expected["problem"].split()) > 3
        assert expected["exit_code"] == (2 if entry.severity == "error" else 0)


@pytest.mark.parametrize("name", CORPUS)
def test_the_problem_is_told(name: str, corpus: Path, tmp_path: Path, run: Run) -> None:
    entry = CORPUS[name]
    work = tmp_path / "work"
    code, text = run("check", corpus / name / entry.dataset, "-w", work)
    assert code == entry.exit_code, text
    assert "Traceback" not in text
    assert "this is a bug" not in text
    assert not [character for character in text if not character.isprintable() and character != "\n"]
    assert "\nERROR: disk full" not in text, "a name begins a line of its own"
    assert len(text) < MAX_CHARACTERS
    problems = json.loads((work / "check.json").read_text())["problems"]
    if not entry.severity:
        assert not [problem for problem in problems if problem["severity"] != "note"]
        return
    kinds = {problem["kind"] for problem in problems if problem["severity"] == entry.severity}
    assert kinds
    assert not entry.kind or entry.kind in kinds, kinds
    assert all(kind in text for kind in kinds)
    assert not [word for word in entry.words if word not in text], text
    assert "What to do" in text or "Expected" in text, text


@pytest.mark.parametrize("name", MENDABLE)
def test_what_can_be_mended_is_mended_and_the_files_stay(name: str, corpus: Path, tmp_path: Path, run: Run) -> None:
    dataset = corpus / name / CORPUS[name].dataset
    before = digests(dataset)
    code, text = run("check", dataset, "-w", tmp_path / "work", "--fix")
    assert code == 0, text
    problems = json.loads((tmp_path / "work" / "check.json").read_text())["problems"]
    assert {problem["severity"] for problem in problems} <= {"note"}
    assert digests(dataset) == before


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_lies_outside_is_read_where_it_is_allowed(name: str, corpus: Path, tmp_path: Path, run: Run) -> None:
    code, text = run("check", corpus / name / CORPUS[name].dataset, "-w", tmp_path / "work", "--allow-outside")
    assert code == 0, text
    assert "nothing wrong" in text


def test_a_dataset_of_many_files_is_in_order(tmp_path: Path, run: Run) -> None:
    dataset = write_many(tmp_path / "many", 20)
    assert len([path for path in dataset.rglob("*") if path.is_file()]) == 20
    code, text = run("check", dataset, "-w", tmp_path / "work")
    assert code == 0, text
    assert "10 cases, nothing wrong" in text
