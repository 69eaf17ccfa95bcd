# SPDX-License-Identifier: Apache-2.0
"""The beginning of a coordinator: its keys, its certificate and its request to be in the roster.

Keys are made here and never leave. There is no sealing key among them: a coordinator can open
nothing, whatever it is told to do.
"""

from __future__ import annotations

import shutil
import socket
from datetime import datetime

from allograft.crypto import keystore, vkey
from allograft.crypto.keys import SigningKey
from allograft.crypto.notekey import NoteKey
from allograft.crypto.tls import make_authority, make_server_certificate
from allograft.durable import durable_write
from allograft.errors import RejectedError
from allograft.roster.enrolment import CoordinatorKeys, request_coordinator
from allograft.roster.records import CoordinatorRecord, log_origin
from allograft_server.settings import (
    Settings,
    State,
    listen_address,
    parse_address,
    write_settings,
)
from allograft_server.store import Store


def found_coordinator(state: State, name: str, address: str, now: datetime) -> bytes:
    """Make a coordinator; returns its enrolment request, which also stands in the directory.

    Raises:
        RejectedError: AG-CRD-013 if there is one already, AG-CRD-001 for a bad name or address.
        UnavailableError: AG-STO-001.
    """
    if state.root.exists() and any(state.root.iterdir()):
        raise RejectedError("AG-CRD-013", f"{state.root} is not empty")
    host, port = parse_address(address)
    settings = Settings.checked(
        name=name,
        host=host,
        port=port,
        listen=listen_address(host),
        private_port=_free_loopback_port(),
    )
    existed = state.root.exists()
    try:
        return _found(state, settings, now)
    except BaseException:
        # Half a coordinator would only be in the way of the next attempt.
        shutil.rmtree(state.root, ignore_errors=True)
        if existed:
            # It is still there if it is a mount point.
            state.root.mkdir(mode=0o700, exist_ok=True)
        raise


def _found(state: State, settings: Settings, now: datetime) -> bytes:
    state.make_directories()
    keys = CoordinatorKeys(SigningKey.generate(), NoteKey.generate(), NoteKey.generate())
    keystore.write_signing_key(state.signing_key, keys.signing)
    keystore.write_note_key(state.log_key, keys.log)
    keystore.write_note_key(state.timestamp_key, keys.timestamp)
    authority = make_authority(settings.name, now)
    # Loopback besides the public name: the SuperLink's private listener has the same certificate.
    hosts = tuple(dict.fromkeys((settings.host, "127.0.0.1", "localhost")))
    server = make_server_certificate(authority, hosts, now)
    durable_write(state.tls / "ca.pem", authority.certificate_pem, mode=0o644)
    keystore.write_private(state.tls / "ca.key", authority.key_pem)
    durable_write(state.tls / "server.pem", server.certificate_pem, mode=0o644)
    keystore.write_private(state.tls / "server.key", server.key_pem)
    origin = log_origin(settings.name)
    record = CoordinatorRecord(
        coordinator_id=settings.name,
        signing_keys=(keys.signing.public,),
        log_vkey=vkey.VerifierKey(origin, vkey.LOG, keys.log.public).to_text(),
        timestamp_key=keys.timestamp.public.raw,
        address=settings.address,
        tls_ca_pem=authority.certificate_pem.decode("ascii"),
    )
    request = request_coordinator(record, keys)
    durable_write(state.enrolment, request, mode=0o644)
    Store.create(state.database).close()
    # Last, because this file is what makes the directory a coordinator's.
    write_settings(state, settings)
    return request


def _free_loopback_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
