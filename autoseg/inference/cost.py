"""What it takes to segment a case, counted, not timed, so that configurations compare whatever they ran on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from autoseg.inference.sliding_window import tile_starts
from autoseg.networks.build import build_trainable
from autoseg.planning.plan import ConfigurationPlan, Plan


def count_multiply_adds(
    plan: Plan, configuration: ConfigurationPlan, shape: Sequence[int], *, step_fraction: float = 0.5
) -> float:
    """Multiply-adds, in billions, of one network for a case, without mirrored copies.

    Args:
        plan: has channels and labels.
        configuration: has patch and network.
        shape: (Z, Y, X) of the case on the configuration's grid.
        step_fraction: distance of tiles as a fraction of the patch.
    """
    with torch.device("meta"):
        network = build_trainable(plan, configuration).eval()
        n_channels = len(plan.channels) + (configuration.previous is not None)
        tile = torch.zeros(1, n_channels, *configuration.patch_size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(tile)
    window: tuple[int, ...] = (1, *configuration.patch_size)[-3:]
    sizes = zip(shape, window, strict=True)
    n_tiles = math.prod(len(tile_starts(size, patch, step_fraction)) for size, patch in sizes)
    return counter.get_total_flops() / 2 * n_tiles / 1e9
