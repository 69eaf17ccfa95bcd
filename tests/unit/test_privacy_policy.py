# SPDX-License-Identifier: Apache-2.0
"""A site's policy and the privacy modes."""

import os
from pathlib import Path

import pytest

from allograft.errors import RejectedError
from allograft.privacy.modes import Declaration, Mode, Nature, admit_mode, declare
from allograft.privacy.policy import Reception, parse_policy, read_policy

FULL = b"""
version = 1
[donate]
modes = ["open"]
kinds = ["organ", "lora"]
recipients = ["riverside"]
approvals = ["data-owner", "privacy-officer"]
dispatch = "automatic"
max_payload_bytes = 1000000
wire_dtype = "f32"
[receive]
donors = ["*"]
kinds = ["organ"]
modes = ["open"]
automatic_trial = true
automatic_keep = true
min_gain = 0.01
max_retention_loss = 0.1
licence = ["merge"]
[receipt]
share_figures = true
"""


def code_of(error: pytest.ExceptionInfo[RejectedError]) -> str:
    return error.value.code


def test_reads_every_field() -> None:
    policy = parse_policy(FULL)
    assert policy.donate.approvals == ("data-owner", "privacy-officer")
    assert policy.donate.wire_dtype == "f32"
    assert policy.receive.min_gain == 0.01
    assert policy.receive.automatic_keep
    assert policy.receipt.share_figures


def test_an_almost_empty_policy_allows_nothing() -> None:
    policy = parse_policy(b"version = 1\n")
    with pytest.raises(RejectedError) as error:
        policy.check_donation("open", "organ")
    assert code_of(error) == "AG-PRV-003"
    with pytest.raises(RejectedError) as error:
        policy.check_recipients(["riverside"])
    assert code_of(error) == "AG-PRV-004"
    with pytest.raises(RejectedError) as error:
        policy.check_reception(Reception("hillcrest", "organ", "open"))
    assert code_of(error) == "AG-PRV-005"
    assert not policy.receive.automatic_trial
    assert not policy.receive.automatic_keep
    assert not policy.receipt.share_figures
    assert policy.donate.dispatch == "manual"


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RejectedError) as error:
        read_policy(tmp_path / "policy.toml")
    assert code_of(error) == "AG-PRV-001"


def test_refuses_a_file_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").mkdir()
    with pytest.raises(RejectedError) as error:
        read_policy(tmp_path / "policy.toml")
    assert code_of(error) == "AG-PRV-002"


def test_a_pipe_in_place_of_the_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "policy.toml")
    with pytest.raises(RejectedError) as error:
        read_policy(tmp_path / "policy.toml")
    assert code_of(error) == "AG-PRV-002"


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "policy.toml").open("wb") as handle:
        handle.truncate(1 << 40)
    with pytest.raises(RejectedError) as error:
        read_policy(tmp_path / "policy.toml")
    assert code_of(error) == "AG-PRV-002"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version = 2\n",
        b"version = true\n",
        b"version = 1\n[donate\n",
        b"\xff\xfe",
        b"version = 1\nunknown = 1\n",
        b"version = 1\n[donate]\nmode = ['open']\n",
        b"version = 1\n[donate]\nmodes = 'open'\n",
        b"version = 1\n[donate]\nmodes = ['closed']\n",
        b"version = 1\n[donate]\nrecipients = ['Riverside']\n",
        b"version = 1\n[donate]\ndispatch = 'sometimes'\n",
        b"version = 1\n[donate]\nmax_payload_bytes = -1\n",
        b"version = 1\n[receive]\nautomatic_keep = 'no'\n",
        b"version = 1\n[receive]\nautomatic_keep = 0\n",
        b"version = 1\n[receive]\nmin_gain = -0.1\n",
        b"version = 1\n[receive]\nmin_gain = nan\n",
        b"version = 1\n[receive]\nmax_retention_loss = inf\n",
        b"version = 1\n[receive]\nlicence = ['everything']\n",
        b"version = 1\n" + b"# \n" * 40_000,
    ],
)
def test_refuses_anything_but_a_policy(content: bytes) -> None:
    with pytest.raises(RejectedError) as error:
        parse_policy(content)
    assert code_of(error) == "AG-PRV-002"


def test_a_cause_names_the_field_and_not_its_value() -> None:
    with pytest.raises(RejectedError) as error:
        parse_policy(b"version = 1\n[donate]\nrecipients = ['jane.doe@example.org']\n")
    assert "donate.recipients" in error.value.cause
    assert "jane" not in error.value.cause


def test_a_donation_must_fit_mode_kind_and_size() -> None:
    policy = parse_policy(FULL)
    policy.check_donation("open", "organ", 1_000_000)
    for mode, kind, size in [
        ("strict", "organ", 1),
        ("open", "delta", 1),
        ("open", "organ", 1_000_001),
    ]:
        with pytest.raises(RejectedError) as error:
            policy.check_donation(mode, kind, size)
        assert code_of(error) == "AG-PRV-003"


def test_a_star_stands_for_every_site_and_a_name_for_itself() -> None:
    policy = parse_policy(FULL)
    policy.check_recipients(["riverside"])
    with pytest.raises(RejectedError):
        policy.check_recipients(["riverside", "hillcrest"])
    parse_policy(FULL.replace(b'["riverside"]', b'["*"]')).check_recipients(["hillcrest"])


def test_reception_asks_for_donor_kind_mode_and_permissions() -> None:
    policy = parse_policy(FULL)
    merge = frozenset({"merge"})
    policy.check_reception(Reception("anyone", "organ", "open", merge))
    for offered in [
        Reception("anyone", "lora", "open", merge),
        Reception("anyone", "organ", "measured", merge),
        Reception("anyone", "organ", "open"),
    ]:
        with pytest.raises(RejectedError) as error:
            policy.check_reception(offered)
        assert code_of(error) == "AG-PRV-005"


def test_conditions_change_with_approvals_and_not_with_recipients() -> None:
    policy = parse_policy(FULL)
    wider = parse_policy(FULL.replace(b'["riverside"]', b'["riverside", "hillcrest"]'))
    looser = parse_policy(FULL.replace(b'["data-owner", "privacy-officer"]', b'["data-owner"]'))
    assert wider.digest != policy.digest
    assert wider.conditions_digest == policy.conditions_digest
    assert looser.conditions_digest != policy.conditions_digest


def test_open_needs_a_declaration() -> None:
    with pytest.raises(RejectedError) as error:
        admit_mode("open", None)
    assert code_of(error) == "AG-PRV-012"
    admitted = admit_mode("open", declare("synthetic", "data-owner"))
    assert admitted.mode is Mode.OPEN
    assert admitted.declaration.nature is Nature.SYNTHETIC


@pytest.mark.parametrize("name", ["strict", "measured"])
def test_no_declaration_stands_for_a_measurement(name: str) -> None:
    assert admit_mode(name, None).declaration is None
    with pytest.raises(RejectedError) as error:
        admit_mode(name, declare("synthetic", "data-owner"))
    assert code_of(error) == "AG-PRV-012"


@pytest.mark.parametrize("name", ["", "OPEN", "none", "open "])
def test_an_unknown_mode_is_refused(name: str) -> None:
    with pytest.raises(RejectedError) as error:
        admit_mode(name, declare("public", "data-owner"))
    assert code_of(error) == "AG-PRV-010"


@pytest.mark.parametrize(
    ("nature", "role"),
    [("private", "data-owner"), ("", "data-owner"), ("public", ""), ("public", "Jane Doe")],
)
def test_a_declaration_names_a_nature_and_a_role(nature: str, role: str) -> None:
    with pytest.raises(RejectedError) as error:
        declare(nature, role)
    assert code_of(error) == "AG-PRV-012"


def test_a_forged_declaration_is_checked_again() -> None:
    forged = Declaration("private", "data-owner")  # type: ignore[arg-type]
    with pytest.raises(RejectedError) as error:
        admit_mode("open", forged)
    assert code_of(error) == "AG-PRV-012"
