# SPDX-License-Identifier: Apache-2.0
"""What a hostile coordinator, donor or recipient can do to a packet, and how it is refused."""

import hashlib
import shutil
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from allograft.crypto import canonical, dsse, seal
from allograft.crypto.keys import SealingKey, SigningKey
from allograft.errors import RejectedError
from allograft.packet import container
from allograft.privacy import dossier as privacy_dossier
from allograft.provenance import intoto, statement, training, verify
from kit.packets import AUDITOR, DONOR, NOW, RECIPIENT, STRANGER, Donor, code_of, edit_json


@pytest.fixture
def donor(tmp_path):
    return Donor(tmp_path / "donor")


@pytest.fixture
def packet(donor):
    return donor.make()


def refused(call, *args, **kwargs):
    with pytest.raises(RejectedError) as caught:
        call(*args, **kwargs)
    return code_of(caught)


def test_the_unbroken_packet_is_received(tmp_path, donor, packet):
    opened = donor.receive(tmp_path / "opened")
    assert opened.tensors["organ.safetensors"].frobenius_norm == pytest.approx(32**0.5)


# --- the coordinator, or whoever holds the bytes on the way ---


@pytest.mark.parametrize("name", ["part-000.sealed", "manifest.sealed"])
@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "gone", "link"])
def test_damaged_sealed_files_are_refused(tmp_path, donor, packet, name, damage):
    header = donor.verify_dispatch().header
    path = donor.out / name
    content = path.read_bytes()
    path.unlink()
    if damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "grow":
        path.write_bytes(content + b"\0")
    elif damage == "link":
        (tmp_path / "real").write_bytes(content)
        path.symlink_to(tmp_path / "real")
    expected = "AG-PKT-002" if damage in {"gone", "link"} else "AG-PKT-004"
    assert refused(container.check_sealed_files, donor.out, header) == expected


def test_a_changed_header_is_not_the_signed_one(donor, packet):
    def drop_auditors(header):
        header["wraps"] = [w for w in header["wraps"] if w["site"] != AUDITOR]

    edit_json(donor.out / "header.json", drop_auditors)
    assert refused(donor.verify_dispatch) == "AG-PRO-006"


def test_a_recipient_added_by_the_coordinator_is_refused(donor, packet):
    def add(header):
        header["audience"] = [STRANGER, RECIPIENT]
        for wrap in [dict(w) for w in header["wraps"] if w["site"] == RECIPIENT]:
            header["wraps"].append({**wrap, "site": STRANGER})

    edit_json(donor.out / "header.json", add)
    assert refused(donor.verify_dispatch, me=STRANGER) == "AG-PRO-006"


def test_a_dispatch_for_another_site_is_refused(donor, packet):
    assert refused(donor.verify_dispatch, me=STRANGER) == "AG-PRO-003"


def test_an_auditor_is_not_in_the_audience(donor, packet):
    assert refused(donor.verify_dispatch, me=AUDITOR) == "AG-PRO-003"


def test_a_repeated_dispatch_is_refused(donor, packet):
    seen = {donor.dispatch_id}
    assert refused(donor.verify_dispatch, is_seen=seen.__contains__) == "AG-PRO-005"


def test_an_expired_dispatch_is_refused(donor, packet):
    assert refused(donor.verify_dispatch, now=NOW + timedelta(days=1)) == "AG-PRO-004"


def test_a_dispatch_from_the_future_is_refused(donor, packet):
    assert refused(donor.verify_dispatch, now=NOW - timedelta(hours=1)) == "AG-PRO-009"


def test_a_dispatch_of_an_unknown_or_revoked_donor_is_refused(donor, packet):
    del donor.roster.keys[DONOR]
    assert refused(donor.verify_dispatch) == "AG-SIG-003"


def test_a_dispatch_signed_with_another_key_is_refused(donor, packet):
    donor.roster.keys[DONOR] = SigningKey.generate().public
    assert refused(donor.verify_dispatch) == "AG-SIG-003"


def test_a_dispatch_signed_by_another_enrolled_site_is_refused(donor, packet):
    other = SigningKey.generate()
    donor.roster.keys[STRANGER] = other.public
    envelope = dsse.Envelope.from_bytes((donor.out / "dispatch.json").read_bytes())
    forged = dsse.sign(envelope.payload, dsse.IN_TOTO, [other]).to_bytes()
    (donor.out / "dispatch.json").write_bytes(forged)
    assert refused(donor.verify_dispatch) == "AG-SIG-003"


def test_a_signature_of_another_type_never_counts(donor, packet):
    lines = donor.attest(packet)
    (donor.out / "dispatch.json").write_bytes(lines[1])
    assert refused(donor.verify_dispatch) == "AG-PRO-002"


@pytest.mark.parametrize(
    "change",
    [{"event": "route"}, {"actor": STRANGER}, {"packet_id": "0" * 32}, {"dispatch_id": "0" * 32},
     {"document_sha256": "0" * 64}],
)  # fmt: skip
def test_the_log_entry_of_something_else_is_refused(donor, packet, change):
    verified = donor.verify_dispatch()
    assert refused(verify.check_logged, verified, donor.event(verified, **change)) == "AG-PRO-007"


def test_files_of_two_dispatches_cannot_be_mixed(tmp_path, donor, packet):
    other = Donor(tmp_path / "other")
    other.key, other.sealing, other.roster = donor.key, donor.sealing, donor.roster
    other.make()
    for name in ("part-000.sealed", "manifest.sealed", "header.json"):
        kept = (donor.out / name).read_bytes()
        shutil.copy(other.out / name, donor.out / name)
        if name == "header.json":
            assert refused(donor.verify_dispatch) == "AG-PRO-006"
        else:
            header = donor.verify_dispatch().header
            assert refused(container.check_sealed_files, donor.out, header) == "AG-PKT-004"
        (donor.out / name).write_bytes(kept)


# --- the recipient ---


def test_a_recipient_cannot_pass_a_packet_on_in_the_donors_name(donor, packet):
    """It holds the keys, but can neither rename the wrap nor re-sign the dispatch."""
    verified = donor.verify_dispatch()
    wraps = tuple(replace(w, site=STRANGER) if w.site == RECIPIENT else w
                  for w in verified.header.wraps)  # fmt: skip
    header = replace(verified.header, wraps=wraps, audience=(STRANGER,))
    stolen = container.Opener(STRANGER, donor.sealing[RECIPIENT])
    assert refused(container.open_manifest, donor.out, header, stolen) == "AG-SEA-002"


def test_a_manifest_wrap_opens_no_payload(tmp_path, donor, packet):
    verified = donor.verify_dispatch()
    wraps = tuple(
        replace(w, wrap=verified.header.find_wrap(RECIPIENT, "manifest").wrap)
        if w.role == "payload" else w for w in verified.header.wraps
    )  # fmt: skip
    header = replace(verified.header, wraps=wraps)
    assert refused(
        container.open_payload, donor.out, header, "organ", packet.parts, donor.opener(),
        tmp_path / "x",
    ) == "AG-SEA-002"  # fmt: skip


def test_a_packet_sealed_for_an_older_key_says_so(donor, packet):
    verified = donor.verify_dispatch()
    opener = container.Opener(RECIPIENT, SealingKey.generate())
    assert refused(container.open_manifest, donor.out, verified.header, opener) == "AG-SEA-002"


# --- the donor ---


def sealed(donor, change_lines=lambda lines: lines, /, **changes):
    """Verify a packet whose donor broke a rule before signing; returns the refusal's code."""
    packet = donor.statement(donor.write_payload(), **changes)
    lines = change_lines(donor.attest(packet))
    donor.seal(packet, lines)
    return refused(donor.verify_manifest, donor.verify_dispatch())


@pytest.mark.parametrize("index", range(5))
def test_every_attestation_is_needed(donor, index):
    if index == 1:

        def change(lines):
            return [lines[0], lines[5], *lines[2:5]]
    else:

        def change(lines):
            return lines[:index] + lines[index + 1 :]

    packet = donor.statement(donor.write_payload())
    lines = donor.attest(packet)
    digest = hashlib.sha256(lines[1]).hexdigest()
    donor.seal(packet, change(lines), statement_digest=digest)
    assert refused(donor.verify_manifest, donor.verify_dispatch()) == "AG-PKT-006"


@pytest.mark.parametrize("index", range(5))
def test_no_attestation_may_stand_twice(donor, index):
    assert sealed(donor, lambda lines: [*lines, lines[index]]) == "AG-PKT-006"


def test_approvals_may_stand_more_than_once(donor):
    packet = donor.statement(donor.write_payload())
    lines = donor.attest(packet)
    donor.seal(packet, [*lines, lines[5]])
    assert len(donor.verify_manifest(donor.verify_dispatch()).approvals) == 2


def test_an_unknown_attestation_is_refused(donor):
    def change(lines):
        packet = dsse.Envelope.from_bytes(lines[4])
        value = canonical.loads(packet.payload)
        value["predicateType"] = "urn:example:praise"
        return [*lines, dsse.sign(canonical.dumps(value), dsse.IN_TOTO, [donor.key]).to_bytes()]

    assert sealed(donor, change) == "AG-PKT-006"


@pytest.mark.parametrize("index", range(6))
def test_every_attestation_is_signed_by_the_donor(donor, index):
    def change(lines):
        forged = donor.attest(donor.statement(donor.write_payload()), SigningKey.generate())
        return [*lines[:index], forged[index], *lines[index + 1 :]]

    assert sealed(donor, change) == "AG-SIG-003"


@pytest.mark.parametrize("index", [0, 2, 3, 4, 5])
def test_evidence_about_another_payload_is_refused(tmp_path, donor, index):
    other = Donor(tmp_path / "other", packet_id=donor.packet_id)
    values = {"blocks.0.w": np.full((4, 8), 2, np.float32)}
    foreign = other.attest(other.statement(other.write_payload(values)), donor.key)

    def change(lines):
        return [*lines[:index], foreign[index], *lines[index + 1 :]]

    assert sealed(donor, change) == ("AG-PKT-007" if index == 0 else "AG-PRO-002")


@pytest.mark.parametrize("index", [2, 4, 5])
def test_evidence_about_another_packet_of_equal_bytes_is_refused(tmp_path, donor, index):
    other = Donor(tmp_path / "other")
    foreign = other.attest(other.statement(other.write_payload()), donor.key)

    def change(lines):
        return [*lines[:index], foreign[index], *lines[index + 1 :]]

    assert sealed(donor, change) == "AG-PRO-008"


def test_two_statements_for_one_dispatch_are_told_apart(donor):
    """Equivocation: a second signed statement about the same parts, with another licence."""
    packet = donor.statement(donor.write_payload())
    lines = donor.attest(packet)
    generous = replace(packet, licence=statement.Licence(merge=True))
    shown = [lines[0], statement.sign_packet_statement(generous, donor.key), *lines[2:]]
    donor.seal(packet, shown, statement_digest=hashlib.sha256(lines[1]).hexdigest())
    assert refused(donor.verify_manifest, donor.verify_dispatch()) == "AG-PRO-008"


def test_a_statement_of_another_packet_is_refused(donor):
    assert sealed(donor, donor=STRANGER) == "AG-PRO-008"


def test_a_dispatch_may_not_outlive_its_packet(donor):
    assert sealed(donor, not_after=NOW + timedelta(hours=1)) == "AG-PRO-008"


def test_an_expired_retention_is_refused(donor):
    assert sealed(donor, retention_until=NOW) == "AG-PRO-010"


def test_a_statement_from_the_future_is_refused(donor):
    assert sealed(donor, created=NOW + timedelta(hours=1)) == "AG-PRO-009"


def test_header_and_statement_agree_about_sizes(donor):
    packet = donor.statement(donor.write_payload())
    larger = replace(packet, parts=tuple(replace(p, size_bytes=p.size_bytes + 1)
                                         for p in packet.parts))  # fmt: skip
    lines = donor.attest(larger)
    donor.seal(packet, lines)
    assert refused(donor.verify_manifest, donor.verify_dispatch()) == "AG-PRO-008"


def test_a_payload_other_than_the_signed_one_is_refused_after_decryption(tmp_path, donor):
    """The donor seals what its own statement does not describe."""
    packet = donor.statement(donor.write_payload())
    other = donor.write_payload({"blocks.0.w": np.zeros((4, 8), np.float32)})
    lines = donor.attest(packet)
    donor.seal(replace(packet, parts=other), lines)
    assert refused(donor.receive, tmp_path / "opened") == "AG-PKT-004"
    assert not (tmp_path / "opened").exists()


def test_a_payload_of_nan_is_refused_and_never_appears(tmp_path, donor):
    packet = donor.statement(donor.write_payload({"w": np.array([np.nan], np.float32)}))
    donor.seal(packet, donor.attest(packet))
    assert refused(donor.receive, tmp_path / "opened") == "AG-PKT-022"
    assert not (tmp_path / "opened").exists()


def test_a_payload_that_is_a_pickle_is_refused_and_never_appears(tmp_path, donor):
    donor.write_payload()
    (donor.payload / "organ.safetensors").write_bytes(b"\x80\x04\x95" + bytes(100))
    packet = donor.statement(container.list_payload(donor.payload, "organ"))
    donor.seal(packet, donor.attest(packet))
    assert refused(donor.receive, tmp_path / "opened") == "AG-PKT-010"
    assert not (tmp_path / "opened").exists()


def test_what_another_recipient_wrote_is_never_laid_to_the_donor(tmp_path, donor, packet):
    """All recipients hold the content key: one can seal a part anew, and the seal tells nothing."""
    header = donor.verify_dispatch().header
    bound = bytes.fromhex(header.packet_id + header.statement_digest)
    info = (b"allograft/wrap/v1\0" + bound + bytes.fromhex(header.dispatch_id)
            + b"payload\0" + RECIPIENT.encode())  # fmt: skip
    wrap = header.find_wrap(RECIPIENT, "payload").wrap
    key = seal.unwrap_key(wrap, donor.opener().key, info)
    context = b"allograft/payload/v1\0" + bound + bytes(4)
    plain = (donor.payload / "organ.safetensors").read_bytes()[:-4] + np.float32("nan").tobytes()
    (donor.out / "part-000.sealed").write_bytes(seal.seal_bytes(plain, key, context))
    assert refused(
        container.open_payload, donor.out, header, "organ", packet.parts, donor.opener(),
        tmp_path / "x",
    ) == "AG-PKT-004"  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["donor"]


def test_a_damaged_seal_is_told_before_any_tensor(tmp_path, donor):
    """The NaN passes in a sound block, long before the damage at the end."""
    values = {"w": np.full(1 << 20, np.nan, np.float32)}
    packet = donor.statement(donor.write_payload(values))
    donor.seal(packet, donor.attest(packet))
    header = donor.verify_dispatch().header
    path = donor.out / "part-000.sealed"
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    assert refused(
        container.open_payload, donor.out, header, "organ", packet.parts, donor.opener(),
        tmp_path / "x",
    ) == "AG-SEA-001"  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["donor"]


def test_part_names_are_never_the_donors(tmp_path, donor, packet):
    evil = tuple(replace(part, name="../../evil") for part in packet.parts)
    header = donor.verify_dispatch().header
    assert refused(
        container.open_payload, donor.out, header, "organ", evil, donor.opener(), tmp_path / "x"
    ) == "AG-PKT-002"  # fmt: skip
    predicate = canonical.loads(
        dsse.Envelope.from_bytes(donor.attest(packet)[1]).payload
    )["predicate"]  # fmt: skip
    predicate["parts"][0]["name"] = "../../evil"
    subject = intoto.Subject("../../evil", packet.parts[0].sha256)
    claim = intoto.Statement((subject,), statement.PACKET_TYPE, predicate)
    assert refused(statement.read_packet_statement, claim) == "AG-PRO-001"


def test_the_names_of_attestation_types_are_those_of_privacy():
    assert privacy_dossier.DOSSIER_TYPE == verify.DOSSIER_TYPE
    assert privacy_dossier.APPROVAL_TYPE == verify.APPROVAL_TYPE


def test_provenance_of_another_base_is_refused(donor):
    def change(lines):
        packet = donor.statement(donor.write_payload())
        run = training.TrainingRun(
            packet.packet_id, DONOR, {}, "e" * 64, "f" * 64, NOW - timedelta(hours=2), NOW
        )
        return [*lines[:2], training.sign_training(run, packet.subjects, donor.key), *lines[3:]]

    assert sealed(donor, change) == "AG-PRO-008"
