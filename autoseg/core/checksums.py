"""Hashes that find damage to what is on disk: a changed byte, a part that is missing, zeros in its place.

BLAKE2b, which is as quick on any processor: 0.8 GiB/s of a file in the page cache on one core of a server (AMD EPYC),
1.5 GiB/s on two. SHA-256 does 1.5 GiB/s there, by instructions that not all processors have, and a third without.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_N_BYTES = 16
_PIECE_BYTES = 2**20


def hash_file(path: Path) -> str:
    """The hash of a file's bytes, in hexadecimal. Other threads go on meanwhile.

    Raises:
        OSError: it cannot be read.
    """
    state, piece = hashlib.blake2b(digest_size=_N_BYTES), memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while n_bytes := file.readinto(piece):
            state.update(piece[:n_bytes])
    return state.hexdigest()


def hash_bytes(*parts: bytes | memoryview) -> str:
    """The hash of bytes, one after the other, in hexadecimal."""
    state = hashlib.blake2b(digest_size=_N_BYTES)
    for part in parts:
        state.update(part)
    return state.hexdigest()
