# SPDX-License-Identifier: Apache-2.0
"""Claims about strict JSON and the small readers of its values."""

import tracemalloc
from datetime import UTC, datetime, timedelta, timezone

import pytest

from allograft.crypto import canonical
from allograft.errors import RejectedError

MALFORMED = {
    "empty": b"",
    "two values": b"1 2",
    "trailing comma": b"[1,]",
    "comment": b"[1] // x",
    "not UTF-8": b'"\xff"',
    "UTF-16": '"a"'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf1",
    "duplicate name": b'{"a":1,"a":2}',
    "duplicate name, once escaped": b'{"a":1,"\\u0061":2}',
    "duplicate name further down": b'[{"b":{"a":1,"a":1}}]',
    "NaN": b"NaN",
    "infinity": b"[-Infinity]",
    "a float that is infinite": b"1e400",
    "a negative float that is infinite": b"[-1e400]",
    "integer beyond 2**53": b"9007199254740992",
    "negative integer beyond 2**53": b"-9007199254740992",
    "integer of a million digits": b"1" * 1_000_000,
    "lone surrogate": b'"\\ud800"',
    "lone surrogate in a name": b'{"\\udfff":1}',
    "nested too deeply": b"[" * 40 + b"]" * 40,
    "nested beyond the interpreter": b"[" * 100_000 + b"]" * 100_000,
    "control character": b'"\x01"',
    "leading zero": b"01",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_refuses_what_two_parsers_could_understand_differently(name):
    with pytest.raises(RejectedError) as caught:
        canonical.loads(MALFORMED[name])
    assert caught.value.code == "AG-IN-001"


def test_refuses_documents_over_their_limit():
    with pytest.raises(RejectedError) as caught:
        canonical.loads(b'"aaaa"', max_bytes=5)
    assert caught.value.code == "AG-IN-002"


@pytest.mark.parametrize("piece", [b"[],", b'{"":0},', b"0,", b"[[[[]]]],"])
def test_refuses_documents_that_grow_when_they_are_parsed(piece):
    """Sixty megabytes of empty arrays take 14 seconds and 1.5 gigabytes once they are values."""
    bomb = b"[" + piece * ((16 << 20) // len(piece)) + b"0]"
    tracemalloc.start()
    with pytest.raises(RejectedError) as caught:
        canonical.loads(bomb, max_bytes=64 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.code == "AG-IN-002"
    assert peak < 1 << 20


def test_reads_a_document_of_as_many_values_as_the_largest_trial_report():
    assert len(canonical.loads(canonical.dumps([0.25] * 400_000))) == 400_000


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"9007199254740991", 2**53 - 1),
        (b' {"a" : [true, null, -0.5e1]} ', {"a": [True, None, -5.0]}),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b"[" * 31 + b"]" * 31, None),
    ],
)
def test_reads_json(content, value):
    found = canonical.loads(content)
    assert value is None or found == value


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 2**53, [{"a": 2.0**53}], -1e20, {1: 2}, b"x", "\ud800"]
)
def test_never_writes_what_it_would_not_read(value):
    with pytest.raises(ValueError, match=r".*"):
        canonical.dumps(value)


REFUSED = [
    (canonical.as_mapping, [[], "a", None]),
    (canonical.as_list, [{}, "a", None]),
    (canonical.as_text, [1, None, ["a"]]),
    (canonical.as_int, [-1, True, 1.0, "1", None]),
    (canonical.as_number, [True, "1", None, 1e301]),
    (canonical.as_bool, [1, 0, "true", None]),
    (canonical.as_sha256, ["a" * 63, "A" * 64, "a" * 64 + "\n", 1, "g" * 64]),
    (canonical.as_base64, ["!", "AAA", "AAAA\n", "A-A=", "é", None, b"AAAA"]),
    (canonical.as_random_id, ["a" * 31, "A" * 32, "a" * 33, None]),
    (canonical.as_site, ["", "-a", "a" * 64, "A", "a_b", "a/b", "a\n", "ä"]),
    (canonical.as_line, ["a\nb", "a\x00", "\u202eabc", "a" * 513, "\x7f", 1]),
]


@pytest.mark.parametrize(("reader", "values"), REFUSED, ids=lambda v: getattr(v, "__name__", ""))
def test_readers_refuse_other_values(reader, values):
    for value in values:
        with pytest.raises(RejectedError) as caught:
            reader(value)
        assert caught.value.code == "AG-IN-003"


def test_readers_return_what_they_accept():
    assert canonical.as_int(0) == 0
    assert canonical.as_number(3) == 3.0
    assert canonical.as_bool(False) is False
    assert canonical.as_base64("AAE=") == b"\x00\x01"
    assert canonical.as_site("hospital-a1") == "hospital-a1"
    assert canonical.as_line("Entlassbriefe, Kardiologie") == "Entlassbriefe, Kardiologie"


def test_objects_have_exactly_their_fields():
    assert canonical.as_object({"a": 1, "b": 2}, {"a"}, {"b"}) == {"a": 1, "b": 2}
    assert canonical.as_object({"a": 1}, {"a"}, {"b"}) == {"a": 1}
    for value in ({}, {"a": 1, "c": 1}, {"b": 1}, []):
        with pytest.raises(RejectedError) as caught:
            canonical.as_object(value, {"a"}, {"b"})
        assert caught.value.code == "AG-IN-003"


def test_times_have_one_form():
    moment = datetime(2026, 11, 23, 8, 0, 0, tzinfo=UTC)
    assert canonical.format_time(moment) == "2026-11-23T08:00:00Z"
    assert canonical.parse_time("2026-11-23T08:00:00Z") == moment
    abroad = moment.astimezone(timezone(timedelta(hours=5)))
    assert canonical.format_time(abroad) == "2026-11-23T08:00:00Z"
    for text in ("2026-11-23T08:00:00", "2026-11-23 08:00:00Z", "2026-11-23T08:00:00.5Z",
                 "2026-11-23T08:00:00+00:00", "2026-02-30T00:00:00Z", "2026-11-23T24:00:00Z",
                 "2026-11-23T08:00:00Z\n", "\u0662026-11-23T08:00:00Z", ""):  # fmt: skip
        with pytest.raises(RejectedError) as caught:
            canonical.parse_time(text)
        assert caught.value.code == "AG-IN-003"
