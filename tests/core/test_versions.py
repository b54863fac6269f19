"""Folders that another autoseg has written."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoseg import __version__
from autoseg.core.errors import WorkspaceError
from autoseg.core.serialize import write_json
from autoseg.core.versions import FOLDER_FORMAT, VERSION_FILE, Writer, note_writer, read_writer, refuse_newer


def test_a_folder_says_who_has_written_it(tmp_path: Path) -> None:
    assert read_writer(tmp_path) is None
    refuse_newer(tmp_path)
    note_writer(tmp_path)
    assert read_writer(tmp_path) == Writer(format=FOLDER_FORMAT, autoseg=__version__)
    refuse_newer(tmp_path)
    changed = (tmp_path / VERSION_FILE).stat().st_mtime_ns
    note_writer(tmp_path)
    assert (tmp_path / VERSION_FILE).stat().st_mtime_ns == changed


def test_a_newer_format_is_refused_whatever_else_its_file_says(tmp_path: Path) -> None:
    write_json(tmp_path / VERSION_FILE, {"format": FOLDER_FORMAT + 1, "autoseg": "99.1", "signed": "by someone"})
    message = rf"autoseg\.json: the folder was made by a newer autoseg, 99\.1 \(format {FOLDER_FORMAT + 1}; this is .*"
    with pytest.raises(WorkspaceError, match=message + "update autoseg, or name another one"):
        refuse_newer(tmp_path)
    write_json(tmp_path / VERSION_FILE, {"format": FOLDER_FORMAT, "autoseg": "99.1"})
    refuse_newer(tmp_path)


@pytest.mark.parametrize("content", ["", "[1]", '{"format": "1", "autoseg": "1"}', '{"format": 1}'])
def test_a_file_that_is_something_else_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / VERSION_FILE).write_text(content)
    with pytest.raises(WorkspaceError, match=r"autoseg\.json: does not say which autoseg has written this folder"):
        refuse_newer(tmp_path)
