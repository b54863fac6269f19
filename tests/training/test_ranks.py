"""Several processes train one network: the result is that of one process, however the batch is divided."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_cases import draw_ball_in_shell, write_tiny_case
from tiny_plans import make_tiny_configuration, make_tiny_plan

from autoseg.core.labels import LabelSpec, Region
from autoseg.core.serialize import to_plain, write_json
from autoseg.planning.plan import Plan
from autoseg.preprocessing.store import PreprocessedCase
from autoseg.training.adapt import choose_training
from autoseg.training.augment import apply_parameters
from autoseg.training.config import Budget, TrainConfig
from autoseg.training.patches import Batch, PatchSampler
from autoseg.training.ranks import ALONE, Ranks
from autoseg.training.record import TrainingChoices
from autoseg.training.samplers import training_sampler

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (18, 20, 22)
CLASSES = LabelSpec(names=("ball", "shell"), values=(1, 2))
REGIONS = dataclasses.replace(
    CLASSES, regions=(Region(name="whole", values=(1, 2), written=2), Region(name="ball", values=(1,), written=1))
)
SIX = TrainConfig(
    budget=Budget(iterations=6, iterations_per_epoch=3), precision="float32", network="planned", batch_size=2
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fold:
    """What is trained."""

    plan: Plan
    cases: tuple[Path, ...]

    def choose(self, config: TrainConfig) -> TrainingChoices:
        configuration = self.plan.configuration(self.plan.recommended)
        return choose_training(self.plan, configuration, config, n_cases=3, device=torch.device("cpu"))[0]


def make_plan(*, labels: LabelSpec = CLASSES, n_axes: int = 3, batch_dice: bool = False) -> Plan:
    configuration = make_tiny_configuration(
        (16,) * n_axes, median_shape=SHAPE[-n_axes:], features=(4, 8, 8), batch_dice=batch_dice
    )
    return make_tiny_plan(configuration, labels=labels)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cases of balls in shells, bright in noise: "whole_0" to "whole_3"; "part_0", where nobody looked for shells; and
    "broken_0", which has voxels that are no numbers."""
    folder = tmp_path_factory.mktemp("cases")
    rng = np.random.default_rng(0)
    for name in ("whole_0", "whole_1", "whole_2", "whole_3", "part_0", "broken_0"):
        image, label = draw_ball_in_shell(rng, SHAPE, centres=(6, 12), radii=(3, 6))
        known = None
        if name == "part_0":
            label[label == 2] = 0
            known = (True, True, False)
        if name == "broken_0":
            image[:] = np.nan
        write_tiny_case(folder / name, image, label, n_classes=3, known=known)
    return folder


def make_fold(folders: Path, *odd: str, **options: Any) -> Fold:
    """Three cases to train on, the last of which may be another, and one to validate on."""
    names = [*["whole_0", "whole_1", "whole_2"][: 3 - len(odd)], *odd, "whole_3"]
    return Fold(plan=make_plan(**options), cases=tuple(folders / name for name in names))


class Crew:
    """Processes that train together, again and again: starting one takes longer than what it does here."""

    def __init__(self, count: int, log: Path) -> None:
        program = [sys.executable, str(Path(__file__).with_name("rank_worker.py"))]
        self.log = log
        with log.open("w") as errors:
            self.workers = [
                subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
                for _ in range(count)
            ]
        self.rendezvous = (log.with_name(f"{log.stem}_{number}") for number in itertools.count())

    def train(self, root: Path, fold: Fold, config: TrainConfig, *, each: Sequence[dict[str, Any]] = ()) -> list[Any]:
        """Trains in `root/fold`; returns the answer of each process. See `begin`."""
        return [self.answer(worker) for worker in self.begin(root, fold, config, each=each)]

    def begin(
        self, root: Path, fold: Fold, config: TrainConfig, *, each: Sequence[dict[str, Any]] = ()
    ) -> list[subprocess.Popen[str]]:
        """Begins to train in `root/fold`; returns the processes.

        Args:
            root: a folder.
            fold: to train.
            config: how.
            each: what is particular about the task of each process.
        """
        root.mkdir(parents=True, exist_ok=True)
        write_json(root / "plan.json", fold.plan)
        task = {
            "count": len(self.workers),
            "rendezvous": str(next(self.rendezvous)),
            "folder": str(root / "fold"),
            "plan": str(root / "plan.json"),
            "choices": to_plain(fold.choose(config)),
            "config": to_plain(config),
            "training": [str(case) for case in fold.cases[:3]],
            "validation": [str(case) for case in fold.cases[3:]],
        }
        particulars = each or [{}] * len(self.workers)
        for index, (worker, particular) in enumerate(zip(self.workers, particulars, strict=True)):
            assert worker.stdin is not None
            own = {"index": index, "result": str(root / f"result_{index}.safetensors")}
            worker.stdin.write(json.dumps(task | own | particular) + "\n")
            worker.stdin.flush()
        return self.workers

    def answer(self, worker: subprocess.Popen[str]) -> Any:
        assert worker.stdout is not None
        line = worker.stdout.readline()
        if not line:
            pytest.fail(f"a process has died:\n{self.log.read_text()}")
        return json.loads(line)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.communicate()


def hire(count: int, folder: Path) -> Iterator[Crew]:
    crew = Crew(count, folder / "log.txt")
    yield crew
    crew.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    yield from hire(1, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    yield from hire(2, tmp_path_factory.mktemp("pair"))


def read_weights(root: Path, index: int = 0) -> dict[str, torch.Tensor]:
    return load_file(root / f"result_{index}.safetensors")


def read_log(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "fold" / "log.jsonl").read_text().splitlines()]


def assert_same_network(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """But for biases that a norm takes away again: their gradient is nothing but rounding, which AdamW scales up."""
    assert first.keys() == second.keys()
    for name in first:
        if not re.fullmatch(r"(encoder|decoder)\..*\.0\.bias", name):
            torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5, msg=name)


def assert_as_one_process(root: Path, *, like: Path) -> None:
    """The processes that trained in `root` have the very same weights, and those of the one that trained in `like`."""
    first, second = read_weights(root), read_weights(root, 1)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert_same_network(first, read_weights(like))


def assert_same_log(first: Path, second: Path) -> None:
    """But for times."""
    lines, others = read_log(first), read_log(second)
    assert len(lines) == len(others)
    for line, other in zip(lines, others, strict=True):
        assert line["iteration"] == other["iteration"]
        for name in ("train_loss", "validation_loss", "learning_rate"):
            assert line[name] == pytest.approx(other[name], rel=1e-4), name
        # A voxel may change sides.
        assert line["class_dice"] == pytest.approx(other["class_dice"], abs=1e-2)


@pytest.mark.parametrize(
    ("odd", "options", "asked"),
    [
        ([], {}, {}),
        ([], {"batch_dice": True}, {"batch_size": 4}),
        ([], {"labels": REGIONS}, {}),
        ([], {"labels": REGIONS, "batch_dice": True}, {}),
        (["part_0"], {}, {}),
        (["part_0"], {"batch_dice": True}, {"recipe": "published"}),
        ([], {"n_axes": 2}, {}),
        # Less than a sample for each, and one for which there is no other.
        ([], {}, {"batch_size": 1}),
        (["part_0"], {"batch_dice": True}, {"batch_size": 3}),
        # Steps are skipped.
        (["broken_0"], {}, {}),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, (list, dict)) else None,
)
def test_two_processes_make_the_network_of_one(
    tmp_path: Path,
    folders: Path,
    alone: Crew,
    pair: Crew,
    odd: list[str],
    options: dict[str, Any],
    asked: dict[str, Any],
) -> None:
    fold, config = make_fold(folders, *odd, **options), dataclasses.replace(SIX, **asked)
    (of_one,) = alone.train(tmp_path / "one", fold, config)
    first, second = pair.train(tmp_path / "two", fold, config)
    assert first == of_one == {"n_asked": 6, "n_shown": 2, "raised": ""}
    assert second == {"n_asked": 6, "n_shown": 0, "raised": ""}
    assert_as_one_process(tmp_path / "two", like=tmp_path / "one")
    assert (read_log(tmp_path / "one")[-1]["train_loss"] is None) == (odd == ["broken_0"])
    if odd != ["broken_0"]:
        assert_same_log(tmp_path / "one", tmp_path / "two")
    record = json.loads((tmp_path / "two" / "fold" / "training.json").read_text())
    assert record["n_processes"] == 2


@pytest.mark.parametrize("begins_alone", [True, False])
def test_another_number_of_processes_goes_on_with_what_was_stopped(
    tmp_path: Path, folders: Path, alone: Crew, pair: Crew, begins_alone: bool
) -> None:
    """Stopped in the middle of an epoch, by any of the processes."""
    fold = make_fold(folders)
    alone.train(tmp_path / "whole", fold, SIX)
    if begins_alone:
        answers = alone.train(tmp_path / "parts", fold, SIX, each=[{"stop_after": 4}])
    else:
        answers = pair.train(tmp_path / "parts", fold, SIX, each=[{}, {"stop_after": 4}])
    for answer in answers:
        assert answer["raised"].startswith("TrainingInterrupted: stopped at step 4")
        assert answer["n_asked"] == 4
    (pair if begins_alone else alone).train(tmp_path / "parts", fold, SIX)
    assert_same_network(read_weights(tmp_path / "whole"), read_weights(tmp_path / "parts"))
    assert_same_log(tmp_path / "whole", tmp_path / "parts")
    # What is finished is not trained again, by however many.
    assert [answer["n_asked"] for answer in pair.train(tmp_path / "parts", fold, SIX)] == [0, 0]


def test_a_time_budget_ends_all_processes_at_the_same_step(tmp_path: Path, folders: Path, pair: Crew) -> None:
    config = dataclasses.replace(SIX, budget=Budget(max_time_s=1.5), mirror=False)
    first, second = pair.train(tmp_path, make_fold(folders), config)
    assert first["n_asked"] == second["n_asked"] == read_log(tmp_path)[-1]["iteration"] > 0
    weights, others = read_weights(tmp_path), read_weights(tmp_path, 1)
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_processes_that_do_not_see_the_same_checkpoint_are_told(tmp_path: Path, folders: Path, pair: Crew) -> None:
    fold = make_fold(folders)
    pair.train(tmp_path, fold, SIX, each=[{"stop_after": 2}, {}])
    for answer in pair.train(tmp_path, fold, SIX, each=[{}, {"folder": str(tmp_path / "elsewhere")}]):
        assert re.match("TrainingError: .*is not the same for all processes", answer["raised"])


@pytest.mark.parametrize("fails", [True, False])
def test_the_network_is_compiled_in_all_processes_or_in_none(
    tmp_path: Path, folders: Path, alone: Crew, pair: Crew, fails: bool
) -> None:
    """With a back end that needs no compiler."""
    fold = make_fold(folders)
    alone.train(tmp_path / "one", fold, SIX)
    back_ends = [{"compile_with": "aot_eager"}, {"compile_with": "missing" if fails else "aot_eager"}]
    before = len(pair.log.read_text())
    pair.train(tmp_path / "two", fold, dataclasses.replace(SIX, compile=True), each=back_ends)
    assert ("could not be compiled" in pair.log.read_text()[before:]) == fails
    assert_as_one_process(tmp_path / "two", like=tmp_path / "one")


def test_who_loses_the_other_process_says_so(tmp_path: Path, folders: Path) -> None:
    crew = Crew(2, tmp_path / "log.txt")
    long = dataclasses.replace(SIX, budget=Budget(iterations=100_000, iterations_per_epoch=10))
    first, second = crew.begin(tmp_path, make_fold(folders), long)
    try:
        while not (tmp_path / "fold" / "log.jsonl").exists():
            assert first.poll() is None, crew.log.read_text()
            time.sleep(0.1)
        second.kill()
        assert re.match("TrainingError: lost another of the 2 processes", crew.answer(first)["raised"])
    finally:
        crew.close()


PART_AT_ONCE = """
import sys

import torch
from torch import distributed, nn

from autoseg.training.ranks import Ranks

torch.set_num_threads(1)
ranks = Ranks(index=0, count=2)
for _ in range(int(sys.argv[1])):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    network = ranks.distribute(nn.Linear(3, 3))
    ranks.total(torch.ones(3))
    # It outlives the group, as where an error is on its way up, and where it is in a circle.
    network.itself = network
    ranks.part()
"""


@pytest.mark.parametrize(("n_processes", "n_times"), [(1, 100), (5, 1)])
def test_who_parts_right_after_the_last_word_neither_hangs_nor_dies(n_processes: int, n_times: int) -> None:
    for _ in range(n_processes):
        subprocess.run([sys.executable, "-c", PART_AT_ONCE, str(n_times)], check=True, timeout=60)


def test_every_sample_has_a_process_and_all_have_as_many() -> None:
    for batch_size, n_processes in itertools.product(range(1, 20), range(1, 9)):
        parts = [Ranks(index=index, count=n_processes).own_samples(batch_size) for index in range(n_processes)]
        assert len({len(part) for part in parts}) == 1
        together = list(itertools.chain(*parts))
        assert together[:batch_size] == list(range(batch_size))
        assert set(together[batch_size:]) <= {batch_size - 1}
    assert ALONE.own_samples(7) == tuple(range(7))


@pytest.mark.parametrize("n_axes", [2, 3])
@pytest.mark.parametrize("augment", ["torch", "batchgenerators", "none"])
def test_a_part_of_a_batch_is_that_part_of_the_whole(folders: Path, augment: str, n_axes: int) -> None:
    """Its samples are read, augmented and left without channels as in the whole batch."""
    fold = make_fold(folders, "part_0", n_axes=n_axes)
    plan = dataclasses.replace(fold.plan, optional_channels=("MR",))
    config = dataclasses.replace(SIX, batch_size=5, augment=augment, mirror=True)
    cases = [PreprocessedCase(case) for case in fold.cases]

    def sampler(samples: Sequence[int] | None) -> PatchSampler:
        return training_sampler(cases, plan, fold.choose(config), config, seed=3, samples=samples)

    n_smaller = 0
    for number in range(4):
        whole, *parts = (
            sampler(samples).batch(number)
            for samples in (None, *(Ranks(index=index, count=3).own_samples(5) for index in range(3)))
        )
        patch_size = (16,) * n_axes

        def augmented(batch: Batch, patch_size: tuple[int, ...] = patch_size) -> tuple[torch.Tensor, torch.Tensor]:
            images, classes = batch.images.float(), batch.classes.long()
            if batch.augmentation is None:
                return images, classes
            return apply_parameters(images, classes, patch_size=patch_size, parameters=batch.augmentation)

        images, classes = augmented(whole)
        own_images, own_classes = (torch.cat(tensors)[:5] for tensors in zip(*map(augmented, parts), strict=True))
        # Where a part is read from a smaller region, places are rounded otherwise.
        torch.testing.assert_close(own_images, images, rtol=0, atol=1e-3)
        assert (own_classes != classes).float().mean() < 1e-3
        assert all(part.cases_of_all == whole.cases_of_all == whole.cases for part in parts)
        assert tuple(itertools.chain(*(part.cases for part in parts)))[:5] == whole.cases
        assert whole.absent is not None
        assert torch.cat([part.absent for part in parts if part.absent is not None])[:5].equal(whole.absent)
        n_smaller += sum(part.images[0].numel() < whole.images[0].numel() for part in parts)
    assert (n_smaller > 0) == (augment == "torch")
