# SPDX-License-Identifier: Apache-2.0
"""A renamed, re-cut or filtered data set is recognised by its people, who stay unnamed."""

import pytest

from allograft.errors import AllograftError, RejectedError, UnavailableError
from allograft.privacy.population import Population

KEY = bytes(range(32))
PEOPLE = [f"patient-{number}" for number in range(100)]


@pytest.fixture
def register(tmp_path):
    register = Population(tmp_path, KEY)
    register.enrol_people("cardiology", PEOPLE)
    return register


def test_knows_the_people_of_a_filtered_data_set(register) -> None:
    assert register.find_overlap([*PEOPLE[90:], "stranger"]) == ("cardiology",)
    assert register.find_overlap(["stranger"]) == ()


def test_refuses_a_fresh_domain_for_known_people(register) -> None:
    for enrol in (register.check_people, register.enrol_people):
        with pytest.raises(RejectedError, match="AG-PRV-066") as refused:
            enrol("cardiology-2027", ["stranger", PEOPLE[5]])
        assert PEOPLE[5] not in refused.value.cause
    assert register.find_overlap(["stranger"]) == ()


def test_takes_known_and_new_people_into_their_own_domain(register) -> None:
    register.enrol_people("cardiology", [*PEOPLE[:3], "new"])
    assert register.find_overlap(["new"]) == ("cardiology",)
    assert register.find_overlap([PEOPLE[99]]) == ("cardiology",)


def test_tells_whether_domains_share_people(register, tmp_path) -> None:
    register.enrol_people("oncology", ["a", "b"])
    register.check_disjoint("cardiology", "oncology")
    with pytest.raises(RejectedError, match="AG-PRV-066"):
        register.check_disjoint("oncology", "oncology")
    with pytest.raises(RejectedError, match="AG-PRV-067"):
        register.check_disjoint("oncology", "unknown")


def test_blanks_and_composition_do_not_make_another_person(register) -> None:
    register.enrol_people("oncology", ["Zoë"])
    assert register.find_overlap([" Zoe\u0308\n"]) == ("oncology",)


def test_never_stores_an_id(register, tmp_path) -> None:
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"patient" not in content
    assert (tmp_path / "cardiology.people").stat().st_mode & 0o077 == 0


def test_refuses_a_register_of_another_key(tmp_path, register) -> None:
    with pytest.raises(RejectedError, match="AG-PRV-067"):
        Population(tmp_path, bytes(32)).find_overlap(["a"])


@pytest.mark.parametrize("damage", ["cut", "flip", "swap", "rename", "header"])
def test_refuses_a_register_that_was_changed(tmp_path, register, damage) -> None:
    path = tmp_path / "cardiology.people"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-32:]
    elif damage == "flip":
        content[-1] ^= 1
    elif damage == "swap":
        content[-64:] = content[-32:] + content[-64:-32]
    elif damage == "header":
        content = bytearray(b"x")
    path.write_bytes(content)
    if damage == "rename":
        path.rename(tmp_path / "oncology.people")
    with pytest.raises(RejectedError, match="AG-PRV-067"):
        register.find_overlap(["a"])


def test_refuses_to_judge_while_a_domain_of_the_ledger_has_no_people(tmp_path, register) -> None:
    strict = Population(tmp_path, KEY, domains=("cardiology",))
    assert strict.find_overlap(["a"]) == ()
    (tmp_path / "cardiology.people").unlink()
    with pytest.raises(RejectedError, match="AG-PRV-067"):
        strict.enrol_people("fresh", ["a"])


@pytest.mark.parametrize("person", ["", "  ", "x" * 513, "\ud800"])
def test_refuses_an_id_that_names_nobody(register, person) -> None:
    with pytest.raises(RejectedError, match="AG-IN-003"):
        register.enrol_people("cardiology", [person])


@pytest.mark.parametrize("domain", ["", "../x", "A", "x" * 64])
def test_refuses_a_domain_that_is_no_name(register, domain) -> None:
    with pytest.raises(RejectedError, match="AG-IN-003"):
        register.enrol_people(domain, ["a"])


def test_a_full_disk_enrols_nobody(register, monkeypatch) -> None:
    def full(path, content):
        raise UnavailableError("AG-STO-001", "no space")

    monkeypatch.setattr("allograft.privacy.population.durable_write", full)
    with pytest.raises(AllograftError, match="AG-STO-001"):
        register.enrol_people("cardiology", ["new"])
    assert register.find_overlap(["new"]) == ()
