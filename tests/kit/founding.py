# SPDX-License-Identifier: Apache-2.0
"""A consortium's beginning with real keys, requests and a real roster, without any process."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from allograft.cli import shell
from allograft.crypto import keystore
from allograft.roster.enrolment import verify_coordinator_request, verify_site_request
from allograft.roster.keeper import Keeper
from allograft_client.main import app
from allograft_server.founding import found_coordinator
from allograft_server.settings import State

COORDINATOR = "consortium"


@dataclass
class Founded:
    """A coordinator, a keeper, and any number of sites that the keeper enrolled."""

    root: Path

    def __post_init__(self):
        self.now = datetime.now(UTC).replace(microsecond=0)
        self.state = State(self.root / "coordinator")
        request = found_coordinator(self.state, COORDINATOR, "127.0.0.1:19092", self.now)
        record = verify_coordinator_request(request)
        self.keeper = Keeper.create(self.root / "roster", record, self.now)
        self.log_key = keystore.read_note_key(self.state.log_key)

    def enrol(self, state: Path) -> None:
        (request,) = state.glob("*.enrol.json")
        self.keeper.enrol(verify_site_request(request.read_bytes()))

    def publish(self) -> Path:
        """A fresh invitation file."""
        published = self.keeper.publish(self.now)
        path = self.root / "invitation.json"
        path.write_bytes(published.invitation.to_bytes())
        return path


def run_site(capsys, *arguments) -> tuple[int, str, str]:
    """Run `allograft-site` in this process; returns status, stdout and stderr."""
    status = shell.invoke(app, "allograft-site", [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run_site_json(capsys, *arguments):
    """Run a command that must succeed, with `--format json`."""
    status, out, err = run_site(capsys, *arguments, "--format", "json")
    assert status == 0, err
    return json.loads(out)
