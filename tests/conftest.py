"""What several tests use, made once for a whole run: data, and a Slurm."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from autoseg import pipeline
from autoseg.core.serialize import to_plain, write_json
from autoseg.data.phantom import write_phantom_dataset

# The same examples in every run, and no limit of time for one of them.
settings.register_profile("suite", derandomize=True, deadline=None, database=None)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six CT-like cases to train on and two to test on, of about 13 x 32 x 36 voxels. Do not change it."""
    folder = tmp_path_factory.mktemp("tiny") / "dataset"
    return write_phantom_dataset(folder, n_train=6, n_test=2, coarseness=2.0)


@pytest.fixture(scope="session")
def tiny_work(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with a plan of five folds for it, a network of a few thousand weights, and nothing preprocessed.

    Do not change it: copy it.
    """
    work = tmp_path_factory.mktemp("tiny") / "work"
    made = pipeline.plan(tiny_dataset, work, preprocess="none")
    plan = to_plain(made)
    for configuration in plan["configurations"].values():
        # As a person may edit it.
        network = configuration["network"]
        network["features"] = [4 + 2 * stage for stage in range(len(network["features"]))]
    write_json(work / "plan.json", plan)
    return work


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


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A running Slurm, as the environment in which its commands find it: that of the machine, or one of this run's own.

    Its own has two nodes of 8 processors and 2 pretended GPUs each, the partitions `debug` and `urgent` (which preempts
    jobs of `debug`), and holds requeued jobs back for seconds instead of minutes: scripts/slurm-test-node.
    """
    if _finds_slurm():
        yield dict(os.environ)
        return
    if shutil.which("slurmctld") is None or os.geteuid() != 0:
        pytest.skip("no Slurm here: scripts/slurm-test-node install puts one on Debian, and root starts it")
    script = Path(__file__).parents[1] / "scripts" / "slurm-test-node"
    folder = tmp_path_factory.mktemp("slurm")
    command: list[str | Path] = [script, "run", folder, "--max-minutes", "300"]
    # Leaving the block closes the standard input, as does the end of this process, and with that Slurm stops.
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as node,
        pytest.MonkeyPatch.context() as patch,
    ):
        assert node.stdout is not None
        answer = node.stdout.readline()
        if not answer:
            pytest.fail(f"Slurm did not start: {script} says above why, and its logs are in {folder}")
        patch.setenv("SLURM_CONF", answer.strip().removeprefix("export SLURM_CONF="))
        yield dict(os.environ)


def _finds_slurm() -> bool:
    try:
        return subprocess.run(["sinfo"], capture_output=True, timeout=60).returncode == 0
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
