# SPDX-License-Identifier: Apache-2.0
"""Workers: `python -m allograft_client.worker PARENT_PID` loads libraries once, then forks.

It leaves the network, loads the libraries, and reads names of task files from standard input. Each
task gets a process of its own, which has seen no other task's data, does it, and says one line of
JSON for its result or refusal. Loading takes many seconds of a processor; forking takes none.
Workers hold no key and speak to nobody: files in, files out.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from allograft.crypto import canonical
from allograft.errors import AllograftError, UnavailableError
from allograft_client.confine import end_with_parent, leave_network


class _Voice:
    """Standard output for our lines alone; whatever libraries print goes to standard error."""

    def __init__(self) -> None:
        self._stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(self, **message: Any) -> None:
        """Write one line."""
        self._stream.write(json.dumps(message, allow_nan=False) + "\n")
        self._stream.flush()


def main() -> None:
    """Do the tasks named on standard input, one after another, until it ends."""
    end_with_parent(int(sys.argv[1]))
    # Before torch is imported: a process with threads may not enter a new user namespace.
    network = "none" if leave_network() else "not isolated"
    voice = _Voice()
    # Only imported, never used here: a process that has computed in threads, or has opened a GPU,
    # cannot be forked.
    from allograft_client import tasks

    gc.collect()
    gc.freeze()  # what is loaded stays shared with the children: no collection writes to it
    server_pid = os.getpid()
    for line in sys.stdin:
        task_file = Path(json.loads(line))
        pid = os.fork()
        if pid == 0:
            end_with_parent(server_pid)
            with task_file.with_suffix(".log").open("wb") as errors:
                for descriptor in (sys.stdout.fileno(), sys.stderr.fileno()):
                    os.dup2(errors.fileno(), descriptor)
            status = _work(tasks.perform, task_file, network, voice)
            sys.stderr.flush()
            os._exit(status)  # nothing of the parent's may be flushed or finalised here
        _, waited = os.waitpid(pid, 0)
        voice.say(ended=os.waitstatus_to_exitcode(waited))


def _work(perform: Any, task_file: Path, network: str, voice: _Voice) -> int:
    """Do one task; returns the exit status."""
    voice.say(progress={"stage": "starting", "network": network})
    try:
        task: Mapping[str, canonical.Json] = canonical.as_mapping(
            canonical.loads(task_file.read_bytes())
        )
        result = perform(task, lambda progress: voice.say(progress=dict(progress)))
    except AllograftError as error:
        retry = isinstance(error, UnavailableError)
        voice.say(error={"code": error.code, "cause": error.cause, "retry": retry})
        return 1
    except MemoryError:
        cause = "the machine has too little memory for this model"
        voice.say(error={"code": "AG-SIT-007", "cause": cause, "retry": False})
        return 1
    except BaseException:  # noqa: BLE001  (this process ends here, and its parent's stack must not run)
        import traceback

        traceback.print_exc()
        return 1
    voice.say(result={**result, "network": network})
    return 0


if __name__ == "__main__":
    main()
