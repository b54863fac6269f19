"""Weights and checkpoints: what is read is what was written, and resuming changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_plans import make_tiny_network_plan
from torch import nn

from autoseg.core.errors import TrainingError
from autoseg.networks.build import build_network
from autoseg.training.checkpoint import (
    DamagedError,
    RunState,
    load_checkpoint,
    load_weights,
    parse_weights,
    read_network,
    read_state,
    save_checkpoint,
    save_weights,
)

STATE = RunState(
    config="abc",
    iteration=7,
    epoch=2,
    elapsed_s=1.5,
    before_s=0.5,
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
    plan = make_tiny_network_plan(n_axes, features=features)
    torch.manual_seed(seed)
    return build_network(plan, n_channels=2, n_outputs=3)


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


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :]


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["weights", "checkpoint"])
def test_a_changed_byte_is_found_and_the_file_named_with_what_to_do(tmp_path: Path, kind: str, fraction: float) -> None:
    network = make_network(2)
    optimizer = OPTIMIZERS["adamw"](network)
    step(network, optimizer, 0, 2)
    file = tmp_path / f"{kind}.safetensors"
    if kind == "weights":
        save_weights(file, network)
    else:
        save_checkpoint(file, network, optimizer, STATE)
    content = file.read_bytes()
    file.write_bytes(flipped(content, int(fraction * len(content))))
    if kind == "weights":
        advice = "the same 'autoseg train' makes it again from the checkpoint beside it"
        with pytest.raises(DamagedError, match=rf"weights\.safetensors: the file is damaged .*; {advice}"):
            load_weights(file, network)
        with pytest.raises(DamagedError, match="damaged"):
            parse_weights(file.read_bytes(), file)
    else:
        with pytest.raises(DamagedError, match=r"checkpoint\.safetensors: the file is damaged .*; delete it, then the"):
            load_checkpoint(file, network, optimizer)
        (tmp_path / "weights.safetensors").touch()
        with pytest.raises(DamagedError, match="the fold is trained and can be predicted with; --no-resume"):
            load_checkpoint(file, network, optimizer)


def test_a_changed_byte_anywhere_in_the_header_never_passes_for_what_was_written(tmp_path: Path) -> None:
    """Or leaves everything as it was, such as one in the name of the hashes themselves."""
    network = make_network(2)
    optimizer = OPTIMIZERS["sgd"](network)
    file = tmp_path / "checkpoint.safetensors"
    save_checkpoint(file, network, optimizer, STATE)
    content, written = file.read_bytes(), network.state_dict()
    n_found, positions = 0, range(0, 8 + int.from_bytes(content[:8], "little"), 19)
    for position in positions:
        file.write_bytes(flipped(content, position))
        other = make_network(2, seed=5)
        try:
            state = load_checkpoint(file, other, OPTIMIZERS["sgd"](other))
        except DamagedError:
            n_found += 1
        else:
            assert state == STATE, position
            assert all(torch.equal(tensor, written[name]) for name, tensor in other.state_dict().items()), position
    assert n_found > 0.95 * len(positions)


def test_the_state_and_the_network_are_checked_without_the_rest(tmp_path: Path) -> None:
    network = make_network(2)
    optimizer = OPTIMIZERS["adamw"](network)
    step(network, optimizer, 0, 2)
    file = tmp_path / "checkpoint.safetensors"
    save_checkpoint(file, network, optimizer, STATE)
    content = file.read_bytes()
    assert read_network(file)[1].step == STATE.iteration
    file.write_bytes(content.replace(b'iteration\\": 7', b'iteration\\": 8'))
    assert file.read_bytes() != content
    for read in (read_state, read_network):
        with pytest.raises(DamagedError, match="state is not as it was written"):
            read(file)
    value = network.state_dict()[next(iter(network.state_dict()))].numpy().tobytes()
    start = content.index(value)
    file.write_bytes(flipped(content, start))
    assert read_state(file) == STATE
    with pytest.raises(DamagedError, match=r"network.* is not as it was written"):
        read_network(file)


def test_a_file_without_hashes_is_read_as_it_is(tmp_path: Path) -> None:
    network = make_network(2)
    file = tmp_path / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, file)
    read = make_network(2, seed=4)
    load_weights(file, read)
    for tensor, other in zip(network.parameters(), read.parameters(), strict=True):
        assert torch.equal(tensor, other)
    assert parse_weights(file.read_bytes(), file).keys() == network.state_dict().keys()


def test_equal_weights_make_equal_files(tmp_path: Path) -> None:
    for name in "ab":
        save_weights(tmp_path / name, make_network(2))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
