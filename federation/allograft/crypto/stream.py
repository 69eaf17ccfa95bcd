# SPDX-License-Identifier: Apache-2.0
"""Random bytes in bulk: the ChaCha20 keystream of a key from the operating system.

For noise and coins that must not be guessable, where asking the operating system for every byte
would be slow. A stream is never saved and its key never leaves the object.
"""

from __future__ import annotations

import os

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

#: After this much a fresh key is taken: the block counter of RFC 8439 has 32 bits of 64 bytes.
_REKEY_BYTES = 1 << 36


class SecureStream:
    """A source of random bytes (RFC 8439 ChaCha20, keyed by the operating system)."""

    def __init__(self) -> None:
        self._rekey()

    def read(self, size: int) -> bytes:
        """That many fresh random bytes."""
        if self._left < size:
            self._rekey()
        self._left -= size
        return self._encryptor.update(bytes(size))

    def _rekey(self) -> None:
        cipher = Cipher(algorithms.ChaCha20(os.urandom(32), bytes(16)), mode=None)
        self._encryptor = cipher.encryptor()
        self._left = _REKEY_BYTES
