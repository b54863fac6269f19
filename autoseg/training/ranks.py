"""Processes that train one network together, each on its part of every batch.

They hold the same weights and give the loss the sums of all samples, so that the result is that of one process, up to
rounding. Whatever depends on a clock or a signal has to be agreed on, or they would part ways.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn

from autoseg.core.errors import TrainingError, first_line

# The others wait while one compiles, or the first one writes to a slow disk.
TIMEOUT = timedelta(minutes=30)
MAX_WAIT_TO_PART_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Which of the processes this is, and how it talks to the others, who have to call the same at the same place.

    Attributes:
        index: of this process; the first one, 0, writes the files and keeps the time.
        count: of the processes.
    """

    index: int
    count: int
    _sent: list[weakref.ref[Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.index == 0

    def own_samples(self, batch_size: int) -> tuple[int, ...]:
        """The samples of a batch that this process works on.

        All processes have as many: those for which there is nothing left take the last sample again. So the samples of
        all of them in order are the batch, and then copies of its end, which whoever gathers them leaves out.
        """
        n_own = -(-batch_size // self.count)
        first = self.index * n_own
        return tuple(min(sample, batch_size - 1) for sample in range(first, first + n_own))

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes in order, (n, ...) to (count * n, ...), on a device that was joined.

        What is made of them has the right gradient, as long as it is the same in each process and `distribute` has made
        the network: each process takes the gradient of the whole by its own rows, which together are all of it. The
        network averages over the processes instead of adding up, hence the factor; nothing has to be sent.
        """
        if self.count == 1:
            return rows
        from torch import distributed

        sent = rows.detach().contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.count)]
        distributed.all_gather(parts, sent)
        self._remember(sent, *parts)
        own = rows.view_as(rows)
        if own.requires_grad:
            own.register_hook(lambda gradient: gradient * self.count)
        parts[self.index] = own
        return torch.cat(parts)

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes, without a gradient; the same shape, on the CPU."""
        if self.count == 1:
            return values
        from torch import distributed

        sent = values.clone()
        distributed.all_reduce(sent)
        self._remember(sent)
        return sent.clone()

    def first_says(self, value: float) -> float:
        """The value that the first process has."""
        return float(self.total(torch.tensor(value if self.is_first else 0.0, dtype=torch.float64)))

    def all_true(self, flag: bool) -> bool:
        """Whether it is true in every process."""
        return int(self.total(torch.tensor(int(not flag)))) == 0

    def wait(self) -> None:
        """Until all have come here."""
        self.all_true(True)

    def distribute(self, network: nn.Module) -> nn.Module:
        """The network as its backward pass gives each process the mean of all processes' gradients.

        The weights become those of the first process; they stay shared with `network`.
        """
        if self.count == 1:
            return network
        from torch.nn.parallel import DistributedDataParallel

        assert not list(network.buffers()), "they would differ between processes"
        trained = DistributedDataParallel(network, gradient_as_bucket_view=True)
        # Attributes are let go of in this order, and its reducer may not be the last to have the group: it would end
        # gloo's threads without giving up the interpreter, which they need to free the last tensor of theirs.
        trained.group_after_reducer = trained.process_group  # type: ignore[assignment]
        return trained

    def part(self) -> None:
        """Ends what they do together: who has nothing left to do need not wait for the others."""
        from torch import distributed

        if self.count > 1 and distributed.is_initialized():
            # A thread of gloo that frees its last tensor when the interpreter is gone ends the process.
            end = time.monotonic() + MAX_WAIT_TO_PART_S
            while any(sent() is not None for sent in self._sent) and time.monotonic() < end:
                time.sleep(0.001)
            distributed.destroy_process_group()

    def _remember(self, *sent: Tensor) -> None:
        """Tensors that nobody but gloo has, which frees them a little later than it says that it is done."""
        living = [known for known in self._sent if known() is not None]
        self._sent[:] = living + [weakref.ref(tensor) for tensor in sent if tensor.device.type == "cpu"]


ALONE = Ranks(index=0, count=1)


@contextmanager
def joined(index: int, count: int, *, rendezvous: Path | None, device: torch.device) -> Iterator[Ranks]:
    """While the block runs, this process is one of several that train together.

    Args:
        index: of this process.
        count: of the processes; where it is 1, nothing happens.
        rendezvous: a file that does not exist yet, in a folder that all of them see; None where there is one process.
        device: that this process trains on, the CPU or a CUDA device.

    Yields:
        What training needs of them.

    Raises:
        TrainingError: another process has ended, or does not answer.
    """
    if count == 1:
        yield ALONE
        return
    assert rendezvous is not None
    from torch import distributed

    on_gpu = device.type == "cuda"
    if on_gpu and device.index is not None:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        # What is agreed on between steps are numbers on the CPU, which need not wait for the GPU.
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=distributed.FileStore(str(rendezvous), count),  # type: ignore[attr-defined]  # torch does not list it
        rank=index,
        world_size=count,
        timeout=TIMEOUT,
    )
    ranks, ends_well = Ranks(index=index, count=count), False
    try:
        with warnings.catch_warnings():
            # Of kernels of one voxel, which are the same in every layout.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            yield ranks
        ends_well = True
    except RuntimeError as error:
        # gloo has no error of its own.
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise TrainingError(
                f"lost another of the {count} processes that train together: look for its own error; the same command "
                f"goes on from the last checkpoint ({first_line(error)})"
            ) from error
        raise
    finally:
        # On GPUs not after an error: that waits for the others, who wait for this process. Its end frees them.
        if ends_well or not on_gpu:
            ranks.part()
