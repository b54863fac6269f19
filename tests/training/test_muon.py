"""The optimizer: orthogonal updates for convolutions, AdamW for the rest."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from autoseg.training.muon import Muon, orthogonalise
from autoseg.training.recipe import RECIPES, make_optimizer


@pytest.mark.parametrize("shape", [(8, 8), (16, 432), (432, 16), (64, 65), (1, 27), (5, 1)])
def test_singular_values_become_about_one_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator)
    (result,) = orthogonalise([matrix])
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    core = left.T @ result @ right.T
    assert (core - torch.diag(core.diagonal())).abs().max() < 1e-3


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_size_of_a_gradient_does_not_matter(scale: float) -> None:
    matrix = torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(*orthogonalise([matrix * scale, matrix]), rtol=1e-2, atol=1e-2)


def test_small_singular_values_do_not_blow_up() -> None:
    left, _ = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(2)))
    matrix = left @ torch.diag(torch.logspace(0, -12, 32)) @ torch.eye(32, 400)
    values = torch.linalg.svdvals(orthogonalise([matrix])[0])
    assert torch.isfinite(values).all()
    assert values.max() < 1.3


def test_of_a_zero_gradient_nothing_comes() -> None:
    assert orthogonalise([torch.zeros(4, 9)])[0].abs().max() == 0


def test_matrices_together_are_as_each_alone() -> None:
    generator = torch.Generator().manual_seed(4)
    matrices = [torch.randn(shape, generator=generator) for shape in [(4, 9), (9, 4), (4, 30), (7, 7), (4, 9)]]
    for together, matrix in zip(orthogonalise(matrices), matrices, strict=True):
        torch.testing.assert_close(together, orthogonalise([matrix])[0], rtol=1e-3, atol=1e-4)


def test_first_step_is_the_rate_times_an_orthogonal_matrix() -> None:
    weight = nn.Parameter(torch.zeros(4, 3, 3, 3, 3))
    optimizer = Muon([weight], [], lr=0.1, weight_decay=0.0)
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    optimizer.step()
    values = torch.linalg.svdvals(weight.detach().flatten(1)) / (0.1 * 0.2 * 81**0.5)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert (weight * weight.grad).sum() < 0, "it goes down"


@pytest.mark.parametrize("shape", [(4, 6, 3, 3, 3), (40, 2, 1, 3, 3), (5, 3, 1, 1, 1)])
def test_the_layout_in_memory_changes_nothing(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(5)
    weight, gradient = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        parameter = nn.Parameter(weight.clone(memory_format=layout))
        parameter.grad = gradient.clone(memory_format=layout)
        Muon([parameter], [], lr=0.1, weight_decay=0.1).step()
        found.append(parameter.detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    (expected,) = orthogonalise([gradient.flatten(1)])
    scale = 0.1 * 0.2 * max(expected.shape) ** 0.5
    # With Nesterov's momentum the first step goes along the gradient, too.
    wanted = 0.99 * weight - scale * expected.reshape(shape)
    torch.testing.assert_close(found[0], wanted, rtol=1e-3, atol=1e-3)


def test_matrices_are_optimised_as_by_the_muon_of_torch() -> None:
    """Over several steps, where momentum, Nesterov's look ahead and the last gradient point elsewhere each."""
    generator = torch.Generator().manual_seed(6)
    start = torch.randn(8, 24, generator=generator)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    first = Muon([ours], [], lr=0.1, weight_decay=0.1)
    second = torch.optim.Muon(
        [theirs], lr=0.1, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        gradient = torch.randn(start.shape, generator=generator)
        before = [weight.detach().flatten().clone() for weight in (ours, theirs)]
        for weight, optimizer in ((ours, first), (theirs, second)):
            weight.grad = gradient.clone()
            optimizer.step()
        change, wanted = (w.detach().flatten() - b for w, b in zip((ours, theirs), before, strict=True))
        # That of torch iterates in bfloat16.
        assert torch.cosine_similarity(change, wanted, dim=0) > 0.99
        assert float(change.norm()) == pytest.approx(float(wanted.norm()), rel=0.03)


def test_what_is_no_convolution_is_optimised_as_by_adamw() -> None:
    ours, theirs = (nn.Parameter(torch.tensor([1.0, -2.0, 0.5])) for _ in range(2))
    first = Muon([], [ours], lr=0.01, weight_decay=0.1)
    second = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for step in range(5):
        for weight in (ours, theirs):
            weight.grad = torch.tensor([1.0, 0.1 * step, -3.0])
        first.step()
        second.step()
    torch.testing.assert_close(ours, theirs)


def test_weights_without_gradient_stay() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    Muon([weight], [], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(weight.detach(), torch.ones(2, 2))


def test_the_recipe_orthogonalises_all_convolutions_but_those_that_make_logits() -> None:
    network = nn.ModuleDict({"encoder": nn.Conv3d(1, 4, 3), "heads": nn.Conv3d(4, 2, 1)})
    optimizer = make_optimizer(network, dataclasses.replace(RECIPES["fast"], optimizer="muon"), torch.device("cpu"))
    matrices, others = (group["params"] for group in optimizer.param_groups)
    assert [weight.shape for weight in matrices] == [(4, 1, 3, 3, 3)]
    assert len(others) == 3
