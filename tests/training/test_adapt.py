"""What a recipe makes of the plan for a budget."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from tiny_plans import make_tiny_plan

from autoseg.core.errors import TrainingError
from autoseg.core.labels import LabelSpec
from autoseg.planning.plan import (
    SET_BY_USER,
    ConfigurationPlan,
    NetworkPlan,
    Plan,
    Reason,
)
from autoseg.training import adapt, step_time
from autoseg.training.adapt import (
    SAMPLING_REASONS,
    StepTimer,
    choose_network,
    choose_training,
    full_training,
    steps_to_mirror,
    with_requests,
)
from autoseg.training.config import SAMPLINGS, Budget, TrainConfig
from autoseg.training.ladder import LADDER, SMALLEST_PATCH_SCALE, WIDTHS, has_large_patches, resize
from autoseg.training.patches import SAMPLING
from autoseg.training.recipe import RECIPES
from autoseg.training.record import TrainingChoices

CPU = torch.device("cpu")
THICK = ConfigurationPlan(
    name="3d_fullres",
    spacing_mm=(5.0, 1.0, 1.0),
    median_shape=(40, 200, 200),
    largest_shape=(40, 200, 200),
    patch_size=(16, 96, 64),
    batch_size=7,
    lowres_axis=0,
    batch_dice=False,
    previous=None,
    network=NetworkPlan(
        architecture="unet",
        features=(32, 64, 128, 256),
        strides=((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
        kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
        encoder_blocks=(2, 2, 2, 2),
        decoder_blocks=(2, 2, 2),
    ),
)


def make_plan(*reasons: Reason) -> Plan:
    return make_tiny_plan(THICK, labels=LabelSpec(names=("ball",), values=(1,)), reasons=reasons)


class Machine:
    """Steps take a microsecond per voxel and feature of the first stage; counts what was timed."""

    def __init__(self) -> None:
        self.timed: list[ConfigurationPlan] = []

    def __call__(self, configuration: ConfigurationPlan, *, batch_size: int) -> float:
        self.timed.append(configuration)
        voxels = torch.Size(configuration.patch_size).numel()
        return 1e-6 * batch_size * voxels * configuration.network.features[0]


@pytest.fixture
def machine() -> Machine:
    return Machine()


def choose(
    plan: Plan | None = None, *, machine: StepTimer | None = None, n_cases: int = 100, **asked: Any
) -> TrainingChoices:
    config, timer = TrainConfig(**asked), machine or Machine()
    return choose_training(plan or make_plan(), THICK, config, n_cases=n_cases, device=CPU, timer=timer)[0]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scale", [0.1, 0.4, 0.55, 0.7, 1.0])
def test_resized_configurations_fit_their_strides_and_leave_two_voxels(width: str, scale: float) -> None:
    # Whether the patch fits the strides is checked by the configuration itself.
    resized = resize(THICK, width, scale)
    divisor = resized.network.divisor
    assert all(size // step >= 2 for size, step in zip(resized.patch_size, divisor, strict=True))
    assert all(small <= full for small, full in zip(resized.patch_size, THICK.patch_size, strict=True))
    assert all(small <= full for small, full in zip(resized.network.features, THICK.network.features, strict=False))


def test_the_planned_width_and_patch_are_the_planned_configuration() -> None:
    assert resize(THICK, "planned", 1.0) == THICK


def test_half_the_patch_and_half_the_features() -> None:
    resized = resize(THICK, "half", 0.5)
    assert resized.patch_size == (8, 48, 32)
    assert resized.network.features == (16, 32, 64, 128)


def with_edges(size: int, *, n_axes: int, n_stages: int) -> ConfigurationPlan:
    """A cube or square that is halved at each stage but the first."""
    network = NetworkPlan(
        architecture="unet",
        features=tuple(min(32 << stage, 320) for stage in range(n_stages)),
        strides=((1,) * n_axes, *((2,) * n_axes,) * (n_stages - 1)),
        kernel_sizes=((3,) * n_axes,) * n_stages,
        encoder_blocks=(2,) * n_stages,
        decoder_blocks=(2,) * (n_stages - 1),
    )
    return dataclasses.replace(
        THICK,
        spacing_mm=(1.0,) * n_axes,
        median_shape=(3 * size,) * n_axes,
        largest_shape=(3 * size,) * n_axes,
        patch_size=(size,) * n_axes,
        lowres_axis=None,
        network=network,
    )


@pytest.mark.parametrize(
    ("size", "n_axes", "n_stages", "patch_size", "n_left"),
    [
        (128, 3, 6, (48, 48, 48), 5),  # 64 x 64 x 64 with six stages
        (512, 2, 8, (192, 192), 7),  # 256 x 256 with eight
        (96, 3, 5, (32, 32, 32), 5),
    ],
)
def test_small_patches_need_no_deep_network(
    size: int, n_axes: int, n_stages: int, patch_size: tuple[int, ...], n_left: int
) -> None:
    planned = with_edges(size, n_axes=n_axes, n_stages=n_stages)
    resized = resize(planned, "half", SMALLEST_PATCH_SCALE)
    assert resized.patch_size == patch_size
    assert len(resized.network.features) == n_left
    assert resized.network.strides == planned.network.strides[:n_left]
    for width in WIDTHS:
        assert resize(planned, width, 1.0).network.strides == planned.network.strides


def test_more_time_buys_larger_networks_and_the_planned_one_in_the_end(machine: Machine) -> None:
    sizes = []
    for budget_s in (1, 10, 100, 1000, 10_000, 100_000, 1_000_000):
        chosen = choose(machine=machine, budget=Budget(max_time_s=budget_s)).configuration
        sizes.append((chosen.network.features[0], torch.Size(chosen.patch_size).numel()))
    assert sizes == sorted(sizes)
    assert sizes[0] == (16, 8 * 40 * 24)
    assert len(set(sizes)) > 3
    assert choose(machine=machine, budget=Budget(max_time_s=1_000_000)).configuration == THICK


def test_each_larger_network_makes_the_steps_that_it_needs(machine: Machine) -> None:
    chosen = choose(machine=machine, budget=Budget(max_time_s=3000)).configuration
    step_s = 2e-6 * torch.Size(chosen.patch_size).numel() * chosen.network.features[0]
    needed = next(rung.min_steps for rung in LADDER if resize(THICK, rung.width, rung.patch_scale) == chosen)
    assert 3000 / step_s >= needed > 0


def test_small_patches_teach_for_longer_where_cases_are_few_or_planned_patches_large(machine: Machine) -> None:
    large = dataclasses.replace(THICK, patch_size=(24, 96, 64))
    assert has_large_patches(large)
    assert not has_large_patches(THICK)

    def choose_patch(configuration: ConfigurationPlan, *, n_cases: int) -> tuple[float, str]:
        config = TrainConfig(budget=Budget(max_time_s=3000))
        choices, _ = choose_training(make_plan(), configuration, config, n_cases=n_cases, device=CPU, timer=machine)
        part = torch.Size(choices.configuration.patch_size).numel() / torch.Size(configuration.patch_size).numel()
        return part, next(reason.text for reason in choices.reasons if reason.subject == "training.network")

    part_of_few, told = choose_patch(THICK, n_cases=2)
    assert "of 2 cases, small patches are learned from for longer" in told
    part_of_large, told = choose_patch(large, n_cases=100)
    assert "of large patches, parts are learned from for longer" in told
    part, told = choose_patch(THICK, n_cases=100)
    assert "learned from" not in told
    assert max(part_of_few, part_of_large) < part


def test_too_few_steps_to_learn_from_are_told(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    choose(machine=machine, budget=Budget(max_time_s=2000), network="planned")
    assert not caplog.messages
    choose(machine=machine, budget=Budget(max_time_s=100), network="planned")
    assert "in 1 min 40 s there is time for about 16 steps, too few to learn from" in caplog.text
    caplog.clear()
    choose(machine=machine, budget=Budget(iterations=5, max_time_s=100), network="planned")
    assert not caplog.messages


def test_what_is_too_slow_ends_the_search(machine: Machine) -> None:
    choose(machine=machine, budget=Budget(max_time_s=1))
    assert len(machine.timed) == 2


def test_steps_are_timed_with_the_part_of_a_batch_that_a_process_has(machine: Machine) -> None:
    asked: list[int] = []

    def timer(configuration: ConfigurationPlan, *, batch_size: int) -> float:
        asked.append(batch_size)
        return machine(configuration, batch_size=batch_size)

    config = TrainConfig(budget=Budget(max_time_s=3000), batch_size=5)
    chosen = [
        choose_training(make_plan(), THICK, config, n_cases=100, device=CPU, n_processes=count, timer=timer)[0]
        for count in (1, 2, 8)
    ]
    assert list(dict.fromkeys(asked)) == [5, 3, 1]
    sizes = [torch.Size(choices.configuration.patch_size).numel() for choices in chosen]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]
    assert {choices.batch_size for choices in chosen} == {5}


def test_the_reason_tells_patch_features_and_steps(machine: Machine) -> None:
    reasons = choose(machine=machine, budget=Budget(max_time_s=1)).reasons
    (reason,) = (known for known in reasons if known.subject == "training.network")
    assert "8 x 40 x 24 of 16 x 96 x 64" in reason.text
    assert "16-32-64-128 of 32-64-128-256" in reason.text
    assert "--network planned" in reason.text


@pytest.mark.parametrize(
    "asked",
    [
        {"budget": Budget(iterations=10)},
        {"budget": Budget(max_time_s=10), "recipe": "published"},
        {"recipe": "published"},
    ],
)
def test_the_planned_network_is_kept_without_a_time_limit_or_where_that_is_asked(asked: dict, machine: Machine) -> None:
    assert choose(machine=machine, **asked).configuration == THICK
    assert not machine.timed


def test_the_planned_network_is_timed_too_because_mirroring_depends_on_it(machine: Machine) -> None:
    for budget_s, mirrored in ((1000, False), (1_000_000, True)):
        choices = choose(machine=machine, budget=Budget(max_time_s=budget_s), network="planned")
        assert (choices.configuration, choices.mirror) == (THICK, mirrored)
    assert machine.timed == [THICK, THICK]


@pytest.mark.parametrize(
    ("n_labels", "n_cases", "batch_size", "expected"),
    [
        (1, 10, 2, 1600),  # To learn a structure in eight poses takes its time,
        (5, 10, 2, 2000),  # several take more,
        (5, 10, 32, 2000),  # and slices are no poses.
        (2, 160, 2, 3200),  # Many cases are long new.
        (2, 160, 8, 1600),
        (3, 1000, 2, 10_000),
        (100, 10, 2, 10_000),
    ],
)
def test_mirroring_begins_when_cases_have_been_seen_often(
    n_labels: int, n_cases: int, batch_size: int, expected: int
) -> None:
    assert steps_to_mirror(RECIPES["fast"], n_labels=n_labels, n_cases=n_cases, batch_size=batch_size) == expected
    assert steps_to_mirror(RECIPES["published"], n_labels=n_labels, n_cases=n_cases, batch_size=batch_size) == 0
    labels = LabelSpec(names=tuple(map(str, range(n_labels))), values=tuple(range(1, n_labels + 1)))
    plan = dataclasses.replace(make_plan(), labels=labels)
    for n_steps, mirrored in ((expected - 1, False), (expected, True)):
        choices = choose(plan, n_cases=n_cases, budget=Budget(iterations=n_steps), batch_size=batch_size)
        assert choices.mirror is mirrored


def test_a_patch_that_the_user_has_set_is_kept(machine: Machine) -> None:
    plan = make_plan(Reason(subject="configurations.3d_fullres.patch_size", text=f"{SET_BY_USER}: 16 x 96 x 64"))
    chosen = choose(plan, machine=machine, budget=Budget(max_time_s=1)).configuration
    assert chosen.patch_size == THICK.patch_size
    assert chosen.network.features == (16, 32, 64, 128)
    assert len(machine.timed) == 2, "no network is timed twice"


def test_what_is_asked_for_explicitly_counts_and_is_the_reason() -> None:
    asked: dict[str, Any] = {"batch_size": 5, "sampling": "published", "foreground_fraction": 0.1, "mirror": True}
    choices = choose(budget=Budget(iterations=10), **asked)
    assert {name: getattr(choices, name) for name in asked} == asked
    assert {reason.text for reason in choices.reasons} == {SET_BY_USER}


def test_the_published_recipe_is_as_published() -> None:
    choices = choose(recipe="published")
    assert (choices.batch_size, choices.sampling, choices.mirror) == (7, "published", True)
    assert choices.foreground_fraction == pytest.approx(1 / 3)
    assert choices.budget.iterations == 250_000


def test_nothing_is_mirrored_without_augmentation() -> None:
    assert not choose(recipe="published", augment="none").mirror


@pytest.mark.parametrize(("n_cases", "epochs"), [(1, 50), (60, 60), (100_000, 250)])
def test_a_full_training_grows_with_the_cases_within_limits(n_cases: int, epochs: int) -> None:
    budget, reason = full_training(RECIPES["fast"], n_cases=n_cases, batch_size=2, on_cpu=False)
    assert budget.iterations == epochs * 250
    assert f"{epochs} epochs" in reason


def test_without_a_budget_a_cpu_trains_for_an_hour_and_not_for_days(machine: Machine) -> None:
    choices = choose(machine=machine)
    assert choices.budget == Budget(max_time_s=3600)
    assert choices.configuration.network.features[0] < THICK.network.features[0]
    (told,) = (reason.text for reason in choices.reasons if reason.subject == "training.budget")
    assert "1 h 0 min for each fold" in told
    assert choose(recipe="published").budget == Budget.make(epochs=1000)


def test_what_was_begun_on_a_gpu_without_a_budget_does_not_end_after_the_hour_of_a_cpu(machine: Machine) -> None:
    asked = choose(machine=machine, budget=Budget(iterations=10))
    on_gpu = with_requests(asked, TrainConfig(), n_cases=100, on_cpu=False)
    assert on_gpu.budget.max_time_s is None
    assert with_requests(on_gpu, TrainConfig(), n_cases=100, on_cpu=True) == on_gpu
    assert with_requests(on_gpu, TrainConfig(budget=asked.budget), n_cases=100, on_cpu=True).budget == asked.budget
    # A GPU has a full training in any case, and batches of another size need another number of them.
    on_cpu = choose(machine=machine)
    assert with_requests(on_cpu, TrainConfig(), n_cases=100, on_cpu=False).budget == on_gpu.budget
    larger = with_requests(on_gpu, TrainConfig(batch_size=2 * on_gpu.batch_size), n_cases=100, on_cpu=False)
    assert 0 < (larger.budget.iterations or 0) < (on_gpu.budget.iterations or 0)


def test_a_step_of_the_real_network_is_timed() -> None:
    choices, seconds = choose_training(
        make_plan(), THICK, TrainConfig(budget=Budget(max_time_s=0.01)), n_cases=3, device=CPU
    )
    assert choices.configuration == resize(THICK, LADDER[0].width, LADDER[0].patch_scale)
    assert seconds > 0


def test_who_asks_for_the_network_twice_gets_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the grid is to be coarser, and how the grid that was chosen is trained, are two questions."""
    tried: list[tuple[int, ...]] = []

    def try_step(_: Plan, __: TrainConfig, configuration: ConfigurationPlan, **___: object) -> float:
        tried.append(configuration.patch_size)
        return 0.1 * len(tried)

    monkeypatch.setattr(step_time, "_STEP_TIMES_S", {})
    monkeypatch.setattr(step_time, "_measure_step", try_step)
    ask = partial(choose_network, make_plan(), THICK, n_cases=20, device=CPU)
    first = ask(TrainConfig(budget=Budget(max_time_s=3600.0)))
    n_tried = len(tried)
    assert n_tried > 1
    assert ask(TrainConfig(budget=Budget(max_time_s=3600.0))) == first
    assert len(tried) == n_tried
    ask(TrainConfig(budget=Budget(max_time_s=3600.0), precision="float32"))
    assert len(tried) > n_tried, "in another precision a step takes another time"


def test_a_limit_of_steps_too_asks_for_no_more_of_them(machine: Machine) -> None:
    assert choose(machine=machine, budget=Budget(iterations=50, max_time_s=1_000_000)).configuration == THICK


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=["GPU", "CPU"]
)
def test_a_network_that_does_not_fit_the_memory_is_not_taken(error: Exception) -> None:
    class Small(Machine):
        def __call__(self, configuration: ConfigurationPlan, *, batch_size: int) -> float:
            if torch.Size(configuration.patch_size).numel() > 20_000:
                raise error
            return super().__call__(configuration, batch_size=batch_size)

    chosen = choose(machine=Small(), budget=Budget(max_time_s=1_000_000)).configuration
    assert chosen.patch_size == (8, 56, 40), "the largest that fits"

    def none_fits(configuration: ConfigurationPlan, *, batch_size: int) -> float:
        raise error

    with pytest.raises(TrainingError, match="smaller --batch-size"):
        choose(machine=none_fits, budget=Budget(max_time_s=10))


def test_a_network_that_the_machine_has_no_memory_for_is_not_even_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, machine: Machine
) -> None:
    """A system that is short of memory may end the process without a word."""
    caplog.set_level("INFO")
    monkeypatch.setattr(adapt, "machine_memory_gib", lambda: 0.2)
    chosen = choose(machine=machine, budget=Budget(max_time_s=1_000_000)).configuration
    assert chosen != THICK
    assert chosen == machine.timed[-1]
    assert "of memory, of 143 MiB that this machine may give; smaller ones are trained" in caplog.text
    monkeypatch.setattr(adapt, "machine_memory_gib", lambda: 0.001)
    smallest = choose(budget=Budget(max_time_s=1_000_000)).configuration
    assert smallest == resize(THICK, LADDER[0].width, LADDER[0].patch_scale), "one is tried in any case"


def test_a_plan_that_a_person_has_edited_is_trained_as_it_is(machine: Machine) -> None:
    edited = dataclasses.replace(make_plan(), provenance={"decisions": "of another plan"})
    assert choose(edited, machine=machine, budget=Budget(max_time_s=1)).configuration == THICK


def test_every_sampling_has_its_reason() -> None:
    assert SAMPLING_REASONS.keys() == SAMPLING.keys() == set(SAMPLINGS)
