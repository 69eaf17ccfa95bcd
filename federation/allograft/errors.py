# SPDX-License-Identifier: Apache-2.0
"""Every failure an operator can meet, as a small tree with stable codes.

`AllograftError` has two families, so that retry logic is a type test:

- `RejectedError`: the input, the peer or the policy is at fault. Never retried.
- `UnavailableError`: network, disk or a missing process is at fault. Retried.

Each code stands once in `CODES` with a title and a fix; `docs/errors/` has a page for it.
Codes are never reused: scripts and audit logs depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class ErrorCode:
    """What a code means and what the person who meets it can do."""

    title: str
    fix: str


class AllograftError(Exception):
    """Base of both families.

    Args:
        code: A key of `CODES`, such as ``AG-PKT-004``.
        cause: One line that says what was found. It may travel to peers and into logs, so it
            never quotes payload bytes, keys or training text.
    """

    def __init__(self, code: str, cause: str) -> None:
        super().__init__(f"{code}: {cause}")
        self.code = code
        self.cause = cause
        self.fix = CODES[code].fix


class RejectedError(AllograftError):
    """The input, the peer or the policy is at fault; trying again changes nothing."""


class UnavailableError(AllograftError):
    """Something needed is not there now; the caller may try again."""


CODES: MappingProxyType[str, ErrorCode] = MappingProxyType(
    {
        # --- AG-IN: files and arguments a person gave us ---
        "AG-IN-001": ErrorCode(
            "a JSON document is malformed",
            "Ask its author for a fresh copy; the format is strict JSON without duplicate keys.",
        ),
        "AG-IN-002": ErrorCode(
            "a document is larger than its limit",
            "The limits are listed in protos/spec; a larger document is never read.",
        ),
        "AG-IN-003": ErrorCode(
            "a field is missing, unknown or of the wrong type",
            "Correct the named option; compare a document with its page in protos/spec.",
        ),
        # --- AG-STO: local storage ---
        "AG-STO-001": ErrorCode(
            "the disk is full or refuses writes",
            "Free space on that volume; a daemon then goes on by itself, a command is run again.",
        ),
        "AG-STO-002": ErrorCode(
            "another process already uses this state directory",
            "Stop the other daemon, or wait for the command that works there; two daemons need two "
            "--state directories.",
        ),
        "AG-STO-003": ErrorCode(
            "the state directory is missing or incomplete",
            "Run the init command if this directory is new; else restore the file from a backup.",
        ),
        "AG-STO-004": ErrorCode(
            "the database is damaged",
            "Stop the daemon and restore the file from a backup, without the -wal and -shm files "
            "beside it.",
        ),
        "AG-STO-005": ErrorCode(
            "a path cannot be read or written",
            "Check that the named path exists, is of the right sort and is this user's to use.",
        ),
        # --- AG-KEY, AG-SIG, AG-SEA: keys, signatures, sealing ---
        "AG-KEY-001": ErrorCode(
            "a key is malformed or of the wrong type",
            "Use the key files that the init command made; keys are never edited by hand.",
        ),
        "AG-KEY-002": ErrorCode(
            "a signature does not fit its key",
            "Ask the sender again; if it persists, the document was changed on its way.",
        ),
        "AG-KEY-003": ErrorCode(
            "an Ed25519 key is unusable (not canonical, or of small order)",
            "The key's owner must make a fresh one; such a key lets its owner deny signatures.",
        ),
        "AG-KEY-004": ErrorCode(
            "a private key file can be read by others, or is not a plain file",
            "Make it a regular file owned by this user with mode 0600 (chmod 600 FILE).",
        ),
        "AG-SIG-001": ErrorCode(
            "a signed envelope is malformed",
            "Ask its author for a fresh copy; see protos/spec/packet.md for the format.",
        ),
        "AG-SIG-002": ErrorCode(
            "a signed envelope is of another type than expected",
            "Check which file was given; signatures of one type never count for another.",
        ),
        "AG-SIG-003": ErrorCode(
            "too few valid signatures by known keys",
            "Refresh the roster; if the signer is in it, the document was changed.",
        ),
        "AG-SEA-001": ErrorCode(
            "a sealed file does not open",
            "It was damaged, cut or bound to another packet; ask for the dispatch again.",
        ),
        "AG-SEA-002": ErrorCode(
            "a key wrap does not open",
            "The donor sealed for an older key of this site; publish the current roster and ask "
            "for a new dispatch.",
        ),
        "AG-SEA-003": ErrorCode(
            "a sealed file has another size than announced",
            "Ask the donor for a new dispatch; if it persists, report the donor.",
        ),
        # --- AG-SIT: the site daemon and its command line ---
        "AG-SIT-001": ErrorCode(
            "a setting of the site is malformed",
            "Correct what the cause names: an option such as --site, or a line of site.toml in the "
            "state directory.",
        ),
        "AG-SIT-002": ErrorCode(
            "a newer version of allograft wrote this state",
            "Run the newer version; state is migrated forwards only.",
        ),
        "AG-SIT-003": ErrorCode(
            "no model, packet or job of this name at this site",
            "`allograft-site model list` and `allograft-site packets` show what there is.",
        ),
        "AG-SIT-004": ErrorCode(
            "the packet is in a state that does not allow this",
            "`allograft-site packet show ID` tells its state, the reason and its history.",
        ),
        "AG-SIT-005": ErrorCode(
            "a process of another user called the courier socket",
            "Run the SuperNode as the daemon's user, or list its uid under courier_uids.",
        ),
        "AG-SIT-006": ErrorCode(
            "a Flower app other than the installed courier was refused",
            "Nothing to do here: nothing of it ran. Ask the coordinator who submitted it.",
        ),
        "AG-SIT-007": ErrorCode(
            "a worker process ended without a result",
            "See the daemon's log for its last line; the job is tried again after a restart.",
        ),
        "AG-SIT-008": ErrorCode(
            "the site has not joined a consortium",
            "Send SITE.enrol.json to the roster's keeper, then run `allograft-site join`.",
        ),
        "AG-SIT-009": ErrorCode(
            "the daemon did not finish a request in time",
            "The request stays queued; `allograft-site status` shows how far it is.",
        ),
        "AG-SIT-010": ErrorCode(
            "a dispatch was seen before",
            "Nothing to do here: a packet is taken in once. The donor may dispatch it anew.",
        ),
        "AG-SIT-011": ErrorCode(
            "the path of the courier socket is too long for the operating system",
            "Use a state directory with a shorter path (the socket's path has 100 bytes at most).",
        ),
        "AG-SIT-012": ErrorCode(
            "an item arrived that this site has no use for",
            "Nothing to do here: it was dropped. Repeated cases point to a misrouting coordinator.",
        ),
        "AG-SIT-013": ErrorCode(
            "the site is already initialised",
            "Keys are never overwritten; choose another --state directory.",
        ),
        "AG-SIT-014": ErrorCode(
            "a recipient may not get this packet",
            "`allograft-site packet show ID` lists the coordinator's proposals and why others are "
            "refused.",
        ),
        "AG-SIT-015": ErrorCode(
            "the coordinator cannot be reached",
            "Check address, network and firewall: this site dials one port, outwards only.",
        ),
        "AG-SIT-016": ErrorCode(
            "the model, its stack or the gate's limits changed since the packet was tried",
            "Try it again with `allograft-site trial ID`, unless its new trial is queued already.",
        ),
        "AG-SIT-017": ErrorCode(
            "the packet is offered, and the coordinator has not answered with a route yet",
            "Wait for the coordinator's route with `allograft-site packet follow ID --until "
            "routed`, then dispatch again.",
        ),
        "AG-SIT-018": ErrorCode(
            "a packet's licence does not permit merging, so no merged snapshot may hold it",
            "Ask its donor to donate it anew with `--allow-merge`, or revert the packet first.",
        ),
        "AG-SIT-019": ErrorCode(
            "no audit of this packet was made at this site",
            "Only packets that this site made under `strict` or `measured` are audited, once they "
            "are trained; see `allograft-site packets`.",
        ),
        "AG-SIT-020": ErrorCode(
            "a screen raised an alarm, so the packet is quarantined and was not tried",
            "`allograft-site packet show ID` tells which and why. It is no proof of an attack: ask "
            "the donor, or decide with `allograft-site trial ID --despite-alarm`.",
        ),
        "AG-SIT-021": ErrorCode(
            "this combination of attachments was not screened",
            "Screen what is kept with `allograft-site model screen NAME`; try a packet anew with "
            "`allograft-site trial ID`, which screens what it adds.",
        ),
        "AG-SIT-022": ErrorCode(
            "a screen raised an alarm about the attachments that are kept together",
            "`allograft-site model list` shows the model; revert the packet you trust least.",
        ),
        # --- AG-PKT: packets, their files and their tensors ---
        "AG-PKT-001": ErrorCode(
            "a packet is of a kind that is not allowed",
            "`allograft-site recipes` lists the kinds of this version; none is loaded by name.",
        ),
        "AG-PKT-002": ErrorCode(
            "a packet directory holds other files than its kind has",
            "Keep exactly the files of its kind in it; links and special files are never followed.",
        ),
        "AG-PKT-003": ErrorCode(
            "a packet header is malformed",
            "Ask the donor for a new dispatch; see protos/spec/packet.md for the format.",
        ),
        "AG-PKT-004": ErrorCode(
            "a file of a packet is not the one that was signed",
            "Ask for the dispatch again; if it persists, ask the donor for a new one.",
        ),
        "AG-PKT-005": ErrorCode(
            "a packet is over a limit",
            "The limits are listed in protos/spec/packet.md; make a smaller packet.",
        ),
        "AG-PKT-006": ErrorCode(
            "the attestations of a packet are malformed, missing or doubled",
            "Ask the donor for a new packet; every packet carries each attestation once.",
        ),
        "AG-PKT-007": ErrorCode(
            "the model signature of a packet does not fit its payload",
            "The payload was changed after it was signed; ask the donor for a new packet.",
        ),
        "AG-PKT-008": ErrorCode(
            "a packet is not sealed for this site in this role",
            "Ask the donor to dispatch it to this site; auditors can open the manifest only.",
        ),
        "AG-PKT-009": ErrorCode(
            "the settings of an adapter are not allowed",
            "Adapters have a rank, a scale and named linear modules, and nothing else.",
        ),
        "AG-PKT-010": ErrorCode(
            "a tensor file is cut short",
            "Make or fetch the file again.",
        ),
        "AG-PKT-011": ErrorCode(
            "a tensor file's header is too large",
            "Headers have at most 16 MiB and 100000 tensors.",
        ),
        "AG-PKT-012": ErrorCode(
            "a tensor file's header is not strict JSON",
            "Write the file again with the safetensors library, without metadata.",
        ),
        "AG-PKT-013": ErrorCode(
            "a tensor file names a tensor twice",
            "Such a file means different things to different readers; write it again.",
        ),
        "AG-PKT-014": ErrorCode(
            "a tensor file carries metadata",
            "Write the file without metadata: free text beside tensors never travels.",
        ),
        "AG-PKT-015": ErrorCode(
            "a tensor name is not allowed",
            "Names have letters, digits and . _ - / only, no '..', at most 256 characters.",
        ),
        "AG-PKT-016": ErrorCode(
            "a tensor's element type is not allowed",
            "Packets carry F32, BF16 and F16 only; those of kinds delta and organ I8 and U8 too.",
        ),
        "AG-PKT-017": ErrorCode(
            "a tensor's shape is not allowed",
            "Shapes have at most 8 dimensions, none of them empty or negative.",
        ),
        "AG-PKT-018": ErrorCode(
            "two tensors share bytes",
            "Write the file again with the safetensors library.",
        ),
        "AG-PKT-019": ErrorCode(
            "a tensor's offsets do not fit its shape",
            "Write the file again with the safetensors library.",
        ),
        "AG-PKT-020": ErrorCode(
            "a tensor file has bytes that belong to no tensor",
            "Write the file again with the safetensors library.",
        ),
        "AG-PKT-021": ErrorCode(
            "bytes follow the last tensor of a file",
            "Write the file again with the safetensors library.",
        ),
        "AG-PKT-022": ErrorCode(
            "a tensor holds NaN or infinite values",
            "The training run diverged; look at its loss and train again.",
        ),
        "AG-PKT-023": ErrorCode(
            "a tensor file does not hold the tensors that were agreed",
            "Check that packet and base model belong together.",
        ),
        "AG-PKT-024": ErrorCode(
            "a tensor file holds no tensors or too many",
            "Files have between 1 and 100000 tensors.",
        ),
        "AG-PKT-025": ErrorCode(
            "a tensor's header entry has other fields than dtype, shape and data_offsets",
            "Write the file again with the safetensors library.",
        ),
        "AG-PKT-026": ErrorCode(
            "a tensor file's header is not in canonical form",
            "Write the file again with the safetensors library: other spellings could hide data.",
        ),
        "AG-PKT-027": ErrorCode(
            "a quantised tensor holds a number that its bits do not allow",
            "Ask the donor for a fresh packet; numbers lie between -127 and 127, or -7 and 7.",
        ),
        "AG-PKT-028": ErrorCode(
            "the directions of a delta are malformed or do not fit its base",
            "Check that packet and base model belong together; see protos/spec/recipes.md.",
        ),
        # --- AG-PRO: statements, dispatches and lineage ---
        "AG-PRO-001": ErrorCode(
            "a statement is malformed",
            "Ask its author for a fresh one; the fields are listed in protos/spec/packet.md.",
        ),
        "AG-PRO-002": ErrorCode(
            "a statement is about something else than expected",
            "Ask the donor for a new packet; a statement counts for its own subjects only.",
        ),
        "AG-PRO-003": ErrorCode(
            "a dispatch is not addressed to this site",
            "Nothing to do here: it was misrouted. If you expect the packet, ask its donor.",
        ),
        "AG-PRO-004": ErrorCode(
            "a packet or dispatch is past its last day",
            "Ask the donor for a new dispatch; also compare the clocks.",
        ),
        "AG-PRO-005": ErrorCode(
            "a dispatch was received before",
            "Nothing to do here: each dispatch is used once, repetitions are dropped.",
        ),
        "AG-PRO-006": ErrorCode(
            "a dispatch and its files do not belong together",
            "Ask for the dispatch again; if it persists, the coordinator mixes up packets.",
        ),
        "AG-PRO-007": ErrorCode(
            "the log entry of a dispatch is about something else",
            "Ask for the dispatch again; if it persists, tell the auditors.",
        ),
        "AG-PRO-008": ErrorCode(
            "the attestations of a packet contradict each other or the dispatch",
            "Ask the donor for a new packet.",
        ),
        "AG-PRO-009": ErrorCode(
            "a statement is from the future, or its times are out of order",
            "Compare the clocks of both machines.",
        ),
        "AG-PRO-010": ErrorCode(
            "a packet may no longer be kept",
            "Its retention has ended; revert it, or ask the donor for a new packet.",
        ),
        "AG-PRO-011": ErrorCode(
            "a model directory cannot be identified",
            "It needs config.json, a tokenizer, and each tensor once in *.safetensors files.",
        ),
        "AG-PRO-012": ErrorCode(
            "a model's record of the packets in it is malformed",
            "allograft.json beside the weights is written by `allograft-site model export`; "
            "export again.",
        ),
        # --- AG-ROS: the roster, enrolment and its keeper ---
        "AG-ROS-001": ErrorCode(
            "a file of the roster is malformed",
            "Ask the roster's keeper; the files are described in protos/spec/roster.md.",
        ),
        "AG-ROS-002": ErrorCode(
            "a party is not in the roster",
            "Check the name; if it should be there, ask the roster's keeper to enrol it.",
        ),
        "AG-ROS-003": ErrorCode(
            "a site was revoked",
            "Nothing of it is accepted any more; its revocation in the roster tells why.",
        ),
        "AG-ROS-004": ErrorCode(
            "the enrolment of a site has ended or not begun",
            "The site renews its enrolment with the roster's keeper; also compare the clocks.",
        ),
        "AG-ROS-005": ErrorCode(
            "an enrolment request is malformed or does not prove that its keys are held",
            "Make the request again with the init command of the party that asks.",
        ),
        "AG-ROS-006": ErrorCode(
            "a roster is older than one that was trusted before",
            "Ask the coordinator for the current roster; if this repeats, it hides a change.",
        ),
        "AG-ROS-007": ErrorCode(
            "the roster has expired",
            "The coordinator renews it daily and the keeper every few weeks; ask which is late. "
            "Also compare the clocks.",
        ),
        "AG-ROS-008": ErrorCode(
            "a roster is incomplete or not signed by those who keep it",
            "Ask the roster's keeper for the published files; never edit them.",
        ),
        "AG-ROS-009": ErrorCode(
            "there is no trusted roster yet",
            "A site joins with an invitation. At a coordinator, import the roster that the keeper "
            "published and start the daemon: it verifies what was imported.",
        ),
        "AG-ROS-010": ErrorCode(
            "the root of a roster is not the expected one",
            "Compare the root's fingerprint with the keeper by telephone; it may be a forgery.",
        ),
        "AG-ROS-011": ErrorCode(
            "the fingerprint of a request was not confirmed, or differs",
            "Ask the requesting party for its fingerprint by telephone and give it with "
            "--fingerprint.",
        ),
        "AG-ROS-012": ErrorCode(
            "a site is enrolled already, or its name was revoked",
            "Use --replace to give an enrolled site new keys; a revoked one needs another name.",
        ),
        "AG-ROS-013": ErrorCode(
            "a key that this needs is not in the keeper's keys directory",
            "Bring the key files back from where they are kept offline, then try again.",
        ),
        "AG-ROS-014": ErrorCode(
            "an invitation is malformed",
            "Ask the roster's keeper for a fresh invitation.",
        ),
        "AG-ROS-015": ErrorCode(
            "this coordinator may not renew the roster",
            "Its timestamp key is not the one in the root; ask the roster's keeper to renew it.",
        ),
        "AG-ROS-016": ErrorCode(
            "the keeper's directory is not usable",
            "Give an empty directory to init, and an initialised one to the other commands; a "
            "damaged one comes back from its backup.",
        ),
        # --- AG-LOG: the log, its witnesses and its audit ---
        "AG-LOG-001": ErrorCode(
            "a log entry is malformed",
            "Ask the site that made it to upgrade; entries have one spelling, see "
            "protos/spec/log.md.",
        ),
        "AG-LOG-002": ErrorCode(
            "a Merkle proof does not hold",
            "Ask for the proof again; if it persists, show it and the checkpoint to the auditors.",
        ),
        "AG-LOG-003": ErrorCode(
            "a signed note or verifier key is malformed",
            "Copy it again without changing a byte; see protos/spec/log.md for the format.",
        ),
        "AG-LOG-004": ErrorCode(
            "a note is not signed by the log",
            "Compare the log's verifier key in the roster with the one the coordinator shows.",
        ),
        "AG-LOG-005": ErrorCode(
            "a checkpoint is malformed or of another log",
            "Compare the log's origin in the roster with the one the coordinator shows.",
        ),
        "AG-LOG-006": ErrorCode(
            "a cosignature does not fit its witness",
            "Ask for the proof again; if it persists, the coordinator invents witnesses.",
        ),
        "AG-LOG-007": ErrorCode(
            "too few witnesses have seen a checkpoint",
            "Wait until more sites are online; the roster's policy says how many it takes.",
        ),
        "AG-LOG-008": ErrorCode(
            "a log proof is malformed",
            "Ask for the proof again; see protos/spec/log.md for the format.",
        ),
        "AG-LOG-009": ErrorCode(
            "the log shrank",
            "Entries were removed, or an old backup was restored. Keep the witness's state as "
            "evidence and ask the coordinator; nothing was cosigned.",
        ),
        "AG-LOG-010": ErrorCode(
            "the log forked: two histories of one log",
            "Keep the witness's state as evidence and tell the other sites; nothing was cosigned.",
        ),
        "AG-LOG-011": ErrorCode(
            "a consistency proof does not start where this witness stands",
            "Nothing to do here: an answer was lost, and the coordinator asks again.",
        ),
        "AG-LOG-012": ErrorCode(
            "the log's database or a witness's memory is damaged, or belongs to another log",
            "Restore the newest backup of this file; never delete a witness's memory.",
        ),
        "AG-LOG-013": ErrorCode(
            "an exported log is incomplete or holds files that do not belong there",
            "Export it again; do not rename, add or remove files.",
        ),
        "AG-LOG-014": ErrorCode(
            "an exported log is not the one that was signed",
            "Export it again; if it persists, the coordinator's log was changed.",
        ),
        "AG-LOG-015": ErrorCode(
            "an entry of the log is out of order",
            "The coordinator accepted what it had to refuse; show the entry to the auditors.",
        ),
        "AG-LOG-016": ErrorCode(
            "a roster in the log does not verify, or is not the one that was logged",
            "Compare the roster's digest with what the sites trusted at that time.",
        ),
        "AG-LOG-017": ErrorCode(
            "no checkpoint of the log has enough witnesses yet",
            "Wait until enough sites have been online since the first entries, then export.",
        ),
        # --- AG-RLY: relay between coordinator and sites ---
        "AG-RLY-001": ErrorCode(
            "a relay frame is malformed",
            "Check that both sides run the same minor version of allograft.",
        ),
        "AG-RLY-002": ErrorCode(
            "a relay frame is not signed by the peer it names",
            "Refresh the roster; if it persists, the transport is being tampered with.",
        ),
        "AG-RLY-003": ErrorCode(
            "a relay frame is addressed to someone else or answers another call",
            "Nothing to do here: the frame was dropped. Repeated cases point to a misrouting peer.",
        ),
        "AG-RLY-004": ErrorCode(
            "a relay frame is too old or from the future",
            "Check the clocks of both machines; frames are valid for one hour.",
        ),
        "AG-RLY-005": ErrorCode(
            "a part does not match its announced digest",
            "Nothing to do here: the part is fetched again.",
        ),
        "AG-RLY-006": ErrorCode(
            "an item was announced that may not be sent in this direction or is over its limits",
            "Check the size of the packet against the limits in protos/spec/relay.md.",
        ),
        "AG-RLY-007": ErrorCode(
            "a local process of the relay does not answer",
            "Check that the daemon runs (`allograft-site doctor`); the call is made again.",
        ),
        # --- AG-RTE: cards, offers, routes, receipts, withdrawals ---
        "AG-RTE-001": ErrorCode(
            "a card, offer, route, receipt or withdrawal is malformed",
            "Check that both sides run the same minor version of allograft.",
        ),
        "AG-RTE-002": ErrorCode(
            "an offer or dispatch is past its end",
            "Make the packet again with a later end, if it should still be delivered.",
        ),
        # --- AG-CRD: the coordinator ---
        "AG-CRD-001": ErrorCode(
            "a setting of the coordinator is malformed",
            "Correct what the cause names: an option such as --address or --state, or a line of "
            "coordinator.toml in the state directory.",
        ),
        "AG-CRD-002": ErrorCode(
            "the coordinator has no usable roster",
            "Publish the roster and import it with `allograft-coordinator import-roster DIR`.",
        ),
        "AG-CRD-003": ErrorCode(
            "a document was sent by another site than its author",
            "Nothing to do here: the item was refused. Repeated cases point to a faulty site.",
        ),
        "AG-CRD-004": ErrorCode(
            "an event does not belong to the document it came with",
            "Nothing to do here: the item was refused. The sender must build it again.",
        ),
        "AG-CRD-005": ErrorCode(
            "a dispatch does not fit the offer, its audience or the sealed files",
            "The donor must dispatch again; see protos/spec/relay.md for what is compared.",
        ),
        "AG-CRD-006": ErrorCode(
            "a receipt or withdrawal names a packet that its sender has no part in",
            "Nothing to do here: the item was refused. Repeated cases point to a faulty site.",
        ),
        "AG-CRD-007": ErrorCode(
            "the packet was withdrawn by its donor",
            "Nothing to do here: a withdrawn packet is not delivered.",
        ),
        "AG-CRD-008": ErrorCode(
            "the identifier of a packet or dispatch is already taken by another one",
            "The donor must build the packet again; identifiers are never used twice.",
        ),
        "AG-CRD-010": ErrorCode(
            "a Flower process does not start or stopped",
            "Read run/*.log in the coordinator's state directory; the supervisor starts it again.",
        ),
        "AG-CRD-011": ErrorCode(
            "the SuperLink refuses or does not answer a control call",
            "Check that the private port in coordinator.toml is free; the call is made again.",
        ),
        "AG-CRD-012": ErrorCode(
            "the coordinator's database was written by a newer version",
            "Start the newer version again; a database is never migrated backwards.",
        ),
        "AG-CRD-013": ErrorCode(
            "the coordinator's state directory already exists",
            "Give another --state directory, or go on with the one that is there.",
        ),
        # --- AG-PRV: privacy policy, modes, gates, release and egress ---
        "AG-PRV-001": ErrorCode(
            "there is no policy file, so nothing leaves and nothing attaches",
            "Read policy.toml.example in the state directory, decide, and save it as policy.toml.",
        ),
        "AG-PRV-002": ErrorCode(
            "the policy file is unreadable or malformed, so nothing leaves and nothing attaches",
            "Correct the named field of policy.toml; unknown fields are refused on purpose.",
        ),
        "AG-PRV-003": ErrorCode(
            "the site's policy does not allow this donation",
            "Change the [donate] section of policy.toml, if the site decides so.",
        ),
        "AG-PRV-004": ErrorCode(
            "the site's policy does not allow this recipient",
            "Add the site to donate.recipients in policy.toml, if the site decides so.",
        ),
        "AG-PRV-005": ErrorCode(
            "the site's policy does not allow this packet to be received",
            "Change the [receive] section of policy.toml, if the site decides so.",
        ),
        "AG-PRV-006": ErrorCode(
            "the policy is not signed, and this privacy mode needs a signed one",
            "Let the responsible role read policy.toml and run "
            "`allograft-site policy sign --role ROLE`.",
        ),
        "AG-PRV-007": ErrorCode(
            "the policy file differs from the one that was signed",
            "Restore the file that was signed, or let the responsible role read what became weaker "
            "and run `allograft-site policy sign --role ROLE`.",
        ),
        "AG-PRV-008": ErrorCode(
            "the policy's signature is malformed or not by this site's key",
            "Sign the policy again with `allograft-site policy sign --role ROLE`.",
        ),
        "AG-PRV-009": ErrorCode(
            "the policy asks for less than the privacy mode needs",
            "For measured: name two different roles in donate.approvals and every site in "
            "donate.recipients.",
        ),
        "AG-PRV-010": ErrorCode(
            "the privacy mode is unknown",
            "Use one of: open, measured, strict.",
        ),
        "AG-PRV-011": ErrorCode(
            "the evidence or the policy does not meet the rules of the privacy mode",
            "Build the packet again from its signed plan; a recipient refuses it as it is.",
        ),
        "AG-PRV-012": ErrorCode(
            "the declaration that the data is public or synthetic is missing or out of place",
            "For mode open state what the data is and which role declares it; for private data "
            "use strict or measured, which take no declaration.",
        ),
        "AG-PRV-013": ErrorCode(
            "a claimed epsilon is smaller than its own constants give",
            "Do not use the packet; ask its donor how the number came about.",
        ),
        "AG-PRV-014": ErrorCode(
            "a privacy plan or domain asks for more than the signed policy allows",
            "Plan more noise, open the domain with less, or let the responsible roles change and "
            "sign the policy.",
        ),
        "AG-PRV-015": ErrorCode(
            "what was learnt on top of others' packets may not be passed on like this",
            "Train on the trusted base instead; or every parent's licence must permit redonation "
            "and the mode be strict with epsilon at most donate.redonate_epsilon.",
        ),
        "AG-PRV-016": ErrorCode(
            "the policy demands the site's identifier list, and the text was scanned without one",
            "Export names and numbers from the patient index to a file, name it as `identifiers` "
            "in site.toml, restart the daemon and build the packet again.",
        ),
        "AG-PRV-020": ErrorCode(
            "a release gate is missing, failed or could not be judged",
            "Read the gate's reason with `allograft-site packet show`; nothing has left the site.",
        ),
        "AG-PRV-021": ErrorCode(
            "text that would leave the site looks like an identifier",
            "Rewrite the named field without names, numbers, dates or addresses of people.",
        ),
        "AG-PRV-030": ErrorCode(
            "a dossier or approval is malformed or belongs to something else",
            "Build the packet again; a dossier fits one packet, one payload and one policy.",
        ),
        "AG-PRV-031": ErrorCode(
            "an approval that the policy requires is missing",
            "Let the named role approve with `allograft-site approve PACKET --role ROLE`.",
        ),
        "AG-PRV-032": ErrorCode(
            "the payload is not the one that was approved",
            "Build the packet again and have it approved; an approved payload is never changed.",
        ),
        "AG-PRV-033": ErrorCode(
            "the dossier asks for no approval by this role",
            "Approve in a role that the cause lists; donate.approvals in policy.toml named them "
            "when the packet was built.",
        ),
        "AG-PRV-034": ErrorCode(
            "an audit passed with warnings, which an approving role must weigh",
            "Read the dossier; who agrees all the same approves again with --despite-warnings.",
        ),
        "AG-PRV-040": ErrorCode(
            "the payload holds something that its kind and base do not allow",
            "Use the recipe's own output; other tensors, shapes, files and metadata never leave.",
        ),
        "AG-PRV-041": ErrorCode(
            "the payload holds values that are not finite or far out of range",
            "The training diverged: lower the learning rate and train again.",
        ),
        "AG-PRV-042": ErrorCode(
            "the base model's tensors cannot be listed",
            "Give a local model directory with config.json and safetensors files.",
        ),
        "AG-PRV-050": ErrorCode(
            "a privacy plan's constants are out of range",
            "Let `allograft-site plan new` propose constants for a target epsilon.",
        ),
        "AG-PRV-051": ErrorCode(
            "a privacy plan's constant looks as if it was derived from the data",
            "Choose public constants of at most three significant digits, before the data is read.",
        ),
        "AG-PRV-052": ErrorCode(
            "a privacy plan is malformed or over its limits",
            "Make it with `allograft-site plan new`; its format is in protos/spec/ledger.md.",
        ),
        "AG-PRV-053": ErrorCode(
            "a privacy plan does not fit its mode",
            "Mode strict needs constants, measured may go without, open has no plan.",
        ),
        "AG-PRV-055": ErrorCode(
            "no noise reaches the target epsilon",
            "Take fewer steps, a smaller sampling rate, or a larger target epsilon.",
        ),
        "AG-PRV-056": ErrorCode(
            "there is no such privacy plan here, or it is not at that stage",
            "See the state directory's plans; make one with `allograft-site plan new`.",
        ),
        "AG-PRV-057": ErrorCode(
            "a donation is not the one that its privacy plan was signed for",
            "Make and sign a plan of its own for every run, with the model, kind, training and "
            "field of the person that the donation will have; one domain keeps one field.",
        ),
        "AG-PRV-059": ErrorCode(
            "a privacy domain or the role that declares it has no usable name",
            "Name the domain and the role by lower-case letters, digits and dashes, at most 63; "
            "never name a person.",
        ),
        "AG-PRV-060": ErrorCode(
            "the privacy ledger was altered, or is not this site's",
            "Make no more packets; compare the file with a backup and with the heads in dossiers.",
        ),
        "AG-PRV-061": ErrorCode(
            "a privacy domain's limits are out of range or have been fixed already",
            "Limits are fixed once, when the domain is opened; epsilon 8, delta 1e-6, order 4 fit "
            "most.",
        ),
        "AG-PRV-062": ErrorCode(
            "the privacy domain has not been opened",
            "Open it with `allograft-site ledger open-domain`, once for the same people.",
        ),
        "AG-PRV-063": ErrorCode(
            "the privacy budget of the people is used up",
            "Plan fewer steps or more noise; see `allograft-site ledger show` for what is left. "
            "Spent budget never comes back.",
        ),
        "AG-PRV-064": ErrorCode(
            "the clock does not fit the privacy ledger: before its last entry, or long after the "
            "roster's end",
            "Set the clock right; nothing was written. If it is right: after an entry that a wrong "
            "clock dated ahead wait for that time, as no entry is taken back; with an old roster "
            "run the daemon until the coordinator has sent a new one.",
        ),
        "AG-PRV-065": ErrorCode(
            "a reservation was used, ended or stated differently before",
            "Make a new plan: one plan pays for one run.",
        ),
        "AG-PRV-066": ErrorCode(
            "some of these people belong to another privacy domain",
            "Name the domain that they belong to; a renamed or filtered data set stays in it.",
        ),
        "AG-PRV-067": ErrorCode(
            "the register of people is damaged, incomplete or was made with another key",
            "Restore the population directory and keys/population.key from one backup.",
        ),
        "AG-PRV-068": ErrorCode(
            "another process is writing to the privacy ledger",
            "Try again; entries take milliseconds. If it stays, find the process that hangs.",
        ),
        "AG-PRV-069": ErrorCode(
            "the privacy ledger is shorter than it was: it was cut, rolled back or removed",
            "Restore the newest copy; until then nothing can be spent. Never start a new ledger "
            "for the same people.",
        ),
        "AG-PRV-070": ErrorCode(
            "the site's identifier list cannot be read",
            "Export it again as UTF-8 text or CSV: one identifier on each line or in each cell.",
        ),
        "AG-PRV-071": ErrorCode(
            "the site's identifier list holds nothing that can be matched",
            "Export names, record numbers, phones and street lines; dates and cities alone are no "
            "list.",
        ),
        "AG-PRV-072": ErrorCode(
            "the index of the private corpus is damaged or was made under another key",
            "Build the index again from the corpus; an old one must not be used in its place.",
        ),
        "AG-PRV-073": ErrorCode(
            "a text part of the payload cannot be read, so it cannot be judged",
            "Write one strict JSON value on each line, UTF-8, at most 1 MiB a line.",
        ),
        "AG-PRV-074": ErrorCode(
            "text that would leave the site repeats a passage of its private corpus",
            "Take the passage out or write it anew from general knowledge; nothing has left.",
        ),
        "AG-PRV-075": ErrorCode(
            "an audit shows that a model tells about the people it was trained on",
            "Train again with fewer steps, a lower rate or differential privacy; duplicated "
            "records are the usual cause.",
        ),
        "AG-PRV-076": ErrorCode(
            "an audit's canaries were learnt",
            "Without differential privacy train less; with it, the claimed epsilon is refuted: "
            "report it, and donate nothing from that build.",
        ),
        "AG-PRV-077": ErrorCode(
            "a claimed epsilon does not follow from its plan, or is too large",
            "Compute it again with `allograft-site plan new`, or plan more noise or fewer steps.",
        ),
        "AG-PRV-078": ErrorCode(
            "too few people are behind a packet",
            "Pool data with other sites or donate nothing; the minimum is not to be lowered for "
            "one packet.",
        ),
        "AG-PRV-079": ErrorCode(
            "an audit has too little to judge by, so it could not have failed",
            "Plant more canaries, hold more people out or give more public text, then train "
            "again; such an audit never counts as passed.",
        ),
        "AG-PRV-080": ErrorCode(
            "the private training step failed its self-test",
            "Nothing was released. Report it with the versions of torch and transformers.",
        ),
        "AG-PRV-081": ErrorCode(
            "the records do not say whom they are about",
            "Give every JSONL record the person's id, and name its field with `--person-field`: "
            "for a donation, of `plan new`.",
        ),
        # --- AG-RCP: recipes, their training data and the stack of attachments ---
        "AG-RCP-001": ErrorCode(
            "no recipe for this kind of packet",
            "Install the package that provides the kind and allow it in the site's policy.",
        ),
        "AG-RCP-002": ErrorCode(
            "the facts of a packet are malformed or contradict each other",
            "Ask the donor for a fresh packet; see protos/spec/recipes.md for the fields.",
        ),
        "AG-RCP-003": ErrorCode(
            "a payload's tensors do not fit their facts or the base",
            "Nothing was attached. Ask the donor which base the packet was made on.",
        ),
        "AG-RCP-004": ErrorCode(
            "an attachment directory is incomplete or was changed",
            "Fit the packet again; attachments are written by the site only.",
        ),
        "AG-RCP-010": ErrorCode(
            "the packet was made on a model of another shape",
            "Weights fit one architecture only; offers of knowledge packets can cross them.",
        ),
        "AG-RCP-011": ErrorCode(
            "the packet was made with another tokenizer",
            "Weights are bound to a tokenizer; use the model the donor names in its statement.",
        ),
        "AG-RCP-012": ErrorCode(
            "the base differs and its lineage has not been tested",
            "Compare the model with the statement's sketch first; the daemon does so by itself.",
        ),
        "AG-RCP-013": ErrorCode(
            "the base has the same shape but another lineage",
            "Nothing can be done: a copied change does harm on an independently trained model.",
        ),
        "AG-RCP-014": ErrorCode(
            "the packet builds on a model that this site does not have",
            "Add the donor's base with `allograft-site model add`, or ask for a whole expert.",
        ),
        "AG-RCP-020": ErrorCode(
            "the model family is unknown, or its blocks depend on their position",
            "Use GPT-2, Llama, Qwen2, Qwen3, Mistral, Gemma 2 or Gemma 3 (text).",
        ),
        "AG-RCP-021": ErrorCode(
            "an insertion position, a block count or a dose is out of range",
            "Positions count the base's own blocks from 0; doses lie between 0 and 1.",
        ),
        "AG-RCP-022": ErrorCode(
            "the model already carries attachments where a plain base is needed",
            "Detach them, or load the base again.",
        ),
        "AG-RCP-023": ErrorCode(
            "the attachment is not on this model, or already is",
            "List the model's stack; each attachment can be attached once.",
        ),
        "AG-RCP-024": ErrorCode(
            "this attachment cannot be exported in the format asked for",
            "A PEFT directory holds one LoRA, or one delta that changes matrices of blocks only; "
            "export the rest as a merged snapshot. An expert stays beside the model and has no "
            "export.",
        ),
        "AG-RCP-025": ErrorCode(
            "models cannot be mixed in this way",
            "Call the model with token ids, a mask of one row per text, and a cache that began "
            "after the last attachment came or went.",
        ),
        "AG-RCP-026": ErrorCode(
            "the base's blocks cannot be copied and changed one by one",
            "Use a snapshot whose blocks hold weights of their own, of one floating-point type.",
        ),
        "AG-RCP-027": ErrorCode(
            "memory ran out; the model is as it was before",
            "Free memory or use a larger machine, then try again.",
        ),
        "AG-RCP-028": ErrorCode(
            "a model's weights changed since it was added",
            "Put the weights back, or add the changed model under another name.",
        ),
        "AG-RCP-029": ErrorCode(
            "a search over positions cannot use private data",
            "Fix the position in the plan; search for it beforehand on public text of the kind.",
        ),
        "AG-RCP-030": ErrorCode(
            "the training text is empty or too small",
            "Give more documents, or shorter windows; near-duplicates count once.",
        ),
        "AG-RCP-031": ErrorCode(
            "the training text is not readable",
            "Give UTF-8 text, or JSON lines with `text`, `prompt`+`completion` or "
            "`question`+`answer`; .gz is read too.",
        ),
        "AG-RCP-032": ErrorCode(
            "the model directory is not usable",
            "Give a local transformers directory with config.json, tokenizer files and "
            "safetensors weights; pickled weights and remote code are never loaded.",
        ),
        "AG-RCP-033": ErrorCode(
            "the training diverged: a loss or gradient is not a finite number",
            "Lower the learning rate or lengthen the warm-up and train again.",
        ),
        "AG-RCP-034": ErrorCode(
            "a training snapshot or the data is not that of the run",
            "Resume with the plan and data that the run began with, or make a new donation.",
        ),
        "AG-RCP-035": ErrorCode(
            "a training plan is out of range",
            "Check steps, batch size, learning rate, window length and the options of the kind.",
        ),
        "AG-RCP-036": ErrorCode(
            "a prompt cannot be served here",
            "A prompt fits exactly its own base, is the only one, and needs free positions and a "
            "growing cache that began with it; detach it, or give the whole text again.",
        ),
        # --- AG-EVA: evaluation, trial and gate at the recipient ---
        "AG-EVA-001": ErrorCode(
            "there are too few documents to judge a packet",
            "Give the model more held-out and retention documents; duplicates count once.",
        ),
        "AG-EVA-002": ErrorCode(
            "the model's loss on a document is not a finite number",
            "Check the model by itself first; with a packet attached, the packet is refused.",
        ),
        "AG-EVA-003": ErrorCode(
            "detaching did not restore the model bit for bit",
            "Reload the model from disk before use, and report the recipe: this is a defect.",
        ),
        "AG-EVA-004": ErrorCode(
            "a trial report is malformed",
            "Run the trial again; reports are written by the trial only.",
        ),
        "AG-EVA-005": ErrorCode(
            "a screen report is malformed",
            "Run the trial again; reports are written by the screens only.",
        ),
        "AG-EVA-006": ErrorCode(
            "baselines are out of order, so nothing may be compared",
            "Train longer or at other rates until full fine-tuning <= LoRA < zero-shot; figures "
            "beside broken baselines say nothing.",
        ),
        # --- AG-DEM: the demo ---
        "AG-DEM-001": ErrorCode(
            "a command of the demo failed",
            "The cause names the command and its own error; `--keep DIR` leaves the logs in DIR.",
        ),
        "AG-DEM-002": ErrorCode(
            "a program of the demo is missing or did not end in time",
            "Start it with `make demo`; on a busy machine try again when there is less to do.",
        ),
        "AG-DEM-003": ErrorCode(
            "a daemon of the demo ended or does not answer",
            "The cause shows its last line; `--keep DIR` leaves the logs in DIR.",
        ),
        "AG-DEM-004": ErrorCode(
            "an attack of the demo succeeded",
            "This is a defect in a security mechanism; please report it.",
        ),
        "AG-DEM-010": ErrorCode(
            "a text file given to the demo is unusable",
            "Give UTF-8 text or JSONL with a `text` field, at least a few hundred documents.",
        ),
        "AG-DEM-011": ErrorCode(
            "the base model given to the demo is unusable",
            "Give a local directory of a causal language model with its tokenizer.",
        ),
        "AG-DEM-012": ErrorCode(
            "a model of the demo could not be trained",
            "Read stranger.log in the demo's directory; memory or disk may have run out.",
        ),
    }
)
