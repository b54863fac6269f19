"""What a newcomer runs first, a second time."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoseg.core.errors import AutosegError
from autoseg.core.serialize import write_json
from autoseg.pipeline import run_demo


def test_a_folder_with_the_data_of_another_seed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    write_json(tmp_path / "demo.json", {"seed": 0})
    with pytest.raises(AutosegError, match="holds the demo of another seed; name another folder"):
        run_demo(tmp_path, max_time_s=1.0, seed=1)
