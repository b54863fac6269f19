"""Weights and the state of a training run, in safetensors: no pickle, and whole or absent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autoseg.core.errors import FormatError, TrainingError
from autoseg.core.runtime import format_memory
from autoseg.core.serialize import atomic_path, from_plain, to_plain

_NETWORK, _OPTIMIZER = "network.", "optimizer."
_STATE = "state"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a training run is, besides its weights and optimizer.

    Attributes:
        config: digest of what must not change when a run is resumed.
        iteration: steps done.
        epoch: epochs done.
        elapsed_s: time spent in training, over all parts of the run.
        epoch_losses: losses of the epoch that has begun, step by step.
        epoch_time_s: time spent in that epoch.
        loss_scale: of float16 training; None otherwise.
        device: the kind of device that trained, such as "cpu".
        precision: that it computed in, such as "bfloat16".
        finished: whether the budget is used up.
    """

    config: str
    iteration: int
    epoch: int
    elapsed_s: float
    epoch_losses: tuple[float, ...]
    epoch_time_s: float
    loss_scale: float | None
    device: str
    precision: str
    finished: bool


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the training of a network had come.

    Attributes:
        step: steps done.
        epoch: epochs done.
    """

    step: int
    epoch: int


def save_weights(path: Path, network: nn.Module) -> None:
    """Writes the weights of a network atomically.

    Raises:
        TrainingError: the disk is full or cannot be written to; an older file is as it was.
    """
    _write(path, network.state_dict())


def load_weights(path: Path, network: nn.Module) -> None:
    """Reads weights into a network.

    Raises:
        TrainingError: missing, damaged, or of another network.
    """
    load_into(network, _read(path)[0], path)


def save_checkpoint(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, state: RunState) -> None:
    """Writes everything needed to go on, in one file, atomically.

    Raises:
        TrainingError: the disk is full or cannot be written to; an older file is as it was.
    """
    tensors = {_NETWORK + name: tensor for name, tensor in network.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"{_OPTIMIZER}{index}.{name}": tensor for name, tensor in values.items()}
    _write(path, tensors, metadata={_STATE: json.dumps(to_plain(state))})


def load_checkpoint(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
    """Reads a checkpoint into a network and its optimizer.

    Raises:
        TrainingError: damaged, or of another network.
    """
    tensors, metadata = _read(path)
    state = _parse_state(path, metadata)
    network_part = {name[len(_NETWORK) :]: tensor for name, tensor in tensors.items() if name.startswith(_NETWORK)}
    load_into(network, network_part, path)
    values: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(_OPTIMIZER):
            index, _, key = name[len(_OPTIMIZER) :].partition(".")
            values.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})
    _match_layout(optimizer)
    return state


def _match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Gives moments the memory layout of their weights: fused optimizers pair them by position in memory."""
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def read_state(path: Path) -> RunState:
    """The state alone, without the tensors.

    Raises:
        TrainingError: damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error
    return _parse_state(path, metadata)


def read_network(path: Path) -> tuple[dict[str, Tensor], Progress]:
    """What a checkpoint has learned so far, without the optimizer; whichever version of autoseg has written it.

    Returns:
        The weights of the network, and how far it had come.

    Raises:
        TrainingError: missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(_NETWORK)]  # noqa: SIM118
            tensors = {name[len(_NETWORK) :]: file.get_tensor(name) for name in names}
            state = json.loads((file.metadata() or {})[_STATE])
        return tensors, Progress(step=state["iteration"], epoch=state["epoch"])
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise _damaged(path, error) from error


def _write(path: Path, tensors: dict[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with atomic_path(path) as temporary:
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            # safetensors makes files that nobody else may read; these get the rights of any other file.
            temporary.touch()
            rights = temporary.stat().st_mode
            save_file(on_cpu, temporary, metadata=metadata)
            temporary.chmod(rights)
    except (OSError, SafetensorError) as error:
        size = format_memory(sum(tensor.nbytes for tensor in tensors.values()) / 2**30)
        older = "; the older one is whole" if path.exists() else ""
        raise TrainingError(
            f"{path}: could not be written ({error}){older}; make {size} free or mend the disk, then the same command "
            "goes on"
        ) from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise TrainingError(f"{path}: no such file; train the fold first")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _parse_state(path: Path, metadata: dict[str, str]) -> RunState:
    try:
        return from_plain(RunState, json.loads(metadata[_STATE]))
    except (KeyError, json.JSONDecodeError, FormatError) as error:
        raise _damaged(path, error) from error


def load_into(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Gives a network weights that were read from `path`.

    Raises:
        TrainingError: they are of another network.
    """
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        message = f"{path}: the weights are of another network; was the plan changed after training? Train again."
        raise TrainingError(message) from error


def _damaged(path: Path, error: Exception) -> TrainingError:
    return TrainingError(f"{path}: the file is damaged ({error}); delete it and train again")
