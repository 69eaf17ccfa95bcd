# SPDX-License-Identifier: Apache-2.0
"""Claims about sealing a payload directory and opening it again."""

import os
import stat

import pytest

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.packet import container
from allograft.packet.header import Header
from allograft.packet.kinds import find_kind
from kit.packets import AUDITOR, RECIPIENT, STRANGER, Donor, code_of


@pytest.fixture
def donor(tmp_path):
    return Donor(tmp_path / "donor")


@pytest.mark.parametrize("kind", ["organ", "lora"])
def test_recipient_gets_exactly_the_payload(tmp_path, kind):
    donor = Donor(tmp_path / "donor", kind=kind)
    donor.make()
    opened = donor.receive(tmp_path / "opened")
    names = [path.name for path in opened.directory.iterdir()]
    assert names == list(find_kind(kind).parts) == list(opened.tensors)
    assert (opened.directory / names[0]).read_bytes() == (donor.payload / names[0]).read_bytes()


def test_opened_files_are_private(tmp_path, donor):
    donor.make()
    opened = donor.receive(tmp_path / "opened")
    assert stat.S_IMODE(opened.directory.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in opened.directory.iterdir())


def test_payload_is_encrypted_once_for_any_number_of_recipients(donor):
    donor.audience, donor.auditors = (RECIPIENT, STRANGER), (AUDITOR,)
    donor.make()
    header = donor.verify_dispatch().header
    assert header.audience == (STRANGER, RECIPIENT)
    assert header.auditors == (AUDITOR,)
    assert [part.name for part in header.parts] == ["part-000.sealed"]
    assert len(header.wraps) == 5
    opened = {container.open_manifest(donor.out, header, donor.opener(n))
              for n in (RECIPIENT, STRANGER, AUDITOR)}  # fmt: skip
    assert len(opened) == 1


def test_auditor_opens_the_manifest_and_never_the_payload(tmp_path, donor):
    packet = donor.make()
    verified = donor.verify_dispatch(me="")
    manifest = donor.verify_manifest(verified, me=AUDITOR)
    assert manifest.statement == packet
    with pytest.raises(RejectedError) as caught:
        container.open_payload(
            donor.out, verified.header, "organ", packet.parts, donor.opener(AUDITOR), tmp_path / "x"
        )
    assert code_of(caught) == "AG-PKT-008"


def test_a_failed_opening_leaves_nothing_behind(tmp_path, donor):
    packet = donor.make()
    header = donor.verify_dispatch().header
    path = donor.out / "part-000.sealed"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RejectedError) as caught:
        container.open_payload(
            donor.out, header, "organ", packet.parts, donor.opener(), tmp_path / "opened"
        )
    assert code_of(caught) == "AG-SEA-001"
    assert [p.name for p in tmp_path.iterdir()] == ["donor"]


def test_never_opens_over_something_that_exists(tmp_path, donor):
    donor.make()
    (tmp_path / "opened").mkdir()
    with pytest.raises(RejectedError) as caught:
        donor.receive(tmp_path / "opened")
    assert code_of(caught) == "AG-PKT-002"


def test_a_payload_changed_after_signing_is_not_sealed(donor):
    packet = donor.statement(donor.write_payload())
    path = donor.payload / "organ.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(RejectedError) as caught:
        donor.seal(packet, donor.attest(packet))
    assert code_of(caught) == "AG-PKT-004"
    assert list(donor.out.iterdir()) == []


def test_a_payload_has_its_kinds_files_and_no_others(tmp_path, donor):
    donor.write_payload()
    (donor.payload / "adapter_config.json").write_text("{}")
    with pytest.raises(RejectedError) as caught:
        container.list_payload(donor.payload, "organ")
    assert code_of(caught) == "AG-PKT-002"


def test_a_payload_file_is_never_a_link(tmp_path, donor):
    donor.write_payload()
    path = donor.payload / "organ.safetensors"
    os.rename(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RejectedError) as caught:
        container.list_payload(donor.payload, "organ")
    assert code_of(caught) == "AG-PKT-002"


@pytest.mark.parametrize("kind", ["pickle", "painting", "", "organ.safetensors"])
def test_kinds_outside_the_list_are_refused(tmp_path, kind):
    with pytest.raises(RejectedError) as caught:
        container.list_payload(tmp_path, kind)
    assert code_of(caught) == "AG-PKT-001"


@pytest.mark.parametrize("content", [b"", b"a", b"a\n\nb\n", b"\n", b"x\n" * 65])
def test_attestations_are_non_empty_lines(content):
    with pytest.raises(RejectedError) as caught:
        container.split_attestations(content)
    assert code_of(caught) == "AG-PKT-006"


def test_attestations_survive_joining():
    assert container.split_attestations(container.join_attestations([b"a", b"b"])) == (b"a", b"b")
    with pytest.raises(RejectedError) as caught:
        container.join_attestations([bytes(5 << 20)])
    assert code_of(caught) == "AG-PKT-005"


def test_missing_linked_and_special_documents_are_refused(tmp_path):
    (tmp_path / "link").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("absent", "link", "pipe", "folder"):
        with pytest.raises(RejectedError) as caught:
            container.read_document(tmp_path / name, 10)
        assert code_of(caught) == "AG-PKT-002"
    (tmp_path / "large").write_bytes(bytes(11))
    with pytest.raises(RejectedError) as caught:
        container.read_document(tmp_path / "large", 10)
    assert code_of(caught) == "AG-IN-002"


def test_header_survives_its_bytes(donor):
    donor.make()
    header, content = container.read_sealed_header(donor.out)
    assert Header.from_bytes(content) == header
    assert header.to_bytes() == content


def _drop(name):
    return lambda value: value.pop(name)


def _set(*path):
    *where, last, new = path

    def change(value):
        for step in where:
            value = value[step]
        value[last] = new

    return change


CHANGES = {
    "field missing": (_drop("audience"), "AG-PKT-003"),
    "unknown field": (_set("note", "x"), "AG-PKT-003"),
    "version 2": (_set("v", 2), "AG-PKT-003"),
    "suite 2": (_set("suite", 2), "AG-PKT-003"),
    "id in capitals": (_set("packet_id", "A" * 32), "AG-PKT-003"),
    "donor with a slash": (_set("donor", "../a"), "AG-PKT-003"),
    "local time": (_set("not_after", "2026-11-24T08:00:00+01:00"), "AG-PKT-003"),
    "a part with a path": (_set("parts", 0, "name", "../part"), "AG-PKT-003"),
    "a part of another sealed size": (_set("parts", 0, "sealed_bytes", 1), "AG-PKT-003"),
    "a part of a petabyte": (_set("parts", 0, "plain_bytes", 1 << 50), "AG-PKT-005"),
    "no parts": (_set("parts", []), "AG-PKT-005"),
    "a manifest of a gigabyte": (_set("manifest", "sealed_bytes", 1 << 30), "AG-PKT-005"),
    "an unknown role": (_set("wraps", 0, "role", "all"), "AG-PKT-003"),
    "a wrap that is not base64": (_set("wraps", 0, "wrap", "*"), "AG-PKT-003"),
    "a short wrap": (_set("wraps", 0, "wrap", "AAAA"), "AG-PKT-003"),
    "an empty audience": (_set("audience", []), "AG-PKT-003"),
    "an audience beyond the wraps": (_set("audience", [STRANGER, RECIPIENT]), "AG-PKT-003"),
    "a payload wrap outside the audience": (_set("wraps", 2, "site", STRANGER), "AG-PKT-003"),
    "a recipient without manifest": (_drop("wraps"), "AG-PKT-003"),
    "one wrap twice": (lambda v: v["wraps"].append(v["wraps"][0]), "AG-PKT-003"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_refuses_malformed_header(donor, name):
    donor.make()
    change, code = CHANGES[name]
    value = canonical.loads((donor.out / "header.json").read_bytes())
    change(value)
    with pytest.raises(RejectedError) as caught:
        Header.from_bytes(canonical.dumps(value))
    assert code_of(caught) == code
