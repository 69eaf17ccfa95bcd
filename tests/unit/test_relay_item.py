# SPDX-License-Identifier: Apache-2.0
"""Claims about items: files described by digests, and parts of bounded size."""

import hashlib

import pytest

from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.relay import item
from allograft.relay.item import Item

PART = LIMITS.part_bytes


@pytest.fixture
def described(tmp_path):
    (tmp_path / "b.sealed").write_bytes(b"b" * (2 * PART + 5))
    (tmp_path / "a.json").write_bytes(b"{}")
    (tmp_path / "empty").write_bytes(b"")
    paths = [tmp_path / name for name in ("b.sealed", "empty", "a.json")]
    return item.describe_item("dispatch", "hospital-a", "consortium", paths), tmp_path


def test_describes_files_in_the_order_of_their_names(described):
    whole, folder = described
    assert [file.name for file in whole.files] == ["a.json", "b.sealed", "empty"]
    assert whole.part_count == 4
    assert whole.size_bytes == 2 * PART + 7
    expected = hashlib.sha256((folder / "b.sealed").read_bytes()).hexdigest()
    assert whole.files[1].sha256 == expected


def test_its_id_is_the_digest_of_its_description(described):
    whole, folder = described
    assert whole.item_id == hashlib.sha256(whole.to_bytes()).hexdigest()
    reordered = item.describe_item(
        "dispatch", "hospital-a", "consortium", sorted(folder.iterdir(), reverse=True)
    )
    assert reordered.item_id == whole.item_id
    assert Item.from_json(whole.to_json()) == whole


def test_parts_cover_every_byte_once(described):
    whole, folder = described
    content = {file.name: bytearray() for file in whole.files}
    for index in range(whole.part_count):
        part = whole.part(index)
        with (folder / part.file.name).open("rb") as handle:
            handle.seek(part.offset)
            piece = handle.read(part.size_bytes)
        item.check_part(part, piece)
        assert len(content[part.file.name]) == part.offset
        content[part.file.name] += piece
    for name, found in content.items():
        assert found == (folder / name).read_bytes()


@pytest.mark.parametrize("index", [-1, 4, 1000])
def test_parts_outside_the_item_are_refused(described, index):
    with pytest.raises(RejectedError) as caught:
        described[0].part(index)
    assert caught.value.code == "AG-RLY-001"


def test_a_changed_part_is_refused(described):
    part = described[0].part(3)
    for content in (b"bbbbX", b"bbbb", b"bbbbbb", b""):
        with pytest.raises(RejectedError) as caught:
            item.check_part(part, content)
        assert caught.value.code == "AG-RLY-005"


def test_small_items_travel_inline_and_large_ones_do_not(described, tmp_path):
    whole, folder = described
    assert item.inline_files(whole, folder) == {}
    small = item.describe_item("card", "hospital-a", "consortium", [folder / "a.json"])
    assert item.inline_files(small, folder) == {"a.json": b"{}"}


def _set(*path):
    *where, last, new = path

    def change(value):
        for step in where:
            value = value[step]
        value[last] = new

    return change


DIGEST = "a" * 64
CHANGES = {
    "version 2": (_set("v", 2), "AG-RLY-001"),
    "kind is a number": (_set("kind", 1), "AG-RLY-001"),
    "unknown field": (_set("note", ""), "AG-RLY-001"),
    "a path": (_set("files", 0, "name", "../a"), "AG-RLY-001"),
    "a hidden file": (_set("files", 0, "name", ".a"), "AG-RLY-001"),
    "a newline": (_set("files", 0, "name", "a\n"), "AG-RLY-001"),
    "a negative size": (_set("files", 0, "bytes", -1), "AG-RLY-001"),
    "a part too few": (_set("files", 1, "parts", [DIGEST]), "AG-RLY-001"),
    "a part too many": (_set("files", 1, "parts", [DIGEST] * 4), "AG-RLY-001"),
    "parts of an empty file": (_set("files", 2, "parts", [DIGEST]), "AG-RLY-001"),
    "a digest in capitals": (_set("files", 0, "sha256", "A" * 64), "AG-RLY-001"),
    "a short part digest": (_set("files", 0, "parts", ["aa"]), "AG-RLY-001"),
    "two files of one name": (_set("files", 0, "name", "b.sealed"), "AG-RLY-001"),
    "too many files": (
        lambda v: v.update(files=[{**v["files"][2], "name": f"f{n}"}
                                  for n in range(LIMITS.item_files + 1)]), "AG-RLY-006"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_refuses_malformed_descriptions(described, name):
    change, code = CHANGES[name]
    value = described[0].to_json()
    change(value)
    with pytest.raises(RejectedError) as caught:
        Item.from_json(value)
    assert caught.value.code == code


def test_refuses_items_over_the_payload_limit(described):
    value = described[0].to_json()
    size = LIMITS.packet_payload_bytes + 1
    value["files"][1] |= {"bytes": size, "parts": [DIGEST] * -(-size // PART)}
    with pytest.raises(RejectedError) as caught:
        Item.from_json(value)
    assert caught.value.code == "AG-RLY-006"
