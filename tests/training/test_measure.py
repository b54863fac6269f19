"""Steps on random patches, and the search for the largest batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_plans import make_tiny_configuration, make_tiny_plan

from autoseg.core.errors import TrainingError
from autoseg.core.labels import LabelSpec
from autoseg.networks.build import build_trainable
from autoseg.planning.plan import Plan
from autoseg.training.augment import AugmentConfig, draw_parameters, read_size
from autoseg.training.learner import Learner
from autoseg.training.measure import (
    can_train,
    find_largest,
    largest_to_try,
    measure_configuration,
    run_steps,
    strongest_augmentation,
)
from autoseg.training.recipe import RECIPES

CPU = torch.device("cpu")


def make_plan(n_axes: int) -> Plan:
    configuration = make_tiny_configuration(
        (8,) * n_axes,
        median_shape=(12.0,) * n_axes,
        largest_shape=(16.0,) * n_axes,
        features=(4, 8, 8),
        batch_dice=n_axes == 2,
    )
    return make_tiny_plan(configuration, labels=LabelSpec(names=("a", "b"), values=(1, 2)), channels=("T1", "T2"))


# -- the search --------------------------------------------------------------------------------------------------------


@given(capacity=st.integers(0, 300), start=st.integers(1, 300), limit=st.integers(0, 300))
def test_the_largest_size_is_found_and_none_is_tried_twice(capacity: int, start: int, limit: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= capacity

    assert find_largest(fits, start=start, limit=limit) == min(capacity, limit)
    assert len(set(tried)) == len(tried)
    assert all(1 <= size <= limit for size in tried)
    # Doubling up from 1 to 300, or down from there, and once more the same for the gap.
    assert len(tried) <= 20


@pytest.mark.parametrize(
    ("capacity", "start", "limit", "tried"),
    [
        pytest.param(5, 2, 128, [2, 4, 8, 6, 5], id="start fits"),
        pytest.param(5, 16, 128, [16, 8, 4, 6, 5], id="start is too large"),
        pytest.param(1000, 2, 7, [2, 4, 7], id="limit fits"),
        pytest.param(1000, 9, 7, [7], id="start is beyond the limit"),
        pytest.param(0, 4, 128, [4, 2, 1], id="not even 1 fits"),
        pytest.param(1000, 4, 0, [], id="nothing to try"),
    ],
)
def test_sizes_are_doubled_then_the_gap_is_halved(capacity: int, start: int, limit: int, tried: list[int]) -> None:
    seen: list[int] = []

    def fits(size: int) -> bool:
        seen.append(size)
        return size <= capacity

    assert find_largest(fits, start=start, limit=limit) == min(capacity, limit)
    assert seen == tried


def test_a_search_that_runs_out_of_time_gives_what_was_seen_to_fit() -> None:
    """As with a capacity of 50 and time for five questions: from then on all are denied."""
    left = [5]

    def fits(size: int) -> bool:
        left[0] -= 1
        return left[0] >= 0 and size <= 50

    assert find_largest(fits, start=4, limit=1000) == 32


def test_no_tensor_of_the_search_needs_more_than_32_bits_to_count_its_values() -> None:
    """Twice 32 features of 128 x 128 x 128 voxels are 2**27 values, so 16 patches are one value too many."""
    plan = make_plan(3)
    small = plan.configuration("3d_fullres")
    assert largest_to_try(plan, small) == 64 * small.batch_size
    network = replace(small.network, features=(32, 64, 128))
    usual = replace(small, patch_size=(128, 128, 128), network=network)
    assert largest_to_try(plan, usual) == 15
    assert largest_to_try(plan, replace(usual, batch_size=20)) == 20
    many = LabelSpec(names=tuple(str(i) for i in range(1, 128)), values=tuple(range(1, 128)))
    assert largest_to_try(replace(plan, labels=many), usual) == 7


def test_a_start_below_1_is_refused() -> None:
    with pytest.raises(ValueError, match="start is 0"):
        find_largest(lambda size: True, start=0, limit=4)


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["fast", "published"])
@pytest.mark.parametrize("n_axes", [2, 3])
def test_steps_are_whole_but_leave_the_weights(n_axes: int, recipe: str) -> None:
    plan = make_plan(n_axes)
    configuration = plan.configuration(plan.recommended)
    learner = Learner(build_trainable(plan, configuration), configuration, recipe=RECIPES[recipe], device=CPU)
    before = {name: weight.clone() for name, weight in learner.network.state_dict().items()}
    augmentation = strongest_augmentation(configuration.patch_size)
    seconds = run_steps(learner, plan, configuration, batch_size=3, augmentation=augmentation, n_steps=2)
    assert len(seconds) == 2
    assert min(seconds) > 0
    for name, weight in learner.network.state_dict().items():
        assert torch.equal(weight, before[name]), name
    parameters = dict(learner.network.named_parameters())
    # The optimizer has what it keeps per weight, and every weight has its gradient.
    assert len(learner.optimizer.state) == len(parameters)
    assert all(weight.grad is not None for weight in parameters.values())
    assert parameters["heads.0.weight"].grad is not None
    assert parameters["heads.0.weight"].grad.abs().max() > 0


@pytest.mark.parametrize("patch_size", [(16, 16), (32, 16), (16, 16, 16), (4, 32, 32)])
def test_the_strongest_augmentation_reads_more_than_ordinary_ones_and_transforms_all(
    patch_size: tuple[int, ...],
) -> None:
    def draw(config: AugmentConfig, seed: int) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(seed)
        parameters = draw_parameters(
            n_samples=2, n_channels=1, n_axes=len(patch_size), config=config, generator=generator
        )
        if config == strongest:
            for values, neutral in (
                (parameters.blur_sigma, 0),
                (parameters.noise_std, 0),
                (parameters.gamma, 1),
                (parameters.contrast, 1),
                (parameters.low_resolution, 1),
            ):
                assert (values != neutral).all()
        return read_size(patch_size, parameters)

    strongest = strongest_augmentation(patch_size)
    sizes = torch.tensor([draw(strongest, seed) for seed in range(20)]).prod(dim=1)
    ordinary = torch.tensor([draw(AugmentConfig.for_patch(patch_size), seed) for seed in range(20)]).prod(dim=1)
    assert sizes.min() > ordinary.float().mean()
    assert sizes.max() >= ordinary.max()


def test_a_batch_that_no_memory_holds_does_not_fit_and_a_small_one_still_does() -> None:
    plan = make_plan(2)
    configuration = plan.configuration("2d")
    network = build_trainable(plan, configuration)

    def fits(batch_size: int) -> bool:
        return can_train(network, plan, configuration, batch_size=batch_size, recipe=RECIPES["fast"], device=CPU)

    assert fits(2)
    # More than a process can address, so it is refused wherever the test runs.
    assert not fits(10**15)
    assert all(weight.grad is None for weight in network.parameters())
    assert fits(2)


def test_measuring_needs_a_gpu() -> None:
    plan = make_plan(2)
    with pytest.raises(TrainingError, match=r"needs a GPU, found cpu; .*NVIDIA GPU, or plan without --measure"):
        measure_configuration(plan, plan.configuration("2d"), device=CPU)
