"""The predictor against the textbook: every tile, mirrored copy and fold by itself, in float64, all at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import torch
from numpy.typing import NDArray
from tiny_cases import make_record
from tiny_plans import make_tiny_network_plan
from torch import Tensor, nn

from autoseg.inference import sliding_window
from autoseg.inference.sliding_window import SlidingWindow, WindowConfig
from autoseg.inference.volumes import LabelMap, change_along, ready_rows
from autoseg.networks.build import build_network
from autoseg.networks.outputs import Outputs

CPU = torch.device("cpu")
GRID, SCAN = (22, 18, 30), (37, 31, 52)
PATCH = (16, 16, 24)
N_CLASSES = 4


def make_networks(n_folds: int) -> list[nn.Module]:
    """Small U-Nets, trained for a moment to tell bright from dark, so that their logits are as smooth as real ones."""
    plan = make_tiny_network_plan(features=(8, 16))
    networks = []
    for seed in range(n_folds):
        torch.manual_seed(seed)
        network = build_network(plan, n_channels=1, n_outputs=N_CLASSES)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
        for number in range(15):
            image = make_image(PATCH, seed=100 * seed + number)
            optimizer.zero_grad()
            logits = network(image[None])[0]
            nn.functional.cross_entropy(logits, reference(image)[None]).backward()
            optimizer.step()
        networks.append(network.eval())
    return networks


def make_image(shape: tuple[int, ...], *, seed: int) -> Tensor:
    noise = np.random.default_rng(seed).normal(size=shape)
    smooth = scipy.ndimage.gaussian_filter(noise, 2.0)
    return torch.from_numpy(smooth / smooth.std())[None].float()


def reference(image: Tensor) -> Tensor:
    return torch.bucketize(image[0], torch.tensor([-0.7, 0.0, 0.7]))


Known = tuple[list[nn.Module], Tensor, NDArray[np.int64]]


@pytest.fixture(scope="module")
def known(one_thread: None) -> Known:
    """Networks, an image, and its label map by the textbook."""
    del one_thread
    networks, image = make_networks(2), make_image(GRID, seed=7)
    return networks, image, textbook(image, networks, SCAN)


@torch.no_grad()
def textbook(image: Tensor, networks: Sequence[nn.Module], shape: tuple[int, int, int]) -> NDArray[np.int64]:
    """Mirroring, Gaussian weights, folds averaged as logits, those interpolated linearly, then the arg-max."""
    offsets = [np.arange(size) - (size - 1) / 2 for size in PATCH]
    gaussians = [np.exp(-0.5 * (offset / (size / 8)) ** 2) for offset, size in zip(offsets, PATCH, strict=True)]
    weight = np.einsum("z,y,x->zyx", *gaussians)
    weight = np.maximum(weight / weight.max(), 1e-4)
    total, weights = np.zeros((N_CLASSES, *GRID)), np.zeros(GRID)
    n_steps = [int(np.ceil((size - patch) / (patch / 2))) for size, patch in zip(GRID, PATCH, strict=True)]
    starts = [
        [round(index * (size - patch) / n) for index in range(n + 1)]
        for size, patch, n in zip(GRID, PATCH, n_steps, strict=True)
    ]
    for start in itertools.product(*starts):
        place = tuple(slice(begin, begin + size) for begin, size in zip(start, PATCH, strict=True))
        tile = image[(slice(None), *place)][None]
        mean = np.zeros((N_CLASSES, *PATCH))
        for n_mirrored in range(4):
            for axes in itertools.combinations((2, 3, 4), n_mirrored):
                for network in networks:
                    mean += network(tile.flip(axes)).flip(axes)[0].double().numpy() / (8 * len(networks))
        total[(slice(None), *place)] += mean * weight
        weights[place] += weight
    zoom = [n_out / n_in for n_out, n_in in zip(shape, GRID, strict=True)]
    native = [scipy.ndimage.zoom(part, zoom, order=1, mode="nearest", grid_mode=True) for part in total / weights]
    return np.argmax(native, axis=0)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("axis", [0, 2])
def test_the_default_is_the_textbook(known: Known, monkeypatch: pytest.MonkeyPatch, axis: int, half: bool) -> None:
    # The networks' own rounding is another matter, and the same for both.
    monkeypatch.setattr(sliding_window, "autocast_dtype", lambda device: None)
    if half:
        monkeypatch.setattr(sliding_window, "MAX_FULL_PRECISION_BYTES", 0)
    networks, image, expected = known
    record = replace(make_record(SCAN), shape=GRID)
    window = SlidingWindow(
        networks, WindowConfig(patch_size=PATCH, mirror_axes=(0, 1, 2)), n_outputs=N_CLASSES, device=CPU
    )
    labels = LabelMap(record, axis=axis, outputs=Outputs(N_CLASSES))
    for rows, logits, first_row in ready_rows(window.sweep(image, axis=axis), change_along(record, axis)):
        assert logits.dtype == (torch.float16 if half else torch.float32)
        labels.add(rows, logits, first_row)
    assert len(np.unique(expected)) == N_CLASSES
    differing = (labels.whole() != expected).mean()
    assert differing <= 1e-4
