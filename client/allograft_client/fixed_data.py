# SPDX-License-Identifier: Apache-2.0
"""The data file of one donation, which must stay the same from the first step to the last.

Trained on one file and audited on another, a packet would carry verdicts about text that it never
saw, and its signed commitment would name that other file.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from allograft.durable import durable_write
from allograft.errors import RejectedError
from allograft.plainfile import read_plain

_NAME = "data.sha256"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FixedData:
    """A data file and the private note of what was in it.

    Attributes:
        path: The data.
        directory: The packet's directory, where the note is.
    """

    path: Path
    directory: Path

    @property
    def is_fixed(self) -> bool:
        """Whether there is a note."""
        return self._note.exists()

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the data as noted.

        Raises:
            OSError: There is no note.
            RejectedError: AG-RCP-034 if it is damaged.
        """
        text = read_plain(self._note, 64).decode("ascii", "replace")
        if not _SHA256.fullmatch(text):
            raise RejectedError("AG-RCP-034", "the note of the run's data is damaged")
        return text

    def fix(self) -> None:
        """Note what is in the file now.

        Raises:
            RejectedError: AG-RCP-031 if it cannot be read.
            UnavailableError: AG-STO-001 if the disk is full.
        """
        durable_write(self._note, self._read().encode("ascii"), mode=0o600)

    def check(self) -> None:
        """Refuse a file that is not the noted one.

        Raises:
            RejectedError: AG-RCP-034, or AG-RCP-031 if it cannot be read.
        """
        if self._read() != self.digest:
            raise RejectedError("AG-RCP-034", "the data changed since the run began")

    @property
    def _note(self) -> Path:
        return self.directory / _NAME

    def _read(self) -> str:
        try:
            with self.path.open("rb") as handle:
                return hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise RejectedError(
                "AG-RCP-031", f"cannot read the data: {type(error).__name__}"
            ) from error
