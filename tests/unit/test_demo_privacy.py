# SPDX-License-Identifier: Apache-2.0
"""The privacy demo's search for patients outside the donor's house."""

import pytest

from allograft.cli.demo.privacy import find_numbers
from allograft.crypto import dsse
from allograft.crypto.keys import SigningKey

NUMBERS = frozenset({b"12345678", b"87654321"})


@pytest.mark.parametrize(
    "content", [b"Hospital record 12345678.", b"\x00\xff12345678\n", b'{"a":"12345678"}']
)
def test_finds_a_number_in_plain_bytes(content: bytes) -> None:
    assert find_numbers(content, NUMBERS) == {b"12345678"}


def test_finds_a_number_inside_a_signed_document() -> None:
    signed = dsse.sign(b'{"domain":"record 87654321"}', dsse.IN_TOTO, [SigningKey.generate()])
    assert b"87654321" not in signed.to_bytes()
    assert find_numbers(b"x\n" + signed.to_bytes() + b"\ny", NUMBERS) == {b"87654321"}


@pytest.mark.parametrize("content", [b"", b"99912345678", b"ab12345678cd", b"1234567", b"00000000"])
def test_takes_nothing_else_for_one(content: bytes) -> None:
    assert find_numbers(content, NUMBERS) == set()
