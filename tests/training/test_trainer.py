"""A training run: reproducible, interruptible, within its budget."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_cases import write_balls_in_shells
from tiny_plans import make_tiny_configuration, make_tiny_plan

from autoseg.core.errors import TrainingError, TrainingInterrupted
from autoseg.core.labels import LabelSpec
from autoseg.networks.build import build_trainable
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.preprocessing.store import PreprocessedCase, write_case
from autoseg.training import trainer
from autoseg.training.adapt import choose_training
from autoseg.training.checkpoint import read_state
from autoseg.training.config import Budget, TrainConfig
from autoseg.training.learner import Learner
from autoseg.training.patches import Batch, PatchSampler
from autoseg.training.recipe import RECIPES
from autoseg.training.record import EpochFigures, ValidationSlice, smooth, write_log
from autoseg.training.record import read_log as read_figures
from autoseg.training.trainer import train_fold
from autoseg.training.validation import score_patches

SHAPE = (18, 20, 22)
LABELS = LabelSpec(names=("ball", "shell"), values=(1, 2))
CPU = torch.device("cpu")


def make_configuration(n_axes: int = 3) -> ConfigurationPlan:
    return make_tiny_configuration((16,) * n_axes, median_shape=SHAPE[-n_axes:], features=(4, 8, 8))


def make_plan(configuration: ConfigurationPlan) -> Plan:
    return make_tiny_plan(configuration, labels=LABELS)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[PreprocessedCase]:
    """Balls in shells at random places, bright in noise."""
    return write_balls_in_shells(tmp_path_factory.mktemp("cases"), 4, SHAPE, centres=(6, 12), radii=(3, 6))


def train(
    folder: Path,
    cases: Sequence[PreprocessedCase],
    *,
    config: TrainConfig,
    n_axes: int = 3,
    resume: bool = True,
    stop: Callable[[], bool] = lambda: False,
    **more: Any,
) -> dict[str, torch.Tensor]:
    configuration = make_configuration(n_axes)
    plan = make_plan(configuration)
    network = train_fold(
        folder,
        plan,
        choose_training(plan, configuration, config, n_cases=3, device=CPU)[0],
        training=cases[:3],
        validation=cases[3:],
        config=config,
        device=CPU,
        resume=resume,
        stop=stop,
        **more,
    )
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def stop_after(n_steps: int) -> Callable[[], bool]:
    """True at the n-th time it is asked, which is after every step."""
    asked = [0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] >= n_steps

    return stop


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


TEN = TrainConfig(budget=Budget(iterations=10, iterations_per_epoch=4))


@pytest.mark.parametrize("n_axes", [2, 3])
def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(
    tmp_path: Path, cases: list[PreprocessedCase], n_axes: int
) -> None:
    first = train(tmp_path / "a", cases, config=TEN, n_axes=n_axes)
    assert_equal(first, train(tmp_path / "b", cases, config=TEN, n_axes=n_axes))
    other = train(tmp_path / "c", cases, config=TrainConfig(budget=TEN.budget, seed=1), n_axes=n_axes)
    assert not torch.equal(first["heads.0.weight"], other["heads.0.weight"])


@pytest.mark.parametrize("n_steps", [3, 4, 9])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path, cases: list[PreprocessedCase], n_steps: int) -> None:
    """Within an epoch, at its end, and in the last one; the log is the same too, apart from times."""
    whole = train(tmp_path / "whole", cases, config=TEN)
    with pytest.raises(TrainingInterrupted, match=f"step {n_steps}"):
        train(tmp_path / "parts", cases, config=TEN, stop=stop_after(n_steps))
    assert not (tmp_path / "parts" / "weights.safetensors").exists()
    assert_equal(whole, train(tmp_path / "parts", cases, config=TEN))
    timed = {"time_s", "step_s", "data_wait_fraction"}
    logs = [
        [{k: v for k, v in line.items() if k not in timed} for line in read_log(tmp_path / name)]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    assert [line["iteration"] for line in logs[0]] == [4, 8, 10]


def test_a_finished_fold_is_not_trained_again_but_a_larger_budget_goes_on(
    tmp_path: Path, cases: list[PreprocessedCase]
) -> None:
    first = train(tmp_path, cases, config=TEN)
    written = (tmp_path / "weights.safetensors").stat().st_mtime_ns
    assert_equal(first, train(tmp_path, cases, config=TEN))
    assert (tmp_path / "weights.safetensors").stat().st_mtime_ns == written
    more = TrainConfig(budget=Budget(iterations=14, iterations_per_epoch=4))
    assert not torch.equal(first["heads.0.weight"], train(tmp_path, cases, config=more)["heads.0.weight"])
    assert read_log(tmp_path)[-1]["iteration"] == 14


def test_who_ends_a_longer_training_before_its_end_is_told(
    tmp_path: Path, cases: list[PreprocessedCase], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(TrainingInterrupted):
        train(tmp_path, cases, config=TEN, stop=stop_after(5))
    train(tmp_path, cases, config=TrainConfig(budget=Budget(iterations=5, iterations_per_epoch=4)))
    assert "it ends at step 5 as it is" in caplog.text
    caplog.clear()
    # What has come to its end is ended by no budget.
    train(tmp_path, cases, config=TEN)
    (tmp_path / "weights.safetensors").unlink()
    train(tmp_path, cases, config=TEN)
    assert "as it is" not in caplog.text


def test_another_seed_in_the_same_folder_is_refused_until_resuming_is_off(
    tmp_path: Path, cases: list[PreprocessedCase]
) -> None:
    train(tmp_path, cases, config=TEN)
    other = TrainConfig(budget=TEN.budget, seed=1)
    with pytest.raises(TrainingError, match="--no-resume"):
        train(tmp_path, cases, config=other)
    fresh = train(tmp_path / "fresh", cases, config=other)
    assert_equal(fresh, train(tmp_path, cases, config=other, resume=False))


def test_training_learns(tmp_path: Path, cases: list[PreprocessedCase]) -> None:
    config = TrainConfig(budget=Budget(iterations=300, iterations_per_epoch=25), augment="none")
    train(tmp_path, cases, config=config)
    log = read_log(tmp_path)
    assert log[-1]["validation_loss"] < 0.7 * log[0]["validation_loss"]
    assert log[0]["validation_dice"] < 0.6
    assert log[-1]["validation_dice"] > 0.8


def test_the_classic_augmentation_is_resumed_bit_for_bit_too(tmp_path: Path, cases: list[PreprocessedCase]) -> None:
    config = dataclasses.replace(TEN, augment="batchgenerators", mirror=True)
    whole = train(tmp_path / "whole", cases, config=config)
    with pytest.raises(TrainingInterrupted):
        train(tmp_path / "parts", cases, config=config, stop=stop_after(5))
    assert_equal(whole, train(tmp_path / "parts", cases, config=config))
    ours = train(tmp_path / "ours", cases, config=dataclasses.replace(TEN, mirror=True))
    assert not torch.equal(whole["heads.0.weight"], ours["heads.0.weight"])


def test_deterministic_training_leaves_torch_as_it_was(tmp_path: Path, cases: list[PreprocessedCase]) -> None:
    config = dataclasses.replace(TEN, deterministic=True)
    seen = []

    def stop() -> bool:
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
        return False

    first = train(tmp_path / "a", cases, config=config, stop=stop)
    assert set(seen) == {(True, False)}
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert_equal(first, train(tmp_path / "b", cases, config=config))


def test_the_precision_is_what_was_asked_for_and_stays_when_resumed(
    tmp_path: Path, cases: list[PreprocessedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    def precision(folder: str) -> str:
        return str(json.loads((tmp_path / folder / "training.json").read_text())["precision"])

    for name in ("float32", "bfloat16", "float16"):
        train(tmp_path / name, cases, config=dataclasses.replace(TEN, precision=name))
        assert precision(name) == name
        assert np.isfinite([line["train_loss"] for line in read_log(tmp_path / name)]).all()
        # Of float16 the scale of the loss goes on too.
        with pytest.raises(TrainingInterrupted):
            train(
                tmp_path / "parts",
                cases,
                config=dataclasses.replace(TEN, precision=name),
                resume=False,
                stop=stop_after(4),
            )
        resumed = train(tmp_path / "parts", cases, config=dataclasses.replace(TEN, precision=name))
        assert_equal(resumed, train(tmp_path / name, cases, config=dataclasses.replace(TEN, precision=name)))
    monkeypatch.setattr("autoseg.training.learner.autocast_dtype", lambda device: torch.bfloat16)
    with pytest.raises(TrainingInterrupted):
        train(tmp_path / "auto", cases, config=TEN, stop=stop_after(3))
    # A busy machine may measure otherwise the next time.
    monkeypatch.setattr("autoseg.training.learner.autocast_dtype", lambda device: None)
    resumed = train(tmp_path / "auto", cases, config=TEN)
    assert precision("auto") == "bfloat16"
    assert_equal(resumed, train(tmp_path / "named", cases, config=dataclasses.replace(TEN, precision="bfloat16")))


def test_a_precision_that_this_gpu_emulates_is_not_taken_from_a_checkpoint(
    tmp_path: Path, cases: list[PreprocessedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoseg.training.learner.autocast_dtype", lambda device: torch.bfloat16)
    with pytest.raises(TrainingInterrupted):
        train(tmp_path, cases, config=TEN, stop=stop_after(3))
    monkeypatch.setattr("autoseg.training.learner.autocast_dtype", lambda device: None)
    monkeypatch.setattr(trainer, "can_compute", lambda device, precision: precision != "bfloat16")
    train(tmp_path, cases, config=TEN)
    assert json.loads((tmp_path / "training.json").read_text())["precision"] == "float32"


def test_the_scale_of_float16_grows_at_the_same_steps_when_resumed(
    tmp_path: Path, cases: list[PreprocessedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = functools.partial(torch.amp.GradScaler, growth_interval=4)
    monkeypatch.setattr("autoseg.training.learner.torch.amp.GradScaler", growing)
    config = dataclasses.replace(TEN, precision="float16")
    with pytest.raises(TrainingInterrupted):
        train(tmp_path / "parts", cases, config=config, stop=stop_after(3))
    train(tmp_path / "parts", cases, config=config)
    train(tmp_path / "whole", cases, config=config)
    parts, whole = (read_state(tmp_path / name / "checkpoint.safetensors") for name in ("parts", "whole"))
    assert (parts.loss_scale, parts.steps_at_scale) == (whole.loss_scale, whole.steps_at_scale)
    assert whole.steps_at_scale != 10, "it has grown"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_first_step_that_float16_has_to_skip_leaves_nothing_behind(recipe: str) -> None:
    """The scale of the loss begins high, so gradients may overflow; weights and momentum then stay as they were."""
    torch.manual_seed(0)
    configuration = make_configuration(3)
    learner = Learner(
        build_trainable(make_plan(configuration), configuration),
        configuration,
        recipe=RECIPES[recipe],
        device=CPU,
        precision="float16",
    )
    images = torch.randn(2, 1, *configuration.patch_size)
    classes = torch.randint(3, (2, *configuration.patch_size))
    before = {name: tensor.clone() for name, tensor in learner.network.state_dict().items()}
    learner.step(lambda: learner.loss(images, classes) * torch.inf, learning_rate=0.1)
    assert_equal(before, learner.network.state_dict())
    for _ in range(3):
        value = learner.step(lambda: learner.loss(images, classes), learning_rate=1e-4)
        assert math.isfinite(value)
    after = learner.network.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert all((after[name] - before[name]).abs().max() < 0.1 for name in before)


def test_a_network_that_does_not_compile_trains_without_and_says_so_once(
    tmp_path: Path,
    cases: list[PreprocessedCase],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no compiler\nand many lines more")

    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compile_with(module, backend=fail, **options))
    compiled = train(tmp_path / "fails", cases, config=dataclasses.replace(TEN, compile=True))
    warnings = [record.getMessage() for record in caplog.records if "compiled" in record.getMessage()]
    assert len(warnings) == 1
    assert "and many lines more" not in warnings[0]
    assert_equal(compiled, train(tmp_path / "plain", cases, config=TEN))


def test_a_compiled_network_learns_the_same(
    tmp_path: Path, cases: list[PreprocessedCase], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the back end that needs no compiler; weights have the names that they have without."""
    used = []
    compile_with = torch.compile

    def compile_quickly(module: torch.nn.Module, **options: bool) -> Callable[..., object]:
        used.append(module)
        compiled: Callable[..., object] = compile_with(module, backend="aot_eager", dynamic=options["dynamic"])
        return compiled

    monkeypatch.setattr(torch, "compile", compile_quickly)
    config = dataclasses.replace(TEN, precision="float32")
    compiled = train(tmp_path / "compiled", cases, config=dataclasses.replace(config, compile=True))
    assert len(used) == 1
    assert not [record for record in caplog.records if "could not be compiled" in record.getMessage()]
    plain = train(tmp_path / "plain", cases, config=config)
    assert compiled.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_short_last_epoch_is_scored_on_as_many_patches_as_the_others(
    tmp_path: Path, cases: list[PreprocessedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    n_batches: list[int] = []

    def note(*positional: Any, **named: Any) -> Any:
        n_batches.append(named["n_batches"])
        return score_patches(*positional, **named)

    monkeypatch.setattr(trainer, "score_patches", note)
    monkeypatch.setattr(trainer, "STEPS_PER_VALIDATION_BATCH", 1)
    train(tmp_path, cases, config=TEN)
    assert [line["iteration"] for line in read_log(tmp_path)] == [4, 8, 10]
    assert n_batches == [4, 4, 4]


def test_slices_of_validation_patches_are_shown_after_each_epoch(tmp_path: Path, cases: list[PreprocessedCase]) -> None:
    configuration = make_configuration()
    shown: list[tuple[int, Sequence[ValidationSlice]]] = []
    plan = make_plan(configuration)
    train_fold(
        tmp_path,
        plan,
        choose_training(plan, configuration, TEN, n_cases=3, device=CPU)[0],
        training=cases[:3],
        validation=cases[3:],
        config=TEN,
        device=CPU,
        on_epoch=lambda epochs, slices: shown.append((len(epochs), slices)),
    )
    assert [n_epochs for n_epochs, _ in shown] == [1, 2, 3]
    for _, slices in shown:
        assert slices
        for slice_ in slices:
            assert slice_.case == cases[3].id
            assert slice_.image.shape == slice_.reference.shape == slice_.predicted.shape == (16, 16)
            assert slice_.image.std() > 0
            assert set(np.unique(slice_.predicted)) <= {0, 1, 2}
    assert (shown[0][1][0].reference != 0).any(), "the patches that are centred on foreground come first"


def test_waiting_for_data_is_logged_and_warned_of(
    tmp_path: Path, cases: list[PreprocessedCase], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    draw = PatchSampler.batch

    def slow(self: PatchSampler, number: int) -> Batch:
        time.sleep(1)
        return draw(self, number)

    monkeypatch.setattr(PatchSampler, "batch", slow)
    # One thread, which cannot read ahead while patches are validated.
    monkeypatch.setattr(trainer, "n_cpus", lambda: 2)
    train(tmp_path, cases, config=TrainConfig(budget=Budget(iterations=4, iterations_per_epoch=2)))
    assert all(line["data_wait_fraction"] > 0.05 for line in read_log(tmp_path))
    assert sum("waiting for data" in record.getMessage() for record in caplog.records) == 1


def test_time_budget_ends_training_and_the_rate_goes_to_zero(
    tmp_path: Path, cases: list[PreprocessedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A second passes with each look at the clock: two in a step, one in validating, two in saving.
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    budget = Budget(max_time_s=100.0)
    train(tmp_path, cases, config=TrainConfig(budget=budget, network="planned", mirror=False))
    log = read_log(tmp_path)
    # An epoch is over when it has taken a twentieth of the budget; the last one ends with the budget.
    assert [line["iteration"] for line in log] == [*range(3, 36, 3), 34]
    assert [line["time_s"] for line in log] == [*range(7, 98, 9), 102]
    begins = [line["time_s"] - 3 for line in log]
    rates = [RECIPES["fast"].rate(seconds / 100, mirrored=False) for seconds in begins]
    assert [line["learning_rate"] for line in log] == pytest.approx(rates)
    assert rates[-1] < 0.001 * RECIPES["fast"].learning_rate


def test_what_is_spent_before_the_first_step_takes_nothing_from_the_warm_up(
    tmp_path: Path, cases: list[PreprocessedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = Learner.step

    def watch(self: Learner, *positional: Any, learning_rate: float) -> float:
        if learning_rate > 0:  # Otherwise it is only timed.
            rates.append(learning_rate)
        return step(self, *positional, learning_rate=learning_rate)

    monkeypatch.setattr(Learner, "step", watch)
    config = TrainConfig(budget=Budget(max_time_s=1000.0), mirror=False)
    largest = RECIPES["fast"].learning_rate
    # The third step is done by another process, which finds the rest in the checkpoint.
    for n_steps in (2, 1):
        with pytest.raises(TrainingInterrupted):
            train(tmp_path, cases, config=config, spent_s=500.0, stop=stop_after(n_steps))
    assert rates[0] == pytest.approx(0.01 * largest)
    assert rates == sorted(rates)
    assert rates[-1] < 0.1 * largest


def test_drawing_and_saving_belong_to_the_budget(tmp_path: Path, cases: list[PreprocessedCase]) -> None:
    def draw(*_: object) -> None:
        time.sleep(0.5)

    train(tmp_path, cases, config=TrainConfig(budget=Budget(max_time_s=4.0)), on_epoch=draw)
    log = read_log(tmp_path)
    assert 0.5 * (len(log) - 1) < log[-1]["time_s"]
    assert len(log) <= 9


def test_mirroring_is_for_long_trainings_has_its_own_rate_and_is_written_down(
    tmp_path: Path, cases: list[PreprocessedCase]
) -> None:
    def mirrored(folder: str) -> bool:
        return bool(json.loads((tmp_path / folder / "training.json").read_text())["mirrored"])

    train(tmp_path / "short", cases, config=TEN)
    assert not mirrored("short")
    train(tmp_path / "asked", cases, config=dataclasses.replace(TEN, mirror=True))
    assert mirrored("asked")
    plain, lower = ([line["learning_rate"] for line in read_log(tmp_path / name)] for name in ("short", "asked"))
    assert lower == pytest.approx([RECIPES["fast"].mirrored_rate * rate for rate in plain])
    assert lower != pytest.approx(plain)
    train(tmp_path / "published", cases, config=dataclasses.replace(TEN, recipe="published"))
    assert mirrored("published")
    long = TrainConfig(budget=Budget(iterations=10_000))
    with pytest.raises(TrainingInterrupted):
        train(tmp_path / "long", cases, config=long, stop=stop_after(2))
    assert mirrored("long")


def test_finished_weights_are_never_deleted_unasked(tmp_path: Path, cases: list[PreprocessedCase]) -> None:
    train(tmp_path, cases, config=TEN)
    (tmp_path / "checkpoint.safetensors").unlink()
    with pytest.raises(TrainingError, match="--no-resume"):
        train(tmp_path, cases, config=TEN)
    assert (tmp_path / "weights.safetensors").exists()


def test_a_damaged_checkpoint_is_named(tmp_path: Path, cases: list[PreprocessedCase]) -> None:
    train(tmp_path, cases, config=TEN)
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors.*damaged"):
        train(tmp_path, cases, config=TEN)


def test_a_loss_that_is_never_finite_stops_with_the_case(tmp_path: Path, cases: list[PreprocessedCase]) -> None:
    folder = tmp_path / "broken"
    image = np.full((1, *SHAPE), np.nan, np.float32)
    write_case(folder, image, np.asarray(cases[0].label), key="k", record=cases[0].record, n_classes=3)
    broken = PreprocessedCase(folder)
    config = TrainConfig(budget=Budget(iterations=50))
    with pytest.raises(TrainingError, match="broken"):
        train(tmp_path / "fold", [broken] * 3 + list(cases[3:]), config=config)


def test_losses_that_are_now_and_then_not_finite_stop_no_training(
    tmp_path: Path, cases: list[PreprocessedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "MAX_BAD_STEPS", 2)
    step, n_steps = Learner.step, itertools.count(1)

    def fail_now_and_then(self: Learner, *given: Any, **named: Any) -> float:
        return math.nan if next(n_steps) % 5 == 0 else step(self, *given, **named)

    monkeypatch.setattr(Learner, "step", fail_now_and_then)
    train(tmp_path, cases, config=TrainConfig(budget=Budget(iterations=30, iterations_per_epoch=6)))
    assert read_state(tmp_path / "checkpoint.safetensors").iteration == 30


def test_a_longer_training_that_was_stopped_before_it_wrote_its_weights_writes_them(
    tmp_path: Path, cases: list[PreprocessedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = TrainConfig(budget=Budget(iterations=20))
    train(tmp_path / "whole", cases, config=TEN)
    expected = train(tmp_path / "whole", cases, config=longer)
    short = train(tmp_path / "fold", cases, config=TEN)
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "save_weights", fail_to_save)
        with pytest.raises(TrainingError, match="the disk is full"):
            train(tmp_path / "fold", cases, config=longer)
    weights = train(tmp_path / "fold", cases, config=longer)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert any(not torch.equal(weights[name], short[name]) for name in expected)
    # Its weights are those of the longer one now, whatever budget is given again.
    assert all(
        torch.equal(known, expected[name]) for name, known in train(tmp_path / "fold", cases, config=TEN).items()
    )


def fail_to_save(*_: object) -> None:
    raise TrainingError("the disk is full")


def test_a_case_that_is_made_again_of_the_same_scan_keeps_the_training(
    tmp_path: Path, cases: list[PreprocessedCase]
) -> None:
    train(tmp_path / "fold", cases, config=TEN)
    again = []
    for case in cases:
        write_case(tmp_path / case.id, case.image, case.label, key="later", record=case.record, n_classes=3)
        again.append(PreprocessedCase(tmp_path / case.id))
    train(tmp_path / "fold", again, config=TEN)
    # Made on another machine, a case may differ in the last bits.
    for case in cases:
        write_case(tmp_path / case.id, case.image * 1.001, case.label, key="k", record=case.record, n_classes=3)
    train(tmp_path / "fold", [PreprocessedCase(tmp_path / case.id) for case in cases], config=TEN)
    for case in cases:
        write_case(tmp_path / case.id, case.image, case.label, key="later", record=case.record, n_classes=3)
    write_case(tmp_path / "case_0", cases[0].image + 1, cases[0].label, key="k", record=cases[0].record, n_classes=3)
    with pytest.raises(TrainingError, match="another plan, cases"):
        train(tmp_path / "fold", [PreprocessedCase(tmp_path / "case_0"), *again[1:]], config=TEN)


def test_figures_of_the_log_are_read_back(tmp_path: Path) -> None:
    first = EpochFigures(
        epoch=1,
        iteration=250,
        time_s=12.5,
        train_loss=math.nan,
        validation_loss=0.75,
        validation_dice=0.5,
        smoothed_dice=0.375,
        class_dice=(0.25, math.nan, 1 / 3),
        learning_rate=1e-4,
        step_s=0.05,
        data_wait_fraction=0.01,
    )
    written = [first, dataclasses.replace(first, epoch=2, iteration=500, train_loss=0.25, class_dice=(0.5, 0.0, 1.0))]
    write_log(tmp_path / "log.jsonl", written)
    read = read_figures(tmp_path / "log.jsonl")
    assert read[1] == written[1]
    # Here NaN equals NaN, and nothing else.
    np.testing.assert_equal(dataclasses.asdict(read[0]), dataclasses.asdict(first))


@pytest.mark.parametrize("augment", ["torch", "batchgenerators"])
def test_a_channel_that_is_absent_is_zero_after_augmentation(
    tmp_path: Path, cases: list[PreprocessedCase], monkeypatch: pytest.MonkeyPatch, augment: str
) -> None:
    """Augmentation would make noise and brightness of it."""
    if augment != "torch":
        pytest.importorskip(augment)
    lacking = []
    for index, case in enumerate(cases):
        image = np.concatenate([case.image, case.image]).astype(np.float32)
        image[1 if index % 2 else 0] *= index > 1
        write_case(tmp_path / str(index), image, case.label, key="k", record=case.record, n_classes=3)
        lacking.append(PreprocessedCase(tmp_path / str(index)))
    assert [case.stored.absent for case in lacking] == [(0,), (1,), (), ()]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    calculate = Learner.loss

    def watch(self: Learner, images: torch.Tensor, classes: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((images, drawn[len(seen)]))
        return calculate(self, images, classes, **options)

    monkeypatch.setattr(Learner, "loss", watch)
    draw = PatchSampler.batch
    drawn: dict[int, torch.Tensor] = {}

    def remember(self: PatchSampler, number: int) -> Batch:
        batch = draw(self, number)
        if self._optional:
            assert batch.absent is not None
            drawn[number] = batch.absent
        return batch

    monkeypatch.setattr(PatchSampler, "batch", remember)
    configuration = make_configuration()
    plan = make_plan(configuration)
    channels = tuple(dataclasses.replace(plan.normalization[0], channel=name) for name in ("a", "b"))
    plan = dataclasses.replace(plan, normalization=channels, optional_channels=("a", "b"))
    config = TrainConfig(budget=Budget(iterations=12, iterations_per_epoch=12), augment=augment)
    train_fold(
        tmp_path / "fold",
        plan,
        choose_training(plan, configuration, config, n_cases=3, device=CPU)[0],
        training=lacking[:3],
        validation=lacking[3:],
        config=config,
        device=CPU,
    )
    assert len(seen) == 12
    for images, absent in seen:
        assert images.flatten(2).any(dim=2).equal(~absent)
    assert sum(int(absent.sum()) for _, absent in seen) > 6


def test_running_means_pass_over_what_is_no_number() -> None:
    means, mean = [], math.nan
    for value in (math.nan, 1.0, math.nan, 0.0):
        mean = smooth(mean, value)
        means.append(mean)
    np.testing.assert_allclose(means, [math.nan, 1.0, 1.0, 0.9])
