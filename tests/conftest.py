"""Data that several tests use: generated once for a whole run."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoseg.data.phantom import write_phantom_dataset


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six CT-like cases to train on and two to test on, of about 13 x 32 x 36 voxels. Do not change it."""
    folder = tmp_path_factory.mktemp("tiny") / "dataset"
    return write_phantom_dataset(folder, n_train=6, n_test=2, coarseness=2.0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and reference results that are not part of the project."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the folder ../shared with real data is not here")
    return folder
