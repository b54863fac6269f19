"""Muon: steepest descent for matrices, where all singular values of an update are alike.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the scale that makes the rates of AdamW
fit, and the weight decay, are of Liu et al., "Muon is scalable for LLM training", 2025. A convolution is the matrix of
its first axis by everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Each step of the iteration maps a singular value s to a s + b s^3 + c s^5; five bring all of them to about 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
N_STEPS = 5
# The root mean square of what AdamW adds to a weight, in units of its rate.
ADAMW_RMS = 0.2
EPS = 1e-15
ADAMW_EPS = 1e-8


def orthogonalise(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Of each the nearest matrix whose singular values are all about 1 (0.7 to 1.2).

    The iteration of Newton and Schulz runs on the products of the rows with each other, so that only two products touch
    the long side of a matrix; those of one size are iterated together, because a GPU is quick with few large kernels.

    Args:
        matrices: (rows, columns) each, any floating type.

    Returns:
        The same shapes, float32.
    """
    flat = [matrix.float() if matrix.shape[0] <= matrix.shape[1] else matrix.float().T for matrix in matrices]
    unit = [matrix / matrix.norm().clamp_min(EPS) for matrix in flat]
    by_size: dict[int, list[int]] = {}
    for index, matrix in enumerate(unit):
        by_size.setdefault(len(matrix), []).append(index)
    results = list(unit)
    for indices in by_size.values():
        factors = _iterate(torch.stack([unit[index] @ unit[index].T for index in indices]))
        for index, factor in zip(indices, factors, strict=True):
            results[index] = factor @ unit[index]
    return [
        result if result.shape == matrix.shape else result.T for result, matrix in zip(results, matrices, strict=True)
    ]


def _iterate(grams: Tensor) -> Tensor:
    """What makes a matrix orthogonal, from the products of its rows: (N, rows, rows) to the same."""
    unit = torch.eye(grams.shape[-1], device=grams.device).expand_as(grams)
    a, b, c = COEFFICIENTS
    product = factor = a * unit + b * grams + c * (grams @ grams)
    for _ in range(N_STEPS - 1):
        grams = factor @ grams @ factor
        # Rounding makes it a little lopsided, and the iteration would enlarge that.
        grams = (grams + grams.mT) / 2
        factor = a * unit + b * grams + c * (grams @ grams)
        product = factor @ product
    return product


class Muon(torch.optim.Optimizer):
    """Muon for convolutions, AdamW for everything else, with one rate and one weight decay for both."""

    def __init__(
        self,
        convolutions: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        """Takes the parameters.

        Args:
            convolutions: (out, in, ...) each, transposed ones (in, out, ...), to be orthogonalised.
            others: for AdamW.
            lr: as for AdamW.
            weight_decay: decoupled.
            momentum: of Nesterov, for the convolutions.
            betas: of AdamW.
        """
        groups = [{"params": list(convolutions), "matrices": True}, {"params": list(others), "matrices": False}]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Changes the weights by their gradients."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                (self._step_matrices if group["matrices"] else self._step_others)(weights, group)

    def _step_matrices(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        gradients = [_gradient(weight) for weight in weights]
        momenta = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        # Weights are channels-last, so these are views of them. The order of a matrix's columns does not matter.
        matrices = [matrix.movedim(1, -1).flatten(1) for matrix in ahead]
        for weight, update in zip(weights, orthogonalise(matrices), strict=True):
            scale = ADAMW_RMS * max(update.shape) ** 0.5
            channels_last = weight.movedim(1, -1)
            channels_last.sub_(update.reshape(channels_last.shape), alpha=group["lr"] * scale)

    def _step_others(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        for weight in weights:
            if not self.state[weight]:
                zeros = {name: torch.zeros_like(weight) for name in ("mean", "square")}
                self.state[weight].update(zeros, step=torch.zeros(()))
            self.state[weight]["step"] += 1
        first, second = group["betas"]
        gradients = [_gradient(weight) for weight in weights]
        means, squares = ([self.state[weight][name] for weight in weights] for name in ("mean", "square"))
        # Those that had no gradient at first have made fewer steps.
        steps = [float(self.state[weight]["step"]) for weight in weights]
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        roots = torch._foreach_div(torch._foreach_sqrt(squares), [(1 - second**step) ** 0.5 for step in steps])
        torch._foreach_add_(roots, ADAMW_EPS)
        torch._foreach_addcdiv_(weights, means, roots, [-group["lr"] / (1 - first**step) for step in steps])


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad
