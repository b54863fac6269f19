"""Faults of the machine: a full disk, no memory, a lost GPU. What an error says of them, and what to do about it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autoseg.core.errors import AutosegError, first_line
from autoseg.core.text import shorten

PROBE_BYTES = 2**20
MAX_SHOWN = 160

_AGAIN = "then give the same command again ('autoseg predict' with --continue), and it goes on from what is done"
_ROOM = f"make room there or take a folder on another disk, {_AGAIN}"
_RIGHTS = "take a folder that you may write to, or have its rights changed ('ls -ld' shows them)"

# What happened, and what to do.
_OS_ERRORS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", _ROOM),
    errno.EDQUOT: ("your share of the disk is used up", _ROOM),
    errno.EFBIG: ("a file may not grow this large here", f"raise the limit ('ulimit -f' shows it), {_AGAIN}"),
    errno.EROFS: ("the disk is read-only", "take a folder on another disk"),
    errno.EACCES: ("there is no permission for it", _RIGHTS),
    errno.EPERM: ("there is no permission for it", _RIGHTS),
    errno.EMFILE: ("too many files are open", f"raise the limit, for instance 'ulimit -n 4096', {_AGAIN}"),
    errno.ENFILE: ("too many files are open on this machine", f"end what else runs here, {_AGAIN}"),
    errno.ENOTDIR: ("a file is where a folder is to be", "name another folder, or move the file away"),
    errno.EISDIR: ("a folder is where a file is to be", "name another file, or move the folder away"),
    errno.EEXIST: ("something else is there already", "name another folder, or move it away"),
    errno.ENOENT: ("it is not there, or was taken away meanwhile", "put it back, or name another"),
    errno.ENAMETOOLONG: ("the name is too long for this disk", "take a folder with a shorter name"),
    errno.ELOOP: ("symbolic links lead in a circle", "mend the link"),
    errno.EIO: ("the disk has failed", f"look at the system's log ('dmesg'), mend or change the disk, {_AGAIN}"),
    errno.ENOLCK: ("the disk gives no locks", "take a work folder on another disk"),
}
if hasattr(errno, "ESTALE"):
    _OS_ERRORS[errno.ESTALE] = ("the network share has gone", f"connect it again, {_AGAIN}")

_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "bad allocation",
    "ALLOC_FAILED",
    "Unable to allocate",
    "failed to map segment from shared object",
    "failed to allocate",
    "unable to find an engine",
    # These libraries say so where there is no room for their own workspace.
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_NOT_INITIALIZED",
)
_NO_THREAD = ("can't start new thread", "Resource temporarily unavailable")
_GPU_LOST = (
    "CUDA error",
    "CUDA driver error",
    "HIP error",
    "cuDNN error",
    "CUDNN_STATUS_",
    "CUBLAS_STATUS_",
    "CUFFT_",
    "NVML_SUCCESS",
    "MPS backend",
    "Command buffer execution failed",
)
# A GPU that works says so of a mistake in the program, or of a torch that was built for others.
_NOT_LOST = ("device-side assert", "invalid configuration argument", "no kernel image")


class DeviceError(AutosegError):
    """The GPU has failed: nothing that this process does on it means anything any more."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, of the machine or of its GPU: each library says so in its own way."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (RuntimeError, ImportError, SystemError)) and _says(error, _NO_MEMORY)


def is_device_memory(error: BaseException) -> bool:
    """Of an error for which `is_out_of_memory`: whether it was the GPU's memory."""
    return type(error).__name__ == "OutOfMemoryError" or _says(error, ("CUDA", "CUDNN", "CUBLAS", "HIP", "MPS"))


def is_device_lost(error: BaseException) -> bool:
    """Whether the GPU has failed."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error) or _says(error, _NOT_LOST):
        return False
    return type(error).__name__ == "AcceleratorError" or _says(error, _GPU_LOST)


def _says(error: BaseException, signs: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return any(sign.lower() in text for sign in signs)


def describe_fault(error: BaseException) -> str | None:
    """What has failed, where, and what to do, on one line; None where no fault of the machine is to blame."""
    if is_out_of_memory(error):
        return describe_no_memory(error)
    if is_device_lost(error):
        return f"{describe_lost_device(error)}; {_AGAIN}"
    if isinstance(error, OSError):
        return describe_os_error(error)
    if isinstance(error, RuntimeError) and _says(error, _NO_THREAD):
        return (
            "the system allows no more threads. What to do: end what else runs, or raise the limit ('ulimit -u' shows "
            f"it), {_AGAIN}"
        )
    if isinstance(error, RuntimeError) and _says(error, ("no kernel image",)):
        return (
            "the PyTorch that is installed was not built for this GPU. What to do: install one that was, or give "
            "--device cpu"
        )
    return None


def describe_no_memory(error: BaseException) -> str:
    """What to do where memory was short and nothing more is known."""
    if is_device_memory(error):
        return (
            f"the GPU's memory is full ({_told_by(error)}). What to do: end what else runs on it ('nvidia-smi' shows "
            "that), give a smaller --batch-size, or plan with less --gpu-memory; --device cpu needs none of it"
        )
    return (
        f"the memory of this machine, or what may be used of it, is full ({_told_by(error)}). What to do: end what "
        f"else runs here or ask for more (--memory on a cluster), {_AGAIN}; fewer processors need less, and so "
        "do a smaller --batch-size in training and a coarser --spacing in planning"
    )


def describe_lost_device(error: BaseException) -> str:
    """That the GPU has failed, and what to do."""
    return (
        f"the GPU has failed ({_told_by(error)}). What to do: see whether 'nvidia-smi' still shows it, and what "
        "'dmesg' says; restart the machine, or take another GPU with --device"
    )


def describe_os_error(error: OSError) -> str:
    """Which file, what is wrong with it, and what to do."""
    known = _OS_ERRORS.get(error.errno or 0)
    told = error.strerror or first_line(error)
    where = f"{os.fspath(error.filename)!s}: " if isinstance(error.filename, (str, os.PathLike)) else ""
    if known is None:
        return f"{where}{told}. Nothing more was done."
    what, advice = known
    return f"{where}{what} ({told}{_room(error)}). What to do: {advice}."


def _room(error: OSError) -> str:
    """How much room there is, where that is the matter."""
    if error.errno != errno.ENOSPC or not isinstance(error.filename, str):
        return ""
    for folder in Path(error.filename).absolute().parents:
        try:
            usage = shutil.disk_usage(folder)
        except OSError:
            continue
        return f"; {usage.free / 2**20:,.1f} of {usage.total / 2**20:,.0f} MiB are free"
    return ""


def _told_by(error: BaseException) -> str:
    return shorten(first_line(error).rstrip("."), MAX_SHOWN)


@contextmanager
def naming(path: Path, temporary: Path) -> Iterator[None]:
    """While the block runs, errors of the system tell of `path`, not of the temporary name that it is written under.

    Libraries that forget which file it was, or why it could not be written, are helped out.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None and "written" in str(error):
            # numpy counts what it could not write, and does not say why.
            error.errno = _why_not_written(temporary if temporary.is_dir() else temporary.parent)
            error.strerror = os.strerror(error.errno)
        if error.filename is None or str(error.filename).startswith(str(temporary)):
            inner = "" if error.filename is None else str(error.filename)[len(str(temporary)) :]
            error.filename, error.filename2 = f"{path}{inner}", None
        raise


def _why_not_written(folder: Path) -> int:
    """The number of the error that a little more to write meets there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
    except OSError as error:
        return error.errno or errno.EIO
    return errno.EFBIG if _has_file_limit() else errno.EIO


def _has_file_limit() -> bool:
    try:
        import resource
    except ImportError:  # Windows
        return False
    return resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
