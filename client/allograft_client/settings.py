# SPDX-License-Identifier: Apache-2.0
"""Where a site keeps things, and the few choices its operator can make.

Invariant: settings hold no secret and no trust. Keys stand in files of their own, trust comes from
the roster, and what may leave or attach is decided by `policy.toml` alone.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from allograft.errors import RejectedError, UnavailableError
from allograft.limits import LIMITS
from allograft.plainfile import read_plain

#: Linux takes 107 bytes and a NUL for a socket's path; the rest is room for the kernel's naming.
SOCKET_PATH_BYTES = 100

_FILE_BYTES = 64 << 10
_SITE = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class Settings(BaseModel):
    """`site.toml`, written by `allograft-site init`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: str
    #: Users besides our own who may open the courier socket (the SuperNode's user, if it differs).
    courier_uids: tuple[int, ...] = ()
    #: Port of the SuperNode's runtime API on 127.0.0.1; 0 takes a free one.
    runtime_port: int = Field(default=0, ge=0, le=65535)
    #: The site's own list of identifiers, text or CSV; a relative path is in the state directory.
    identifiers: str = Field(default="", max_length=4096)
    #: "auto" takes CUDA where a driver answers.
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    #: Most documents of each kind that a trial measures; more take longer and change little.
    trial_documents: int = Field(default=240, ge=120, le=100_000)
    #: Free space that incoming packets may not eat into.
    reserve_bytes: int = Field(default=64 << 20, ge=0)


@dataclass(frozen=True, slots=True)
class Home:
    """The layout of a site's state directory."""

    root: Path

    def path(self, *names: str) -> Path:
        """A path below the state directory."""
        return self.root.joinpath(*names)

    @property
    def settings_file(self) -> Path:
        """`site.toml`."""
        return self.root / "site.toml"

    @property
    def policy_file(self) -> Path:
        """`policy.toml`; while it is absent nothing leaves and nothing attaches."""
        return self.root / "policy.toml"

    @property
    def policy_signature(self) -> Path:
        """`policy.toml.sig`: the last signed policy, with the role that signed it."""
        return self.root / "policy.toml.sig"

    @property
    def invitation_file(self) -> Path:
        """`invitation.json`; absent until the site has joined."""
        return self.root / "invitation.json"

    @property
    def database(self) -> Path:
        """`site.db`."""
        return self.root / "site.db"

    def identifier_list(self, settings: Settings) -> Path | None:
        """The site's list of identifiers; None if its operator named none."""
        return self.root / settings.identifiers if settings.identifiers else None

    @property
    def courier_socket(self) -> Path:
        """The unix socket that the courier calls."""
        return self.root / "run" / "courier.sock"

    def make_directories(self) -> None:
        """Create the directories, readable by the owner alone."""
        for name in ("", "keys", "roster", "outbox", "inbox", "packets", "models", "run"):
            self.path(name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def settings(self) -> Settings:
        """Read `site.toml`.

        Raises:
            UnavailableError: AG-STO-003 if `init` has not run here.
            RejectedError: AG-SIT-001 if the file is malformed, AG-IN-002 if it is too large.
        """
        try:
            text = read_plain(self.settings_file, _FILE_BYTES).decode("utf-8")
        except FileNotFoundError as error:
            raise UnavailableError("AG-STO-003", f"{self.root} holds no site.toml") from error
        except UnicodeDecodeError as error:
            raise RejectedError("AG-SIT-001", "site.toml is not UTF-8 text") from error
        try:
            settings = Settings.model_validate(tomllib.loads(text))
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise RejectedError("AG-SIT-001", f"site.toml: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RejectedError("AG-SIT-001", f"site.toml: {where}: {first['msg']}") from error
        check_site_name(settings.site)
        return settings


def check_site_name(name: str) -> str:
    """Return the name if it can stand in rosters and documents.

    Raises:
        RejectedError: AG-SIT-001.
    """
    if not _SITE.fullmatch(name) or len(name) > LIMITS.identifier_chars:
        raise RejectedError(
            "AG-SIT-001", "a site name is lower-case letters, digits and dashes, 63 at most"
        )
    return name
