"""Weights and checkpoints: what is read is what was written, and resuming changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from autoseg.core.errors import TrainingError
from autoseg.networks.build import build_network
from autoseg.planning.plan import NetworkPlan
from autoseg.training.checkpoint import (
    RunState,
    load_checkpoint,
    load_weights,
    read_state,
    save_checkpoint,
    save_weights,
)

STATE = RunState(
    config="abc",
    iteration=7,
    epoch=2,
    elapsed_s=1.5,
    epoch_losses=(0.1, 1 / 3),
    epoch_time_s=0.25,
    loss_scale=None,
    device="cpu",
    precision="float32",
    finished=False,
)
Optimizer = torch.optim.Optimizer
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adamw": lambda network: torch.optim.AdamW(network.parameters(), lr=1e-2),
    "adamw fused": lambda network: torch.optim.AdamW(network.parameters(), lr=1e-2, fused=True),
    "sgd": lambda network: torch.optim.SGD(network.parameters(), lr=1e-2, momentum=0.99, nesterov=True),
    "sgd fused": lambda network: torch.optim.SGD(
        network.parameters(), lr=1e-2, momentum=0.99, nesterov=True, fused=True
    ),
}


def make_network(n_axes: int, *, features: tuple[int, ...] = (4, 8), seed: int = 0) -> nn.Module:
    plan = NetworkPlan(
        architecture="unet",
        features=features,
        strides=((1,) * n_axes, (2,) * n_axes),
        kernel_sizes=((3,) * n_axes,) * 2,
        encoder_blocks=(1, 1),
        decoder_blocks=(1,),
    )
    torch.manual_seed(seed)
    return build_network(plan, n_channels=2, n_classes=3)


def step(network: nn.Module, optimizer: Optimizer, number: int, n_axes: int) -> None:
    """One step on a batch that depends on its number alone."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(2, 2, *(8,) * n_axes, generator=generator)
    weights = torch.randn(2, 3, *(8,) * n_axes, generator=generator)
    optimizer.zero_grad()
    (network(images)[0] * weights).mean().backward()
    optimizer.step()


def test_weights_round_trip(tmp_path: Path) -> None:
    written, read = make_network(3, seed=1), make_network(3, seed=2)
    save_weights(tmp_path / "weights.safetensors", written)
    load_weights(tmp_path / "weights.safetensors", read)
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name]), name
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]
    (tmp_path / "other").touch()
    rights = {(tmp_path / name).stat().st_mode for name in ("other", "weights.safetensors")}
    assert len(rights) == 1, "colleagues may read the weights as they may any other file"
    images = torch.randn(1, 2, 8, 8, 8)
    with torch.no_grad():
        assert torch.equal(written.eval()(images), read.eval()(images))


@pytest.mark.parametrize("n_axes", [2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_run_ends_with_the_same_weights(tmp_path: Path, name: str, n_axes: int) -> None:
    """Fused optimizers included, for which weights and moments must have the same layout in memory."""
    network = make_network(n_axes)
    optimizer = OPTIMIZERS[name](network)
    for number in range(3):
        step(network, optimizer, number, n_axes)
    save_checkpoint(tmp_path / "checkpoint.safetensors", network, optimizer, STATE)
    resumed = make_network(n_axes, seed=5)
    resumed_optimizer = OPTIMIZERS[name](resumed)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors", resumed, resumed_optimizer) == STATE
    for number in range(3, 6):
        step(network, optimizer, number, n_axes)
        step(resumed, resumed_optimizer, number, n_axes)
    for (key, tensor), other in zip(network.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), key


def test_checkpoint_before_the_first_step(tmp_path: Path) -> None:
    network = make_network(2)
    optimizer = OPTIMIZERS["adamw"](network)
    save_checkpoint(tmp_path / "checkpoint.safetensors", network, optimizer, STATE)
    other = make_network(2, seed=1)
    other_optimizer = OPTIMIZERS["adamw"](other)
    load_checkpoint(tmp_path / "checkpoint.safetensors", other, other_optimizer)
    step(network, optimizer, 0, 2)
    step(other, other_optimizer, 0, 2)
    for tensor, read in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(tensor, read)


def test_state_is_read_without_the_network(tmp_path: Path) -> None:
    network = make_network(2)
    file = tmp_path / "checkpoint.safetensors"
    save_checkpoint(file, network, OPTIMIZERS["sgd"](network), STATE)
    assert read_state(file) == STATE


def test_weights_of_another_network(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_weights(file, make_network(2, features=(4, 6)))
    with pytest.raises(TrainingError, match="weights are of another network; was the plan changed"):
        load_weights(file, make_network(2))
    with pytest.raises(TrainingError, match="weights are of another network"):
        load_weights(file, make_network(3))


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"weights\.safetensors: no such file; train the fold first"):
        load_weights(tmp_path / "weights.safetensors", make_network(2))


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage"])
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    network = make_network(2)
    optimizer = OPTIMIZERS["adamw"](network)
    file = tmp_path / "checkpoint.safetensors"
    save_checkpoint(file, network, optimizer, STATE)
    content = file.read_bytes()
    file.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "garbage": b"\x07" * 500}[damage])
    with pytest.raises(TrainingError, match="damaged"):
        read_state(file)
    with pytest.raises(TrainingError, match="damaged"):
        load_checkpoint(file, network, optimizer)
    with pytest.raises(TrainingError, match="damaged"):
        load_weights(file, network)


def test_checkpoint_without_state_is_damaged(tmp_path: Path) -> None:
    network = make_network(2)
    file = tmp_path / "checkpoint.safetensors"
    save_weights(file, network)
    with pytest.raises(TrainingError, match="damaged"):
        read_state(file)


def test_failed_write_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    network = make_network(2)
    save_weights(file, network)
    before = file.read_bytes()
    broken = make_network(2)
    # safetensors cannot hold a sparse tensor.
    broken.register_buffer("mask", torch.eye(3).to_sparse())
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        save_weights(file, broken)
    assert file.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_disk_without_room_leaves_the_older_checkpoint_whole(tmp_path: Path) -> None:
    """The system's limit on the size of a file stands in for the full disk: both fail in the middle of writing."""
    resource = pytest.importorskip("resource")
    network = make_network(2)
    optimizer = OPTIMIZERS["adamw"](network)
    file = tmp_path / "checkpoint.safetensors"
    save_checkpoint(file, network, optimizer, STATE)
    before = file.read_bytes()
    step(network, optimizer, 0, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"checkpoint\.safetensors: could not be written .*older one is whole"):
            save_checkpoint(file, network, optimizer, STATE)
        with pytest.raises(TrainingError, match=r"weights\.safetensors: could not be written .*free or mend the disk"):
            save_weights(tmp_path / "weights.safetensors", network)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    assert load_checkpoint(file, network, optimizer) == STATE
