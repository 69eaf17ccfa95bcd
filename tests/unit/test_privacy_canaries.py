# SPDX-License-Identifier: Apache-2.0
"""Canaries and the split of persons: made by chance, from public text, and kept private."""

import random
import stat
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.privacy.canaries import (
    CANARY_PREFIX,
    CanaryPlan,
    CanaryRecord,
    PersonSplit,
    Style,
    make_canaries,
    split_persons,
)
from allograft.privacy.people import People, read_people

PUBLIC = [
    " ".join(f"w{(7 * text + 3 * place) % 211}" for place in range(12)) + ". "
    + " ".join(f"v{(5 * text + place) % 97}" for place in range(12)) + "."
    for text in range(120)
]  # fmt: skip
SMALL = CanaryPlan(coins=200, per_level=3, references=20)


@pytest.fixture
def made():
    return make_canaries(PUBLIC, SMALL)


class TestCanaries:
    def test_planted_are_the_included_coins_and_every_repeat(self, made) -> None:
        planted, record = made
        expected = Counter(c.text for c in record.coins if c.included)
        expected.update({c.text: c.repeats for c in record.repeated})
        assert Counter(document.text for document in planted) == expected

    def test_every_copy_is_a_person_of_its_own_whom_nobody_else_can_be(self, made) -> None:
        planted, _ = made
        persons = [document.person for document in planted]
        assert len(set(persons)) == len(persons)
        assert all(person.startswith(CANARY_PREFIX) for person in persons)
        with pytest.raises(RejectedError, match="AG-IN-003"):
            split_persons(["p1", persons[0]], 0.2)

    def test_they_are_made_of_public_words_and_are_no_public_text(self, made) -> None:
        _, record = made
        words = {word for text in PUBLIC for word in text.split()}
        texts = [c.text for c in record.coins]
        texts += [t for c in record.repeated for t in (c.text, *c.reference_texts)]
        assert all(set(text.split()) <= words for text in texts)
        assert not set(texts) & set(PUBLIC)

    def test_no_two_are_alike(self, made) -> None:
        _, record = made
        texts = [c.text for c in record.coins] + [c.text for c in record.repeated]
        assert len(set(texts)) == len(texts)
        for canary in record.repeated:
            assert len({canary.suffix, *canary.alternatives}) == 21

    def test_half_are_of_each_style_and_about_half_are_in(self, made) -> None:
        _, record = made
        assert Counter(c.style for c in record.coins) == dict.fromkeys(Style, 100)
        # Six standard deviations of two hundred fair coins.
        assert 57 < sum(c.included for c in record.coins) < 143

    def test_levels_have_their_number_of_canaries(self, made) -> None:
        _, record = made
        assert Counter(c.repeats for c in record.repeated) == dict.fromkeys((1, 4, 16), 3)

    def test_two_runs_share_no_coins(self, made) -> None:
        _, first = made
        _, second = make_canaries(PUBLIC, SMALL)
        assert first != second

    def test_randomness_is_an_argument(self) -> None:
        first = make_canaries(PUBLIC, SMALL, random.Random(4))
        assert first == make_canaries(PUBLIC, SMALL, random.Random(4))
        assert first != make_canaries(PUBLIC, SMALL, random.Random(5))

    def test_coins_do_not_follow_the_order(self) -> None:
        _, record = make_canaries(PUBLIC, replace(SMALL, coins=1000), random.Random(1))
        halves = [
            sum(c.included for c in part) for part in (record.coins[:500], record.coins[500:])
        ]
        assert all(200 < half < 300 for half in halves)

    @pytest.mark.parametrize(
        "public", [[], ["too little."], ["the same words again and again " * 9] * 50]
    )
    def test_too_little_public_text_is_refused(self, public: list[str]) -> None:
        with pytest.raises(RejectedError, match="AG-PRV-079"):
            make_canaries(public, SMALL)

    def test_texts_run_out_rather_than_repeat(self) -> None:
        few = [" ".join(PUBLIC[0].split()[:17]) + f" only{n}." for n in range(60)]
        with pytest.raises(RejectedError, match="AG-PRV-079"):
            make_canaries(few, replace(SMALL, coins=1000, body_sentences=1))

    @pytest.mark.parametrize(
        "change",
        [
            {"coins": -1}, {"per_level": 0}, {"references": 0}, {"suffix_words": 3},
            {"repeats": (2, 1)}, {"repeats": (1, 1)}, {"repeats": (0, 1)}, {"repeats": (5000,)},
        ],
    )  # fmt: skip
    def test_plans_out_of_range_are_refused(self, change: dict) -> None:
        with pytest.raises(RejectedError, match="AG-IN-003"):
            make_canaries(PUBLIC, replace(SMALL, **change))


def people_with(record: CanaryRecord) -> People:
    return People(PersonSplit((), ()), (), record, (), ())


class TestRecord:
    def test_comes_back_as_it_was(self, made, tmp_path: Path) -> None:
        _, record = made
        path = tmp_path / "people.json"
        people_with(record).save(path)
        assert read_people(path).canaries == record

    def test_only_its_owner_can_read_it(self, made, tmp_path: Path) -> None:
        path = tmp_path / "people.json"
        people_with(made[1]).save(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    @pytest.mark.parametrize(
        "content",
        [
            "{}",
            "[",
            '{"schema": "other", "coins": [], "repeated": []}',
            '{"schema": "allograft.canaries.v1", "coins": [{}], "repeated": []}',
            '{"schema": "allograft.canaries.v1", "coins": [{"style": "x", "text": "t", '
            '"included": true}], "repeated": []}',
            '{"schema": "allograft.canaries.v1", "coins": [{"style": "random-suffix", "text": "t", '
            '"included": 1}], "repeated": []}',
        ],
    )
    def test_anything_else_is_refused(self, content: str, tmp_path: Path) -> None:
        path = tmp_path / "people.json"
        people_with(CanaryRecord(())).save(path)
        written = canonical.dumps(CanaryRecord(()).to_json())
        path.write_bytes(path.read_bytes().replace(written, content.encode()))
        assert content.encode() in path.read_bytes()
        with pytest.raises(RejectedError, match="AG-IN"):
            read_people(path)

    def test_an_empty_record_is_a_record(self) -> None:
        empty = CanaryRecord(())
        assert CanaryRecord.from_json(empty.to_json()) == empty


class TestSplit:
    def test_everybody_is_on_one_side(self) -> None:
        persons = [f"p{number}" for number in range(500)]
        split = split_persons([*persons, *persons], 0.2)
        assert sorted(split.train + split.holdout) == sorted(persons)
        assert 46 < len(split.holdout) < 154  # six standard deviations

    def test_it_follows_from_coins_and_not_from_the_order_of_the_data(self) -> None:
        persons = [f"p{number}" for number in range(100)]
        assert split_persons(persons, 0.5) != split_persons(persons, 0.5)
        forwards = split_persons(persons, 0.5, random.Random(1))
        assert forwards == split_persons(persons[::-1], 0.5, random.Random(1))

    @pytest.mark.parametrize("holdout", [0.0, 1.0, -0.1, float("nan")])
    def test_a_chance_that_is_none_is_refused(self, holdout: float) -> None:
        with pytest.raises(RejectedError, match="AG-IN-003"):
            split_persons(["p1"], holdout)

    def test_comes_back_as_it_was(self) -> None:
        split = split_persons(["p1", "p2", "p3"], 0.5)
        assert PersonSplit.from_json(split.to_json()) == split
        with pytest.raises(RejectedError, match="twice"):
            PersonSplit.from_json({"train": ["p1"], "holdout": ["p1"]})
