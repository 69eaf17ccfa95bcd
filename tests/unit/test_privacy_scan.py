# SPDX-License-Identifier: Apache-2.0
"""The text scan finds identifiers and lets ordinary text pass."""

import pytest

from allograft.errors import RejectedError
from allograft.privacy import scan


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("write to jane.doe@clinic.example", "email"),
        ("https://jane:secret@host.example/a", "url-user"),
        ("https://host.example/users/jane", "url-user"),
        ("from 192.168.10.4 last night", "ipv4"),
        ("2001:0db8:85a3:0000:0000:8a2e:0370:7334", "ipv6"),
        ("card 4111 1111 1111 1111 declined", "payment-card"),
        ("GB82 WEST 1234 5698 7654 32", "iban"),
        ("943 476 5919", "nhs-number"),
        ("9434765919", "nhs-number"),
        ("078-05-1120", "us-ssn"),
        ("+44 20 7946 0958", "phone"),
        ("(415) 555-2671", "phone"),
        ("415-555-2671", "phone"),
        ("MRN 0043219", "record-number"),
        ("hospital number: AB12345", "record-number"),
        ("1EG4-TE5-MK73", "medicare-mbi"),
        ("lives near SW1A 1AA", "uk-postcode"),
        ("seen by Dr Okafor", "titled-name"),
        ("seen by Mrs. O\u2019Neill", "titled-name"),
        ("reference 00417299315", "long-number"),
    ],
)
def test_finds(text: str, rule: str) -> None:
    assert rule in scan.scan_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",  # fails Luhn (a long number all the same)
        "0000 0000 0000 0000",
    ],
)
def test_a_number_that_fails_its_checksum_is_no_card(text: str) -> None:
    assert "payment-card" not in scan.scan_text(text)


def test_checksums_decide() -> None:
    assert scan.iban_holds("DE89 3704 0044 0532 0130 00")
    assert not scan.iban_holds("DE88 3704 0044 0532 0130 00")
    assert scan.nhs_holds("943 476 5919")
    assert not scan.nhs_holds("943 476 5918")
    assert scan.luhn_holds("5500-0000-0000-0004")
    assert not scan.ssn_holds("666-12-1234")


@pytest.mark.parametrize(
    "text",
    [
        "questions and answers about kidney disease",
        "type 2 diabetes in adults, 4000 notes of 2019",
        "model.layers.3.self_attn.q_proj.weight",
        "LlamaForCausalLM with 12 blocks of width 4096",
        "trained for 400 steps at 0.001, loss 1.8732 to 1.2015",
        "torch 2.13.0 and transformers 5.23.1",
        "dose 0.25, 0.5 and 1.0",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    ],
)
def test_lets_ordinary_text_pass(text: str) -> None:
    assert scan.scan_text(text) == {}


@pytest.mark.parametrize(
    "text", ["2021-03-04", "04/03/2021", "12 March", "March 12th", "March 2021", "4.3.21"]
)
def test_finds_dates_only_where_asked(text: str) -> None:
    assert "date" in scan.scan_text(text, dates=True)
    assert "date" not in scan.scan_text(text)


def test_a_year_alone_is_no_date() -> None:
    assert scan.scan_text("notes of 2019", dates=True) == {}


def test_machine_values_are_left_out_and_field_names_are_not() -> None:
    document = {
        "packet_id": "0" * 32,
        "created": "2026-11-23T08:00:00Z",
        "predicateType": "urn:allograft:packet:v1",
        "jane@clinic.example": ["notes", {"deep": "more"}],
    }
    assert sorted(scan.strings_of(document)) == [
        "created", "deep", "jane@clinic.example", "more", "notes", "packet_id", "predicateType",
    ]  # fmt: skip


def test_a_refusal_counts_and_never_quotes() -> None:
    with pytest.raises(RejectedError) as error:
        scan.check_strings({"domain": "notes of Mrs Example, 078-05-1120"}, "the offer")
    assert error.value.code == "AG-PRV-021"
    assert "the offer" in error.value.cause
    assert "1 us-ssn" in error.value.cause
    assert "Example" not in error.value.cause
    assert "1120" not in error.value.cause


def test_counts_add_up_over_texts() -> None:
    counts = scan.scan_texts(["a@b.example and c@d.example", "e@f.example"])
    assert counts == {"email": 3}
    assert scan.describe_counts(counts) == "3 email"


def test_the_rule_set_has_a_stable_digest() -> None:
    assert scan.rules_digest() == scan.rules_digest()
    assert len(scan.rules_digest()) == 64
