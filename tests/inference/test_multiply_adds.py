"""Multiply-adds against those counted layer by layer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from autoseg.core.serialize import from_plain, read_json
from autoseg.inference.cost import count_multiply_adds
from autoseg.networks.build import build_network
from autoseg.planning.plan import Plan

PLAN = Path(__file__).parents[2] / "plans" / "msd_hippocampus.json"


@pytest.mark.parametrize(("name", "shape", "n_tiles"), [("2d", (7, 56, 40), 7), ("3d_fullres", (40, 56, 70), 3)])
def test_a_case_costs_its_tiles_times_the_layers(name: str, shape: tuple[int, int, int], n_tiles: int) -> None:
    plan = from_plain(Plan, read_json(PLAN)["plan"])
    configuration = plan.configuration(name)
    assert configuration.patch_size == (40, 56, 40)[-configuration.n_axes :]
    with torch.device("meta"):
        network = build_network(configuration.network, n_channels=1, n_outputs=plan.labels.n_outputs).eval()
    counted = [0]

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        # Transposed convolutions touch every weight once per voxel of the input, others once per voxel of the output.
        voxels = inputs[0] if "Transpose" in type(layer).__name__ else output
        counted[0] += math.prod(voxels.shape[2:]) * weight.numel()

    for layer in network.modules():
        if "Conv" in type(layer).__name__ and hasattr(layer, "weight"):
            layer.register_forward_hook(count)
    network(torch.empty(1, 1, *configuration.patch_size, device="meta"))
    assert count_multiply_adds(plan, configuration, shape) == pytest.approx(n_tiles * counted[0] / 1e9, rel=1e-6)
