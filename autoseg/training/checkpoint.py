"""Weights and the state of a training run, in safetensors: no pickle, and whole or absent.

A hash of each tensor and of the state stands in the metadata and is checked when they are read. Files without hashes,
which other programs and earlier versions have written, are read as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autoseg.core.checksums import hash_bytes
from autoseg.core.errors import FormatError, TrainingError
from autoseg.core.runtime import format_memory, n_cpus
from autoseg.core.serialize import atomic_path, flush, from_plain, later, parse_json, to_plain
from autoseg.training.record import FoldFiles

_NETWORK, _OPTIMIZER = "network.", "optimizer."
_STATE, _HASHES = "state", "hashes"


class DamagedError(TrainingError):
    """A file of a training is not as it was written."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a training run is, besides its weights and optimizer.

    Attributes:
        config: digest of what must not change when a run is resumed, with the keys of the cases.
        iteration: steps done.
        epoch: epochs done.
        elapsed_s: time spent in training, over all parts of the run.
        before_s: of that, what was spent before the first step, on choosing and compiling the network.
        epoch_losses: losses of the epoch that has begun, step by step.
        epoch_time_s: time spent in that epoch.
        loss_scale: of float16 training; None otherwise.
        steps_at_scale: likewise, since it has changed last.
        n_bad_steps: that were skipped because their loss was not finite, since the last epoch in which most were good.
        device: the kind of device that trained, such as "cpu".
        precision: that it computed in, such as "bfloat16".
        finished: whether the budget is used up; for people, `ended` is what counts.
        ended: the steps and seconds of the training whose final weights were written last; None where none were.
        content: digest as `config`, with what the cases hold in place of their keys.
    """

    config: str
    iteration: int
    epoch: int
    elapsed_s: float
    before_s: float
    epoch_losses: tuple[float, ...]
    epoch_time_s: float
    loss_scale: float | None
    device: str
    precision: str
    finished: bool
    steps_at_scale: int = 0
    n_bad_steps: int = 0
    ended: tuple[int, float] | None = later(None)
    content: str = later("")


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
    return _parse_state(path, _read(path, prefix=None)[1])


def read_network(path: Path) -> tuple[dict[str, Tensor], Progress]:
    """What a checkpoint has learned so far, without the optimizer; whichever version of autoseg has written it.

    Returns:
        The weights of the network, and how far it had come.

    Raises:
        TrainingError: missing or damaged.
    """
    tensors, metadata = _read(path, prefix=_NETWORK)
    try:
        state = parse_json(metadata[_STATE].encode())
        progress = Progress(step=state["iteration"], epoch=state["epoch"])
    except (KeyError, TypeError, ValueError, FormatError) as error:
        raise _damaged(path, error) from error
    return {name[len(_NETWORK) :]: tensor for name, tensor in tensors.items()}, progress


def format_weights(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of the file that `save_weights` would write of a network with these weights, on the CPU."""
    from safetensors.torch import save

    return save(dict(tensors), metadata=_with_hashes({}, tensors))


def parse_weights(data: bytes, path: Path) -> dict[str, Tensor]:
    """Weights from the bytes of a file.

    Raises:
        TrainingError: damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        # Before the tensors, their places: its length in eight bytes, and JSON.
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__", {})
    except (SafetensorError, KeyError, ValueError, RuntimeError, FormatError) as error:
        raise _damaged(path, error) from error
    _check(path, tensors, metadata, names=tensors)
    return tensors


def _write(path: Path, tensors: dict[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with atomic_path(path) as temporary:
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            # safetensors makes files that nobody else may read; these get the rights of any other file.
            temporary.touch()
            rights = temporary.stat().st_mode
            save_file(on_cpu, temporary, metadata=_with_hashes(metadata or {}, on_cpu))
            temporary.chmod(rights)
            # Before it takes the place of the older one: some file systems write names before what they name.
            flush(temporary)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        size = format_memory(sum(tensor.nbytes for tensor in tensors.values()) / 2**30)
        older = "; the older one is whole" if path.exists() else ""
        raise TrainingError(
            f"{path}: could not be written ({error}){older}; make {size} free or mend the disk, then the same command "
            "goes on"
        ) from error


def _read(path: Path, *, prefix: str | None = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors whose names begin so, None for none of them, and the metadata, both as they were written."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise TrainingError(f"{path}: no such file; train the fold first")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            chosen = [name for name in names if prefix is not None and name.startswith(prefix)]
            tensors, metadata = {name: file.get_tensor(name) for name in chosen}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error
    _check(path, tensors, metadata, names=names)
    return tensors, metadata


def _check(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, names: Iterable[str]) -> None:
    """Makes sure that tensors and metadata are those that were written.

    Args:
        path: the file.
        tensors: some or all of it.
        metadata: of the file.
        names: of all its tensors.

    Raises:
        DamagedError: they are not.
    """
    if _HASHES not in metadata:
        return
    texts = {name: text for name, text in metadata.items() if name != _HASHES}
    try:
        written: dict[str, str] = dict(parse_json(metadata[_HASHES].encode()))
    except (TypeError, ValueError, FormatError) as error:
        raise _damaged(path, error) from error
    found = _hash_all(texts, tensors)
    differing = sorted({*names, *texts} ^ written.keys()) or [name for name in found if found[name] != written[name]]
    if differing:
        raise _damaged(path, f"{differing[0]} is not as it was written")


def _with_hashes(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {**metadata, _HASHES: json.dumps(_hash_all(metadata, tensors), sort_keys=True)}


def _hash_all(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of type, shape and values of each tensor, on the CPU, several at the same time; and of each text."""

    def hash_one(tensor: Tensor) -> str:
        values = tensor.reshape(-1).view(torch.uint8).numpy()
        return hash_bytes(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), values.data)

    with ThreadPoolExecutor(n_cpus()) as pool:
        hashes = dict(zip(tensors, pool.map(hash_one, tensors.values()), strict=True))
    return hashes | {name: hash_bytes(text.encode()) for name, text in metadata.items()}


def _parse_state(path: Path, metadata: dict[str, str]) -> RunState:
    try:
        return from_plain(RunState, parse_json(metadata[_STATE].encode()))
    except (KeyError, ValueError, FormatError) as error:
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


def _damaged(path: Path, why: object) -> DamagedError:
    advice = "delete it and train again"
    if path == FoldFiles(folder=path.parent).weights:
        advice = "the same 'autoseg train' makes it again from the checkpoint beside it, or copy the model again"
    elif path == FoldFiles(folder=path.parent).checkpoint:
        advice = "delete it, then the same 'autoseg train' begins the fold anew"
        if FoldFiles(folder=path.parent).weights.exists():
            advice = "the fold is trained and can be predicted with; --no-resume trains it anew"
    return DamagedError(f"{path}: the file is damaged ({why}); {advice}")
