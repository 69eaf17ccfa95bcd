# SPDX-License-Identifier: Apache-2.0
"""`coordinator.toml` and the layout of the coordinator's state directory.

There are no tuning knobs: addresses, the name and how much disk to leave free, and nothing else.
"""

from __future__ import annotations

import ipaddress
import tomllib
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from allograft.durable import durable_write
from allograft.errors import RejectedError, UnavailableError
from allograft.plainfile import read_plain

#: Names the daemon's socket in the environment of the ServerApp, which Flower starts for us.
SOCKET_VARIABLE = "ALLOGRAFT_COORDINATOR_SOCKET"

_NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
_FILE_BYTES = 64 << 10
_HOST = r"^[A-Za-z0-9.:_-]{1,253}$"


class Settings(BaseModel):
    """What an operator may set.

    Attributes:
        name: The coordinator's id in the roster.
        host: The name or address by which sites dial the coordinator.
        port: The one port that is open to sites.
        listen: The local address to listen on.
        private_port: The SuperLink's own port for operators and the runtime, on loopback.
        reserve_mib: Space that arriving parts leave free on the volume of the state directory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=_NAME)
    host: str = Field(pattern=_HOST)
    port: int = Field(ge=1, le=65535)
    listen: str = Field(pattern=_HOST)
    private_port: int = Field(ge=1, le=65535)
    reserve_mib: int = Field(default=512, ge=0)

    @classmethod
    def checked(cls, **fields: object) -> Settings:
        """Settings from values that a person gave.

        Raises:
            RejectedError: AG-CRD-001 if one of them is not allowed.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RejectedError("AG-CRD-001", f"{where}: {first['msg']}") from error

    @property
    def address(self) -> str:
        """HOST:PORT for sites."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def private_address(self) -> str:
        """HOST:PORT of the SuperLink's private listener."""
        return f"127.0.0.1:{self.private_port}"

    def to_toml(self) -> bytes:
        """The file that `init` writes."""
        lines = [
            "# Coordinator of an Allograft consortium. `host` and `port` are what sites dial.",
            f'name = "{self.name}"',
            f'host = "{self.host}"',
            f"port = {self.port}",
            f'listen = "{self.listen}"',
            "# Loopback only; operators of this machine with the token, and Flower's runtime.",
            f"private_port = {self.private_port}",
            "# Disk space that arriving parts leave free.",
            f"reserve_mib = {self.reserve_mib}",
            "",
        ]
        return "\n".join(lines).encode()


@dataclass(frozen=True, slots=True)
class State:
    """Paths inside a state directory."""

    root: Path

    @property
    def config(self) -> Path:
        """The settings file."""
        return self.root / "coordinator.toml"

    @property
    def keys(self) -> Path:
        """Private keys, mode 0700."""
        return self.root / "keys"

    @property
    def tls(self) -> Path:
        """The private CA and the server certificate."""
        return self.keys / "tls"

    @property
    def signing_key(self) -> Path:
        """Signs frames, routes and their events."""
        return self.keys / "signing.pem"

    @property
    def log_key(self) -> Path:
        """Signs the log's checkpoints."""
        return self.keys / "log.key"

    @property
    def timestamp_key(self) -> Path:
        """Says that the roster is still the newest."""
        return self.keys / "timestamp.key"

    @property
    def database(self) -> Path:
        """The coordinator's own database."""
        return self.root / "coordinator.db"

    @property
    def log(self) -> Path:
        """The log's database."""
        return self.root / "log.db"

    @property
    def mailbox(self) -> Path:
        """Sealed files."""
        return self.root / "mailbox"

    @property
    def roster(self) -> Path:
        """The imported roster."""
        return self.root / "roster"

    @property
    def run(self) -> Path:
        """Sockets and the logs of child processes, mode 0700."""
        return self.root / "run"

    @property
    def socket(self) -> Path:
        """Where the ServerApp reaches the daemon."""
        return self.run / "courier.sock"

    @property
    def flower(self) -> Path:
        """Everything Flower keeps, and the two secrets it asks for."""
        return self.root / "flower"

    @property
    def enrolment(self) -> Path:
        """The request that the roster's keepers sign."""
        return self.root / "coordinator.enrol.json"

    def make_directories(self) -> None:
        """Make the directories that `init` fills; all private."""
        for path in (
            self.root, self.keys, self.tls, self.mailbox, self.roster, self.run, self.flower,
        ):  # fmt: skip
            path.mkdir(mode=0o700, parents=True, exist_ok=True)


def read_settings(state: State) -> Settings:
    """Read the settings of a state directory.

    Raises:
        UnavailableError: AG-STO-003 if there are none.
        RejectedError: AG-CRD-001 if they are malformed, AG-IN-002 if they are too large.
    """
    try:
        content = read_plain(state.config, _FILE_BYTES).decode("utf-8")
    except FileNotFoundError as error:
        raise UnavailableError("AG-STO-003", "there is no coordinator.toml") from error
    except UnicodeDecodeError as error:
        raise RejectedError("AG-CRD-001", "coordinator.toml is not UTF-8") from error
    try:
        fields = tomllib.loads(content)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RejectedError("AG-CRD-001", f"coordinator.toml: {error}") from error
    return Settings.checked(**fields)


def write_settings(state: State, settings: Settings) -> None:
    """Write the settings file."""
    durable_write(state.config, settings.to_toml(), mode=0o644)


def parse_address(text: str) -> tuple[str, int]:
    """Split HOST:PORT; an IPv6 host stands in brackets.

    Raises:
        RejectedError: AG-CRD-001.
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or len(port) > 5:
        raise RejectedError("AG-CRD-001", "an address is HOST:PORT")
    return host, int(port)


def listen_address(host: str) -> str:
    """Where to listen for a given public host: loopback stays loopback, else every interface."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "127.0.0.1" if host == "localhost" else "0.0.0.0"  # noqa: S104  (the one public port)
    if address.is_loopback:
        return host
    return "::" if address.version == 6 else "0.0.0.0"  # noqa: S104  (the one public port)
