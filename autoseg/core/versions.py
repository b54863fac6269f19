"""Which autoseg has written a folder, so that an older one says so instead of misreading or overwriting it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autoseg import __version__
from autoseg.core.errors import FormatError, WorkspaceError
from autoseg.core.serialize import holds_json, read_json, write_json

FOLDER_FORMAT = 2
"""Counts up with each change that an autoseg from before it cannot read, in any file of a work or model folder."""
VERSION_FILE = "autoseg.json"


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Who has written a folder.

    Attributes:
        format: `FOLDER_FORMAT` of then.
        autoseg: version.
    """

    format: int
    autoseg: str


def read_writer(folder: Path) -> Writer | None:
    """Who has written a folder; None where nobody says so.

    Raises:
        WorkspaceError: the file that says it is something else.
    """
    file = folder / VERSION_FILE
    if not file.is_file():
        return None
    try:
        content = read_json(file)
        # A newer one may say more.
        if isinstance(content["format"], int):
            return Writer(format=content["format"], autoseg=str(content["autoseg"]))
    except (FormatError, KeyError, TypeError):
        pass
    raise WorkspaceError(
        f"{file}: does not say which autoseg has written this folder; delete it where it is damaged, or name another "
        "folder"
    )


def note_writer(folder: Path) -> None:
    """Writes down that this autoseg writes into a folder, which it can read."""
    file, content = folder / VERSION_FILE, Writer(format=FOLDER_FORMAT, autoseg=__version__)
    if not holds_json(file, content):
        write_json(file, content)


def refuse_newer(folder: Path) -> None:
    """Makes sure that no newer autoseg has written a folder in a format that this one does not know.

    Raises:
        WorkspaceError: one has.
    """
    writer = read_writer(folder)
    if writer is not None and writer.format > FOLDER_FORMAT:
        raise WorkspaceError(
            f"{folder / VERSION_FILE}: the folder was made by a newer autoseg, {writer.autoseg} (format "
            f"{writer.format}; this is {__version__}, which knows {FOLDER_FORMAT}); update autoseg, or name another one"
        )


def tell_writer(folder: Path) -> str:
    """Who has written a folder, where that was another autoseg: for a message about a file that cannot be read."""
    writer = read_writer(folder)
    if writer is None or writer.autoseg == __version__:
        return ""
    return f" The folder was written by autoseg {writer.autoseg}; this is {__version__}."
