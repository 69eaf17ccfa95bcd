# SPDX-License-Identifier: Apache-2.0
"""Files that a person names: opened only if they are regular, read only up to a limit.

Invariant: nothing here waits. Opening a named pipe without a writer blocks for good, and an endless
device never ends, so both are refused by what the open descriptor says, not by what the path said.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from allograft.errors import RejectedError


def open_plain(path: Path, *, follow_links: bool = True) -> BufferedReader:
    """Open a regular file for reading.

    Raises:
        OSError: It cannot be opened, or it is a directory, a pipe, a socket or a device.
    """
    links = 0 if follow_links else os.O_NOFOLLOW
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | links)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_plain(path: Path, max_bytes: int, *, follow_links: bool = True) -> bytes:
    """The content of a small regular file.

    Raises:
        OSError: As `open_plain`.
        RejectedError: AG-IN-002 if it is larger than `max_bytes`.
    """
    with open_plain(path, follow_links=follow_links) as handle:
        content = handle.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise RejectedError("AG-IN-002", f"{path.name} is larger than {max_bytes} bytes")
    return content
