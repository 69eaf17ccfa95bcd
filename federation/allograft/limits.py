# SPDX-License-Identifier: Apache-2.0
"""Every ceiling of every format, in one place, each with its unit in its name.

A reader that meets a larger value refuses it before it allocates memory for it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Ceilings of suite 1. Fields are grouped by the format they bound."""

    # documents
    json_document_bytes: int = 4 << 20  # any signed JSON document
    json_depth: int = 32
    json_values: int = 500_000  # commas and opening brackets; a value takes up to 200 bytes
    identifier_chars: int = 64  # site names, aliases: [a-z0-9][a-z0-9-]*
    text_field_chars: int = 512  # any human sentence in a signed document
    signatures: int = 8  # per DSSE envelope

    # safetensors
    tensor_header_bytes: int = 16 << 20
    tensors: int = 100_000
    tensor_name_chars: int = 256
    tensor_dimensions: int = 8

    # packet
    packet_parts: int = 256  # files of one payload
    packet_recipients: int = 1024
    packet_payload_bytes: int = 64 << 30
    manifest_bytes: int = 4 << 20
    header_bytes: int = 4 << 20

    # relay
    # One slice of a file in one Flower message. Flower 1.41 holds a message 4 to 5 times in the
    # ServerApp and the ClientApp; 8 MiB keeps each process within 64 MiB of its idle memory.
    part_bytes: int = 8 << 20
    inline_bytes: int = 32 << 10  # files of an item up to this size travel inside the poll
    poll_bytes: int = 4 << 20
    items_per_poll: int = 16
    parts_in_flight: int = 4  # per site: bounds the SuperLink's and SuperNode's memory
    frame_age_s: int = 3600
    item_files: int = 300

    # privacy
    privacy_plan_bytes: int = 64 << 10
    ledger_entry_bytes: int = 64 << 10  # one line of a ledger, signature and base64 included
    ledger_bytes: int = 256 << 20  # an entry takes 2 KiB: some 100,000 runs
    entry_packets: int = 64  # digests in one commit
    person_id_bytes: int = 512
    people_bytes: int = 1 << 30  # one domain; 32 bytes a person: 33 million

    # log
    entry_bytes: int = 65_535  # tlog-tiles entries carry a 16-bit length
    note_bytes: int = 64 << 10
    proof_bytes: int = 256 << 10
    cosignatures: int = 256

    # roster
    roster_sites: int = 4096
    roster_file_bytes: int = 2 << 20
    roster_bundle_bytes: int = 64 << 20


LIMITS = Limits()
