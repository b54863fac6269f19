"""Data that several tests use: generated once for a whole run."""

from __future__ import annotations

from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On volumes as small as those of tests, handing work to torch's threads takes longer than the work."""
    import torch

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
