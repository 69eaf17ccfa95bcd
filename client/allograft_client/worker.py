# SPDX-License-Identifier: Apache-2.0
"""A worker process: `python -m allograft_client.worker TASK.json PARENT_PID`.

It leaves the network before any library is loaded, does one task, and says one line of JSON for
its result or refusal. It holds no key and speaks to nobody: files in, files out.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

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
    """Do the task named on the command line."""
    end_with_parent(int(sys.argv[2]))
    # Before torch is imported: a process with threads may not enter a new user namespace.
    is_offline = leave_network()
    voice = _Voice()
    voice.say(progress={"stage": "starting", "network": "none" if is_offline else "not isolated"})
    try:
        task = canonical.as_mapping(canonical.loads(Path(sys.argv[1]).read_bytes()))
        result = _perform(task, voice)
    except AllograftError as error:
        retry = isinstance(error, UnavailableError)
        voice.say(error={"code": error.code, "cause": error.cause, "retry": retry})
        sys.exit(1)
    except MemoryError:
        _fail(voice, "the machine has too little memory for this model")
    voice.say(result={**result, "network": "none" if is_offline else "not isolated"})


def _fail(voice: _Voice, cause: str) -> NoReturn:
    voice.say(error={"code": "AG-SIT-007", "cause": cause, "retry": False})
    sys.exit(1)


def _perform(task: Mapping[str, canonical.Json], voice: _Voice) -> dict[str, Any]:
    from allograft_client import tasks  # Here, because it loads the tensor libraries.

    return tasks.perform(task, lambda progress: voice.say(progress=dict(progress)))


if __name__ == "__main__":
    main()
