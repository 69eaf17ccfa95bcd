# SPDX-License-Identifier: Apache-2.0
"""Claims about the two bodies of a poll."""

import pytest

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.relay.item import Item, ItemFile
from allograft.relay.poll import Announcement, PollAnswer, PollCall, Refusal, Want

DIGEST = "a" * 64
ITEM = Item("card", "hospital-a", "consortium", (ItemFile("card.json", 2, DIGEST, (DIGEST,)),))
CALL = PollCall(
    announced=(Announcement(ITEM, {"card.json": b"{}"}), Announcement(ITEM)),
    stored=(DIGEST,),
    refused=(Refusal(DIGEST, "AG-RLY-006"),),
    checkpoint="allograft/consortium\n3\n",
    consistency=(bytes(32),),
)
ANSWER = PollAnswer(
    outbox=(Announcement(ITEM),),
    wants=(Want(DIGEST, (0, 7)),),
    done=(DIGEST,),
    refused=(Refusal(DIGEST, "AG-PKT-005"),),
    roster_version=4,
    witnessed_size=3,
    cosignature="— witness AAAA",
)


def test_calls_and_answers_survive_their_bytes():
    for body in (CALL, PollCall(), ANSWER, PollAnswer()):
        assert type(body).from_bytes(body.to_bytes()) == body


def _set(*path):
    *where, last, new = path

    def change(value):
        for step in where:
            value = value[step]
        value[last] = new

    return change


CALLS = {
    "version 2": _set("v", 2),
    "unknown field": _set("note", 1),
    "stored is text": _set("stored", "x"),
    "stored holds a number": _set("stored", [1]),
    "checkpoint is a number": _set("checkpoint", 1),
    "a hash that is not base64": _set("consistency", ["*"]),
    "a hash in another alphabet": _set("consistency", ["é"]),
    "a refusal without code": _set("refused", [{"item": DIGEST}]),
    "an announcement without item": _set("announced", [{"inline": {}}]),
    "inline files of another item": _set("announced", 0, "inline", {"other": "AAAA"}),
    "inline bytes that are not base64": _set("announced", 0, "inline", {"card.json": "*"}),
    "too many announcements": lambda v: v.update(
        announced=[v["announced"][1]] * (LIMITS.items_per_poll + 1)
    ),
}
ANSWERS = {
    "version 2": _set("v", 2),
    "wants is an object": _set("wants", {}),
    "a negative part": _set("wants", 0, "parts", [-1]),
    "a part that is true": _set("wants", 0, "parts", [True]),
    "too many parts": _set("wants", 0, "parts", list(range(LIMITS.parts_in_flight + 1))),
    "a version that is text": _set("roster_version", "4"),
    "a fractional size": _set("witnessed_size", 0.5),
    "done holds an object": _set("done", [{}]),
}


def refused(kind, content):
    with pytest.raises(RejectedError) as caught:
        kind.from_bytes(content)
    return caught.value.code


@pytest.mark.parametrize("name", CALLS)
def test_refuses_malformed_calls(name):
    value = canonical.loads(CALL.to_bytes())
    CALLS[name](value)
    assert refused(PollCall, canonical.dumps(value)) == "AG-RLY-001"


@pytest.mark.parametrize("name", ANSWERS)
def test_refuses_malformed_answers(name):
    value = canonical.loads(ANSWER.to_bytes())
    ANSWERS[name](value)
    assert refused(PollAnswer, canonical.dumps(value)) == "AG-RLY-001"


@pytest.mark.parametrize("content", [b"", b"[]", b'{"v":1}', b" " * (LIMITS.poll_bytes + 1)])
def test_refuses_bodies_that_are_no_poll(content):
    assert refused(PollCall, content) == "AG-RLY-001"
    assert refused(PollAnswer, content) == "AG-RLY-001"
