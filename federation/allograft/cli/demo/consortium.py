# SPDX-License-Identifier: Apache-2.0
"""A consortium on one machine: the ceremony of the README, command by command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from allograft.cli.demo.base import OwnFiles, World
from allograft.cli.demo.processes import Daemons, Reporter, at_once, free_port, reporting, run_json
from allograft.crypto import canonical
from allograft.durable import durable_write

MODEL = "ward"

#: What the four sites of the demo allow. Real sites decide for themselves.
POLICY = b"""\
version = 1

[donate]
modes = ["open"]
kinds = ["organ", "lora"]
recipients = ["*"]
approvals = ["operator"]
dispatch = "manual"
max_payload_bytes = 4294967296
wire_dtype = "bf16"

[receive]
donors = ["*"]
kinds = ["organ", "lora"]
modes = ["open"]
automatic_trial = true
automatic_keep = true
min_gain = 0.0
max_retention_loss = 0.1
licence = []

[receipt]
share_figures = false
"""


class SiteHome:
    """One site: its state directory and the commands that its operator types."""

    def __init__(self, name: str, state: Path, consortium: Consortium) -> None:
        self.name = name
        self.state = state
        self._consortium = consortium

    @property
    def socket(self) -> Path:
        """The door of the site's courier."""
        return self.state / "run" / "courier.sock"

    def command(self, *arguments: str, timeout_s: float = 120.0) -> Mapping[str, Any]:
        """Run one `allograft-site` command on this site."""
        return run_json(
            ["allograft-site", *arguments, "--state", str(self.state)], timeout_s=timeout_s
        )

    def make_keys(self) -> Mapping[str, Any]:
        """`allograft-site init`."""
        return self.command("init", "--site", self.name)

    def settle_in(self, model: Path, own: OwnFiles, policy: bytes = POLICY) -> None:
        """Save the policy and add the model with the site's own text."""
        durable_write(self.state / "policy.toml", policy)
        self.command(
            "model", "add", MODEL,
            "--path", str(model), "--data", str(own.domain), "--retention", str(own.retention),
        )  # fmt: skip

    def donate(self, world: World, recipe: str, steps: int, seed: int) -> str:
        """Queue a donation; the daemon trains."""
        answer = self.command(
            "donate", "--model", MODEL, "--recipe", recipe, "--data", str(world.donor_data),
            "--domain", world.domain, "--declare", world.nature, "--declared-by", "operator",
            "--mode", "open", "--steps", str(steps), "--batch", "8", "--window", "128",
            "--learning-rate", str(world.learning_rate), "--seed", str(seed), "--no-wait",
        )  # fmt: skip
        return canonical.as_text(answer["packet_id"])

    def packet(self, packet_id: str) -> Mapping[str, Any]:
        """A packet that is there."""
        return self.command("packet", "show", packet_id)

    def extras(self, packet_id: str) -> list[Mapping[str, Any]]:
        """Further copies of a packet that the site set aside."""
        extras: list[Mapping[str, Any]] = self.command("packets")["extras"]
        return [extra for extra in extras if extra["packet_id"] == packet_id]

    def write_page(self, packet_id: str, page: Path) -> None:
        """`allograft dossier show`: the dossier of a packet that this site made, as a page."""
        run_json(
            [
                "allograft", "dossier", "show", str(self.state / "packets" / packet_id),
                "--roster", str(self.state / "roster"), "--html", str(page),
            ]
        )  # fmt: skip

    def sealed_packet(self, packet_id: str) -> Path:
        """Where the site stores the sealed packet."""
        return self.state / "packets" / packet_id / "sealed"

    def following(self, packet_id: str) -> AbstractContextManager[Reporter]:
        """`allograft-site packet follow`: the packet's changes here, as they happen."""
        return reporting(
            [
                "allograft-site", "packet", "follow", packet_id,
                "--state", str(self.state), "--format", "json",
            ],
            self._consortium.daemons.log_directory / f"{self.name}.follow.jsonl",
        )  # fmt: skip


class Consortium:
    """Coordinator, roster keepers and sites, each in a directory of its own.

    Args:
        directory: Where everything lies.
        daemons: What starts and ends the daemons.
        names: The sites.
        settings: By site, lines that its operator adds to `site.toml`.
    """

    def __init__(
        self,
        directory: Path,
        daemons: Daemons,
        names: tuple[str, ...],
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.daemons = daemons
        self._settings = settings or {}
        self.coordinator_id = "consortium"
        self.coordinator_state = directory / "coordinator"
        self.published = directory / "published"
        self._roster = directory / "roster"
        self._root_fingerprint = ""
        self._fingerprints: Mapping[str, str] = {}
        self.sites = {name: SiteHome(name, directory / "sites" / name, self) for name in names}

    def found(self, note: Callable[[str, float], None]) -> None:
        """Make keys, enrol, publish, start the coordinator, let the sites join and start."""
        steps: list[tuple[str, Callable[[], None]]] = [
            ("the coordinator makes its keys", self._init_coordinator),
            ("the keepers make the root keys", self._init_roster),
            ("the sites make their keys", self._init_sites),
            *((f"{site.name} enrols", self._enrolment(site)) for site in self.sites.values()),
            ("the keepers publish the roster", self._publish),
            ("the coordinator starts", self._start_coordinator),
            ("the sites join", self._join),
        ]
        for number, (title, step) in enumerate(steps):
            note(title, number / len(steps))
            step()

    def _init_coordinator(self) -> None:
        self._coordinator(
            "init", "--name", self.coordinator_id, "--address", f"127.0.0.1:{free_port()}"
        )

    def _init_roster(self) -> None:
        request = self.coordinator_state / "coordinator.enrol.json"
        run_json(
            [
                "allograft", "roster", "init", str(self._roster), "--coordinator", str(request),
                "--keys", "3", "--threshold", "2",
            ]
        )  # fmt: skip

    def _init_sites(self) -> None:
        made = at_once(site.make_keys for site in self.sites.values())
        for name, lines in self._settings.items():
            with (self.sites[name].state / "site.toml").open("a", encoding="utf-8") as file:
                file.write(lines)
        self._fingerprints = {
            name: str(keys["fingerprint"]) for name, keys in zip(self.sites, made, strict=True)
        }

    def _enrolment(self, site: SiteHome) -> Callable[[], None]:
        def enrol() -> None:
            request = site.state / f"{site.name}.enrol.json"
            run_json(
                [
                    "allograft", "roster", "enrol", str(self._roster), str(request),
                    "--fingerprint", self._fingerprints[site.name],
                ]
            )  # fmt: skip

        return enrol

    def _publish(self) -> None:
        out = str(self.published)
        published = run_json(["allograft", "roster", "publish", str(self._roster), "--out", out])
        self._root_fingerprint = canonical.as_text(published["root_fingerprint"])

    def _start_coordinator(self) -> None:
        self._coordinator("import-roster", str(self.published))
        state = str(self.coordinator_state)
        self.daemons.start("coordinator", ["allograft-coordinator", "serve", "--state", state])

    def _join(self) -> None:
        invitation = str(self.published / "invitation.json")
        trusted = ("--root-fingerprint", self._root_fingerprint)
        at_once(partial(site.command, "join", invitation, *trusted) for site in self.sites.values())
        for site in self.sites.values():
            self.daemons.start(site.name, ["allograft-site", "serve", "--state", str(site.state)])

    def _coordinator(self, *arguments: str) -> Mapping[str, canonical.Json]:
        state = str(self.coordinator_state)
        return run_json(["allograft-coordinator", *arguments, "--state", state])
