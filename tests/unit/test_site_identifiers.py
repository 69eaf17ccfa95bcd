# SPDX-License-Identifier: Apache-2.0
"""The site's own list of identifiers: in every scan of what leaves, or nothing leaves."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from allograft.crypto import canonical, dsse
from allograft.errors import RejectedError, UnavailableError
from allograft.packet import container, kinds
from allograft.packet.kinds import Kind
from allograft.privacy import gates, scan
from allograft.privacy.dossier import verify_dossier
from allograft.privacy.release import check_release
from allograft.privacy.wordlist import common_words
from allograft_client import dispatcher, donor, identifiers
from allograft_client.card import publish_card
from allograft_client.jobs import run_job
from allograft_client.plan_files import sign_draft
from allograft_client.protected import ProtectedRun
from kit.donations import (
    A,
    B,
    donate,
    donation_of,
    name_list,
    open_private,
    planned,
    public_text,
    refusal,
    send,
    state,
    write_list,
)

NAME = "Zoltan Bergmann"


@pytest.fixture
def two(tmp_path):
    consortium = open_private(tmp_path)
    yield consortium
    consortium.close()


def written(two, packet_id) -> str:
    """Everything that the site signed about a packet, and everything it sent, in the clear."""
    lines = two[A].site.packet_path(packet_id, "attestations.jsonl").read_bytes()
    contents = list(container.split_attestations(lines))
    contents += [content for _, _, files in two.sent for content in files.values()]
    payloads = []
    for content in contents:
        payloads.append(content)
        if content.startswith(b'{"payload"'):
            payloads.append(dsse.Envelope.from_bytes(content).payload)
    return b"\n".join(payloads).decode("utf-8", "replace")


def gate_figures(two, packet_id) -> dict[str, float]:
    envelope = two[A].site.packet_path(packet_id, "dossier.json").read_bytes()
    dossier = verify_dossier(envelope, [two[A].keys["signing"].public])
    return dict(next(gate for gate in dossier.gates if gate.name == "G2").figures)


class TestUse:
    def test_a_clean_packet_leaves_and_says_that_a_list_was_used(self, two) -> None:
        write_list(two[A], f"name,birth date\n{NAME},1962-04-17\n")
        packet_id = donate(two, planned(two[A]))
        send(two, packet_id)
        assert state(two, B, packet_id) == ("kept", "")
        assert gate_figures(two, packet_id)["identifier-list"] == 1
        facts = two[A].site.store.packet(packet_id).facts
        assert facts["identifier_list"] == {"skipped": 1}

    def test_neither_its_content_nor_its_size_leaves(self, two) -> None:
        rows = "".join(f"Quill{chr(97 + n)} Bergmann,1962-04-17\n" for n in range(23))
        write_list(two[A], f"name,birth date\n{rows}")
        packet_id = donate(two, planned(two[A]))
        send(two, packet_id)
        text = written(two, packet_id)
        assert two[A].site.store.packet(packet_id).facts["identifier_list"] == {"skipped": 23}
        assert '"identifier-list":1' in text
        assert "skipped" not in text
        assert "Bergmann" not in text
        assert set(gate_figures(two, packet_id)) == {"identifier-list", "strings"}

    def test_a_listed_name_in_what_a_person_writes_stops_the_packet(self, two) -> None:
        write_list(two[A], NAME)
        named = replace(two[A].plan(), domain="letters about zoltan bergmann")
        packet_id, _ = donor.plan_donation(two[A].site, named)
        two.step()
        row = two[A].site.store.packet(packet_id)
        assert (row.state, row.code) == ("refused", "AG-PRV-020")
        assert "AG-PRV-021: statement: 3 listed-name" in row.reason
        assert "ergmann" not in row.reason
        assert two.sent == []

    def test_a_listed_name_in_a_plan_stops_its_signature(self, two) -> None:
        write_list(two[A], NAME)
        plan = planned(two[A], signed=False, purpose="for Bergmann")
        assert refusal(sign_draft, two[A].site, plan.plan_id) == "AG-PRV-021"

    @pytest.mark.parametrize("document", ["card", "approval", "offer", "dispatch"])
    def test_it_is_asked_for_every_document(self, two, document: str) -> None:
        site = two[A].site
        if document == "card":
            two[A].add_model("bergmann", two.base)
            write_list(two[A], NAME)
            assert refusal(publish_card, two[A].site) == "AG-PRV-021"
            return
        packet_id = donate(two, planned(two[A]))
        write_list(
            two[A], {"approval": "officer", "offer": "discharge", "dispatch": "gone"}[document]
        )
        words = common_words() - {"officer", "discharge", "gone"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("allograft.privacy.identifiers.common_words", lambda: words)
            if document == "dispatch":
                signed = dsse.sign(b'{"header":"gone"}', dsse.IN_TOTO, [site.key]).to_bytes()
                about = {"packet_id": packet_id}
                code = refusal(two[A].site.logged, "dispatch", "dispatch", signed, about)
            elif document == "approval":
                code = refusal(dispatcher.approve_packet, two[A].site, packet_id, "officer")
            else:
                dispatcher.approve_packet(two[A].site, packet_id, "officer")
                code = refusal(dispatcher.approve_packet, two[A].site, packet_id, "steward")
        assert code == "AG-PRV-021"
        assert two.sent == []

    def test_a_list_that_changed_is_read_again(self, two) -> None:
        path = write_list(two[A], NAME)
        assert scan.scan_texts(["okafor came"], matchers=two[A].site.matchers) == {}
        path.write_text(f"{NAME}\nAda Okafor\n", "utf-8")
        assert scan.scan_texts(["okafor came"], matchers=two[A].site.matchers)

    def test_an_unchanged_list_is_built_once(self, two, monkeypatch) -> None:
        write_list(two[A], NAME)
        read, whole = [], identifiers.read_identifiers
        identifiers._build.cache_clear()
        monkeypatch.setattr(
            identifiers, "read_identifiers", lambda path: read.append(path) or whole(path)
        )
        donate(two, planned(two[A]))
        assert len(read) == 1


class TestOwnWords:
    """Patients are called Gates, Lora and Gemma; our documents hold these words by themselves."""

    def test_no_document_is_stopped_by_its_own_words(self, two, monkeypatch) -> None:
        seen: set[str] = set()
        whole = scan.scan_texts

        def spy(texts, **options):
            texts = list(texts)
            seen.update(texts)
            return whole(texts, **options)

        for module in (scan, gates):
            monkeypatch.setattr(module, "scan_texts", spy)
        publish_card(two[A].site)
        send(two, donate(two, planned(two[A])))
        chosen = {"steward", "wards"}  # a role and a domain, which the site's people named
        words = {
            word
            for text in seen
            for word in re.findall(r"[^\W\d_]+", text)
            if len(word) > 2 and word.casefold() not in common_words() | chosen
        }
        assert {"gates", "norms", "llama"} <= words
        two.sent.clear()
        write_list(two[A], "\n".join(sorted(words)))
        packet_id = donate(two, planned(two[A], created="2026-11-27T09:00:00Z"))
        assert state(two, A, packet_id) == ("awaiting-approval", "")
        send(two, packet_id)
        assert state(two, B, packet_id) == ("kept", "")
        dispatcher.withdraw_packet(two[A].site, packet_id)

    @pytest.mark.parametrize("name", ["lora", "gemma3_text", "mistral", "qwen2", "q_proj",
                                      "model.layers.11.self_attn.q_proj.weight", "2.13.0+cpu",
                                      "exposure_p.16", "urn:allograft:site:hospital-a",
                                      "hospital-b"])  # fmt: skip
    def test_whole_strings_of_ours_pass_and_sentences_do_not(self, two, name: str) -> None:
        write_list(two[A], "Lora\nGemma\nMistral\nQwen\nProj\nCpu\nExposure\nHospitala Hospitalb\n")
        matchers = two[A].site.matchers
        assert scan.scan_texts([name], matchers=matchers) == {}
        assert scan.scan_texts(["a letter about lora"], matchers=matchers)
        assert scan.scan_texts(["Lora"], matchers=matchers)

    def test_a_party_called_like_a_patient_passes_alone(self, two) -> None:
        two.change(sites={**two.roster.sites, "okafor": two.roster.sites[B]})
        write_list(two[A], "Ada Okafor")
        matchers = two[A].site.matchers
        assert scan.scan_texts(["okafor"], matchers=matchers) == {}
        assert scan.scan_texts(["by okafor"], matchers=matchers)


class TestFailsClosed:
    def test_a_list_that_is_gone_stops_a_donation_before_training(self, two) -> None:
        plan = planned(two[A])
        write_list(two[A], NAME).unlink()
        with pytest.raises(UnavailableError, match="AG-STO-005"):
            donate(two, plan)
        assert two[A].runner.tasks == []

    @pytest.mark.parametrize(
        ("content", "code"), [(b"\xff\xfe", "AG-PRV-070"), (b"1962-04-17\n", "AG-PRV-071")]
    )
    def test_an_unusable_list_stops_a_donation_before_training(self, two, content, code) -> None:
        plan = planned(two[A])
        write_list(two[A], NAME).write_bytes(content)
        packet_id = donate(two, plan)
        assert state(two, A, packet_id) == ("refused", code)
        assert two[A].runner.tasks == []

    def test_a_list_that_vanishes_during_training_leaves_no_dossier(self, two, monkeypatch) -> None:
        path = write_list(two[A], NAME)
        content, whole = path.read_bytes(), ProtectedRun.judge

        def vanish(run, result, thresholds):
            path.unlink()
            return whole(run, result, thresholds)

        monkeypatch.setattr(ProtectedRun, "judge", vanish)
        packet_id, _ = donor.plan_donation(two[A].site, donation_of(two[A], planned(two[A])))
        job = two[A].site.store.next_job("heavy")
        assert not run_job(two[A].site, job)
        assert two[A].site.store.job(job.number).code == "AG-STO-005"
        assert not two[A].site.packet_path(packet_id, "dossier.json").exists()
        monkeypatch.undo()
        path.write_bytes(content)
        two.step()
        assert state(two, A, packet_id) == ("awaiting-approval", "")
        assert len(two[A].runner.done("train")) == 1

    @pytest.mark.parametrize("content", [None, b"\xff\xfe", b"1962-04-17\n"])
    def test_without_it_nothing_is_announced(self, two, content) -> None:
        packet_id = donate(two, planned(two[A]))
        path = write_list(two[A], NAME)
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        for call in (
            lambda: publish_card(two[A].site),
            lambda: dispatcher.approve_packet(two[A].site, packet_id, "officer"),
        ):
            with pytest.raises((RejectedError, UnavailableError)) as refused:
                call()
            assert refused.value.code in {"AG-STO-005", "AG-PRV-070", "AG-PRV-071"}
        assert two.sent == []

    def test_it_holds_up_no_recall_and_no_withdrawal(self, two) -> None:
        packet_id = donate(two, planned(two[A]))
        send(two, packet_id)
        assert state(two, B, packet_id) == ("kept", "")
        for name in (A, B):
            write_list(two[name], NAME).unlink()
        number = two[B].site.store.add_job("light", "approve", packet_id, {"role": "officer"})
        dispatcher.withdraw_packet(two[A].site, packet_id)
        two.step()
        asked = two[B].site.store.job(number)
        assert (asked.state, asked.code) == ("failed", "AG-STO-005")
        assert state(two, B, packet_id) == ("recalled", "")
        assert not two[B].site.store.attachments("base")
        assert two.sent[-1][1] == "receipt"


class TestPolicy:
    def test_mode_measured_needs_a_list(self, two) -> None:
        plan = planned(two[A], "measured")
        name_list(two[A], "")
        assert refusal(donate, two, plan) == "AG-PRV-016"
        write_list(two[A], NAME)
        assert state(two, A, donate(two, plan)) == ("awaiting-approval", "")

    def test_a_dossier_without_a_list_is_not_sealed_under_a_policy_that_demands_one(
        self, two
    ) -> None:
        name_list(two[A], "")
        packet_id = donate(two, planned(two[A]))
        for role in ("officer", "steward"):
            dispatcher.approve_packet(two[A].site, packet_id, role)
            two.step()
        site = two[A].site
        policy = site.policy()
        demanding = policy.audit.model_copy(update={"identifier_list": ("strict",)})
        changed = replace(policy, audit=demanding)
        dossier = dispatcher._dossier(site, packet_id)
        bound = replace(dossier, conditions_digest=changed.conditions_digest)
        approvals = dispatcher._approvals(site, packet_id)
        code = refusal(check_release, dossier.mode, changed, bound, approvals, [B])
        assert code == "AG-PRV-016"


class TestCorpus:
    """No kind has text parts yet; the day one has, passages of the records are looked for."""

    def test_kinds_of_today_index_nothing(self, two) -> None:
        assert not any(gates.holds_text(name) for name in kinds.KINDS)

    def test_a_kind_with_text_is_compared_with_the_records(self, two, monkeypatch) -> None:
        run = ProtectedRun(
            two[A].site,
            "5" * 32,
            donation_of(two[A], planned(two[A])),
            two[A].home.root,
            lambda _: None,
        )
        assert run.corpus_matchers() == ()
        notes = Kind("organ", ("records.jsonl",))
        monkeypatch.setattr(gates, "find_kind", lambda _: notes)
        private = "he fell from the red barn roof while mending a kite"
        run._donation.data.write_text(
            canonical.dumps({"person": "p1", "text": private}).decode(), "utf-8"
        )
        (overlap,) = run.corpus_matchers()
        assert overlap.count(f"it says: {private}") == {"private-passage": 4}
        assert overlap.count(public_text(3)) == {}
