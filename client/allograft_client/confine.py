# SPDX-License-Identifier: Apache-2.0
"""What a child process gives up before it works: outliving its parent, and the network.

Run as `python -m allograft_client.confine PARENT_PID PROGRAM ARGS…` it starts a stock program that
ends with its parent, so that a killed daemon leaves no SuperNode behind. Workers call the functions
themselves. Linux only; elsewhere each function says that it did nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000


def end_with_parent(parent_pid: int) -> bool:
    """Ask the kernel to end this process when its parent ends; False where that is impossible."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None, use_errno=True)
    done = bool(library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) == 0)
    if os.getppid() != parent_pid:
        # The parent ended before we asked; nobody would tell us any more.
        sys.exit(0)
    return done


def leave_network() -> bool:
    """Move this process into a network namespace without interfaces; False if not permitted.

    Must run while the process has one thread. The user keeps its own number inside the new user
    namespace, so file ownership looks the same as before.
    """
    if not sys.platform.startswith("linux"):
        return False
    uid, gid = os.geteuid(), os.getegid()
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        # Root may be barred from user namespaces and still be allowed network namespaces.
        return bool(library.unshare(_CLONE_NEWNET) == 0)
    with contextlib.suppress(OSError):
        Path("/proc/self/setgroups").write_text("deny", "ascii")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1", "ascii")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1", "ascii")
    return True


def main() -> None:
    """Start a program that ends with its parent."""
    end_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606  (no shell: the arguments are a list)


if __name__ == "__main__":
    main()
