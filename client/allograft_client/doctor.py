# SPDX-License-Identifier: Apache-2.0
"""Preflight: what would stop this site from working, each with its cause and its fix.

Every check stands alone and changes nothing, but that reading the privacy ledger finishes what a
crash left, as every reader does; a check that cannot run says why. The coordinator is
reached by a plain TLS handshake against the consortium's own CA, as the SuperNode does it.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import ssl
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from allograft.crypto import keystore
from allograft.durable import is_directory_locked
from allograft.errors import CODES, AllograftError, RejectedError, UnavailableError
from allograft_client.settings import SOCKET_PATH_BYTES, Home
from allograft_client.store import Store
from allograft_client.trust import Trust

_TIMEOUT_S = 5.0
_CLOCK_S = 120.0
_FLWR = "1.41."

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; cause and fix are empty for `ok`."""

    check: str
    level: Level
    detail: str
    code: str = ""
    fix: str = ""


def examine(home: Home) -> tuple[Finding, ...]:
    """Run every check."""
    return tuple(_run(name, check, home) for name, check in _checks())


def _run(name: str, check: Callable[[Home], Finding | str], home: Home) -> Finding:
    try:
        found = check(home)
    except AllograftError as error:
        return Finding(name, "error", error.cause, error.code, error.fix)
    except (OSError, HTTPException) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        return Finding(name, "error", str(reason), "AG-SIT-015", CODES["AG-SIT-015"].fix)
    return found if isinstance(found, Finding) else Finding(name, "ok", found)


def _checks() -> Iterator[tuple[str, Callable[[Home], Finding | str]]]:
    yield "python", _python
    yield "flower", _flower
    yield "directory", _directory
    yield "settings", _settings
    yield "keys", _keys
    yield "database", _database
    yield "roster", _roster
    yield "policy", _policy
    yield "identifiers", _identifiers
    yield "ledger", _ledger
    yield "models", _models
    yield "socket", _socket
    yield "disk", _disk
    yield "daemon", _daemon
    yield "coordinator", _coordinator


def _python(_home: Home) -> str:
    return platform.python_version()


def _flower(_home: Home) -> Finding | str:
    try:
        found = version("flwr")
    except PackageNotFoundError:
        found = ""
    if not found.startswith(_FLWR):
        fix = "Install allograft[site], which pins the minor version of flwr."
        return Finding("flower", "error", f"flwr {found or 'is missing'}", "", fix)
    if shutil.which("flower-supernode", path=_program_path()) is None:
        fix = "Install allograft[site] into the environment this command runs from."
        return Finding("flower", "error", "flower-supernode is not on PATH", "", fix)
    return f"flwr {found}"


def _program_path() -> str:
    return os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")


def _directory(home: Home) -> Finding | str:
    try:
        mode = home.root.stat().st_mode
    except FileNotFoundError as error:
        raise UnavailableError("AG-STO-003", f"there is no directory {home.root}") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        fix = f"Take it back with `chmod 700 {home.root}`; who may write there can replace files."
        cause = f"others may write to {home.root} (mode {stat.S_IMODE(mode):04o})"
        return Finding("directory", "warning", cause, "", fix)
    return str(home.root)


def _settings(home: Home) -> str:
    return f"site {home.settings().site}"


def _keys(home: Home) -> str:
    keys = home.path("keys")
    keystore.read_signing_key(keys / "signing.pem")
    keystore.read_sealing_key(keys / "sealing.key")
    keystore.read_note_key(keys / "witness.key")
    keystore.read_node_key(keys / "node")
    return "four keys, readable by this user alone"


def _database(home: Home) -> str:
    store = Store(home.database)
    packets = len(store.packets())
    store.close()
    return f"{packets} packets"


def _roster(home: Home) -> str:
    trust = Trust.open(home, home.settings().site)
    roster = trust.roster()
    roster.signing_keys(home.settings().site, "site", datetime.now(UTC))
    return f"version {roster.version}, coordinator {trust.coordinator}"


def _policy(home: Home) -> str:
    from allograft.privacy.policy import read_policy

    policy = read_policy(home.policy_file)
    gives = ", ".join(policy.donate.kinds) or "nothing"
    takes = ", ".join(policy.receive.kinds) or "nothing"
    return f"donates {gives}; receives {takes}"


def _identifiers(home: Home) -> Finding | str:
    """Whether names and numbers of the site's own patients are looked for in what leaves."""
    from allograft.privacy.policy import read_policy
    from allograft_client.identifiers import open_list

    path = home.identifier_list(home.settings())
    if path is None:
        if home.policy_file.exists():
            policy = read_policy(home.policy_file)
            for mode in policy.donate.modes:
                policy.check_identifier_list(mode, False)
        return "no list is set; text that leaves is scanned for patterns alone"
    skipped = open_list(path).skipped
    found = f"a list is set; {skipped} cells of it cannot be matched"
    bits = stat.S_IMODE(path.stat().st_mode)
    if bits & (stat.S_IRWXG | stat.S_IRWXO):
        fix = f"Take it back with `chmod 600 {path}`; it names your patients."
        cause = f"{found}; others may read it (mode {bits:04o})"
        return Finding("identifiers", "warning", cause, "", fix)
    return found


def _ledger(home: Home) -> Finding | str:
    """The privacy ledger as its entries say, with what each run costs recomputed."""
    from allograft_client.budget import Budget
    from allograft_client.site import open_site

    site = open_site(home)
    try:
        budget = Budget(site)
        ledger = budget.ledger()
        missing = budget.check_plans(ledger)
    finally:
        site.store.close()
    if not ledger.head.count:
        return "none yet; modes strict and measured begin with one"
    found = f"{ledger.head.count} entries, {len(ledger.accounts)} domains; every charge recomputed"
    if missing:
        fix = "Restore the directory plans/ from a backup; its plans say what was to be spent."
        cause = f"{found}; no signed plan for {', '.join(plan[:12] for plan in missing)}"
        return Finding("ledger", "warning", cause, "AG-PRV-056", fix)
    return found


def _models(home: Home) -> Finding | str:
    store = Store(home.database)
    names = [model.name for model in store.models()]
    missing = [model.name for model in store.models() if not model.path.is_dir()]
    store.close()
    if missing:
        fix = "Restore the directory or add the model again with `allograft-site model add`."
        return Finding("models", "error", f"no directory for {', '.join(missing)}", "", fix)
    if not names:
        fix = "Add one with `allograft-site model add`; without it no packet can be tried."
        return Finding("models", "warning", "no model", "", fix)
    return ", ".join(names)


def _socket(home: Home) -> str:
    length = len(os.fsencode(home.courier_socket))
    if length > SOCKET_PATH_BYTES:
        raise RejectedError("AG-SIT-011", f"{length} bytes: {home.courier_socket}")
    return str(home.courier_socket)


def _disk(home: Home) -> str:
    free = shutil.disk_usage(home.root).free
    reserve = home.settings().reserve_bytes
    if free <= reserve:
        raise UnavailableError("AG-STO-001", f"{free >> 20} MiB free, {reserve >> 20} reserved")
    return f"{free >> 20} MiB free"


def _daemon(home: Home) -> Finding | str:
    if is_running(home):
        return "running"
    fix = "Start it with `allograft-site serve`; requests wait until then."
    return Finding("daemon", "warning", "not running", "", fix)


def is_running(home: Home) -> bool:
    """Whether a daemon holds the state directory."""
    return is_directory_locked(home.root)


def _coordinator(home: Home) -> Finding | str:
    """A TLS handshake with the pinned CA, and the clocks compared by the answer's date."""
    trust = Trust.open(home, home.settings().site)
    host, _, port = trust.superlink_address.rpartition(":")
    context = ssl.create_default_context(cadata=trust.authority_pem.decode("ascii"))
    connection = HTTPSConnection(host.strip("[]"), int(port), timeout=_TIMEOUT_S, context=context)
    try:
        connection.request("GET", "/")
        date = connection.getresponse().getheader("date")
    except TimeoutError as error:
        raise UnavailableError("AG-SIT-015", f"no answer within {_TIMEOUT_S:.0f} s") from error
    except ssl.SSLError as error:
        raise UnavailableError("AG-SIT-015", f"TLS: {error.reason}") from error
    except socket.gaierror as error:
        raise UnavailableError("AG-SIT-015", f"the name {host} does not resolve") from error
    finally:
        connection.close()
    skew = abs((datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds()) if date else 0.0
    if skew > _CLOCK_S:
        fix = "Set this machine's clock; frames and node authentication allow minutes, not more."
        return Finding("coordinator", "error", f"clocks differ by {skew:.0f} s", "AG-RLY-004", fix)
    return f"{trust.superlink_address} answers"
