"""What is told of errors of the system and of libraries."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from autoseg.core.faults import describe_fault, is_device_lost, is_device_memory, is_out_of_memory
from autoseg.core.serialize import atomic_path

MEMORY = "memory of this machine"
GPU_MEMORY = "the GPU's memory is full"
GPU_LOST = "the GPU has failed"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError("Unable to allocate 2.00 GiB for an array"), MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), MEMORY),
        (RuntimeError("std::bad_alloc"), MEMORY),
        (ImportError("libtorch.so: failed to map segment from shared object"), MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory."), GPU_MEMORY),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), GPU_MEMORY),
        (torch.AcceleratorError("CUDA error: out of memory"), GPU_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), GPU_MEMORY),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), GPU_MEMORY),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), GPU_MEMORY),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), GPU_LOST),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), GPU_LOST),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), GPU_LOST),
        (
            RuntimeError("CUDA error: no kernel image is available for this device"),
            "not built for this GPU",
        ),
        (RuntimeError("can't start new thread"), "no more threads"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/w/a.json"), "/w/a.json: the disk is full"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/w/a.json"), "read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "/w"), "/w: there is no permission"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit -n"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "your share of the disk is used up"),
        (OSError(errno.EPROTO, "Protocol error", "/w"), "/w: Protocol error"),
    ],
)
def test_a_fault_is_told_with_what_to_do(error: Exception, expected: str) -> None:
    told = describe_fault(error)
    assert told is not None
    assert expected in told
    assert "\n" not in told
    assert "What to do: " in told or "Nothing more was done" in told


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        ValueError("out of memory"),
        KeyError("CUDA error"),
    ],
)
def test_a_mistake_in_the_program_is_no_fault(error: Exception) -> None:
    assert describe_fault(error) is None


def test_kinds_do_not_overlap() -> None:
    full, lost = RuntimeError("CUDA error: out of memory"), RuntimeError("CUDA error: unspecified launch failure")
    assert is_out_of_memory(full)
    assert is_device_memory(full)
    assert not is_device_lost(full)
    assert is_device_lost(lost)
    assert not is_out_of_memory(lost)
    assert not is_device_memory(MemoryError())


@pytest.mark.parametrize("is_folder", [False, True])
def test_errors_tell_the_name_that_the_user_knows(tmp_path: Path, is_folder: bool) -> None:
    target = tmp_path / "case"
    inner = target / "image.npy" if is_folder else target

    def fail() -> None:
        with atomic_path(target) as temporary:
            name = temporary
            if is_folder:
                temporary.mkdir()
                name = temporary / "image.npy"
            name.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(name))

    with pytest.raises(OSError, match="No space") as raised:
        fail()
    assert raised.value.filename == str(inner)
    assert not list(tmp_path.iterdir())


def test_numpy_says_neither_what_nor_why(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_path(tmp_path / "image.npy"):
            raise OSError("1048576 requested and 4064 written")

    with pytest.raises(OSError, match=r"image\.npy") as raised:
        fail()
    # There is room here, so that is not why.
    assert raised.value.errno == errno.EIO
    assert "the disk has failed" in str(describe_fault(raised.value))


def test_errors_about_other_files_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised, atomic_path(tmp_path / "a.txt"):
        (tmp_path / "other.txt").read_text()
    assert raised.value.filename == str(tmp_path / "other.txt")
