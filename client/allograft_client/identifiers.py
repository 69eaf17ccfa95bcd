# SPDX-License-Identifier: Apache-2.0
"""The site's own list of identifiers, held ready for every scan of what leaves.

Invariants: the list is read where its operator put it and never copied, and nothing of it is
written, logged or put into an error. A list that changed is read again; one that is gone or cannot
be used raises, so nothing is scanned without it and nothing leaves.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path

from allograft.privacy.identifiers import IdentifierMatcher, read_identifiers

# Both lanes scan; a list of 200,000 patients takes 490 MiB, which must not be built twice.
_building = threading.Lock()


def open_list(path: Path) -> IdentifierMatcher:
    """The matcher of a list; made anew only if the file changed.

    Raises:
        RejectedError: AG-PRV-070 if it is not text or cannot be read, AG-PRV-071 if nothing in it
            can be matched.
        UnavailableError: AG-STO-005 if there is no such file.
    """
    try:
        status = path.stat()
    except OSError:
        # Reading it says what is wrong, by its code.
        return IdentifierMatcher(read_identifiers(path))
    with _building:
        return _build(path, (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))


@lru_cache(maxsize=1)
def _build(path: Path, _version: tuple[int, ...]) -> IdentifierMatcher:
    return IdentifierMatcher(read_identifiers(path))
