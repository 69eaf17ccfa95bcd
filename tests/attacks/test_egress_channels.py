# SPDX-License-Identifier: Apache-2.0
"""An insider tries to carry text out of a site inside a payload or its documents."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from allograft.errors import RejectedError
from allograft.packet.tensors import check_file, read_table, read_tensor
from allograft.privacy import egress, gates, scan
from allograft.privacy.dossier import GateVerdict
from kit.releases import ALLOWED, PACKET, write_extract

SECRET = b"Jane Example has condition X. " * 8


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "payload").mkdir()
    return tmp_path / "payload" / "organ.safetensors"


def test_text_in_metadata_does_not_leave(tmp_path: Path, target: Path) -> None:
    tensors = write_extract(tmp_path / "extract")
    metadata = {"note": SECRET.decode()}
    safetensors.numpy.save_file(tensors, tmp_path / "extract", metadata=metadata)
    assert b"Jane" in (tmp_path / "extract").read_bytes()
    egress.rebuild_file(tmp_path / "extract", target, ALLOWED)
    assert b"Jane" not in target.read_bytes()
    with target.open("rb") as handle:
        check_file(handle)


def test_the_order_of_tensors_in_a_file_carries_nothing(tmp_path: Path, target: Path) -> None:
    """Two files with the same values in another order become the same bytes."""
    tensors = write_extract(tmp_path / "x")
    content = {n: t.astype("<f4").tobytes() for n, t in tensors.items()}
    rebuilt = []
    for order in (sorted(content), sorted(content, reverse=True)):
        offset, header = 0, {}
        for name in order:
            end = offset + len(content[name])
            header[name] = {
                "dtype": "F32",
                "shape": list(tensors[name].shape),
                "data_offsets": [offset, end],
            }
            offset = end
        head = json.dumps(header).encode()
        data = b"".join(content[name] for name in order)
        (tmp_path / "extract").write_bytes(len(head).to_bytes(8, "little") + head + data)
        egress.rebuild_file(tmp_path / "extract", target, ALLOWED, "f32")
        rebuilt.append(target.read_bytes())
    assert rebuilt[0] == rebuilt[1]


def test_an_extra_tensor_does_not_leave(tmp_path: Path, target: Path) -> None:
    smuggled = np.frombuffer(SECRET, dtype=np.uint8).astype(np.float32)
    write_extract(tmp_path / "extract", **{"blocks.0.extra": smuggled})
    with pytest.raises(RejectedError) as error:
        egress.rebuild_file(tmp_path / "extract", target, ALLOWED)
    assert error.value.code == "AG-PRV-040"
    assert not target.exists()


def test_a_tensor_name_cannot_carry_text(tmp_path: Path, target: Path) -> None:
    write_extract(tmp_path / "extract", **{"Jane-Example": np.zeros(1, np.float32)})
    with pytest.raises(RejectedError) as error:
        egress.rebuild_file(tmp_path / "extract", target, ALLOWED)
    assert "Jane" not in str(error.value)


def test_a_message_in_the_low_bits_is_destroyed(tmp_path: Path, target: Path) -> None:
    """The low 16 bits of every value hold a message; after rounding it is a coin toss.

    The reader knows where to look and has the values' upper halves. It reads bit 0 of the
    bf16 difference: whether a value was rounded up. Against the highest hidden bit that is
    some information (a large low half is rounded up more often); against the bits in which
    one hides text, the lowest eight, it must be none. The bound is six standard errors.
    """
    generator = np.random.default_rng(5)
    count = 64 * 32
    message = generator.integers(0, 2, size=count).astype(np.uint32)
    values = generator.normal(0, 0.05, (64, 32)).astype(np.float32)
    carrier = ((values.view(np.uint32) & 0xFFFFFF00) | (message.reshape(64, 32) * 0xFF)).view(
        np.float32
    )
    agreements = 0
    trials = 64
    for _ in range(trials):
        write_extract(tmp_path / "extract", **{"blocks.0.a.weight": carrier})
        egress.rebuild_file(tmp_path / "extract", target, ALLOWED)
        with target.open("rb") as handle:
            entry = read_table(handle).entry("blocks.0.a.weight")
            found = read_tensor(handle, entry).ravel()
        assert not (found.view(np.uint32) & 0xFFFF).any()
        up = (np.abs(found) > np.abs(carrier.ravel())).astype(np.uint32)
        agreements += int((up == message).sum())
    total = trials * count
    # Setting the low eight bits changes the chance of rounding up by 255 / 65536.
    assert abs(agreements / total - 0.5) < 6 * 0.5 / np.sqrt(total) + 255 / 65536


def test_two_rebuilds_of_one_extract_differ(tmp_path: Path, target: Path) -> None:
    """Rounding takes fresh randomness, so nobody can predict or choose the bytes that leave."""
    write_extract(tmp_path / "extract")
    first = egress.rebuild_file(tmp_path / "extract", target, ALLOWED)
    second = egress.rebuild_file(tmp_path / "extract", target, ALLOWED)
    assert first.size_bytes == second.size_bytes
    assert first.sha256 != second.sha256


@pytest.mark.parametrize(
    "domain",
    [
        "letters about jane.doe@clinic.example",
        "letters about \uff4a\uff41\uff4e\uff45@clinic.example",  # full-width letters
        "case 078\u201105\u20111120",  # non-breaking hyphens
        "case 0\u200b78-05-1120",  # a zero-width space inside the number
        "ring +44 20 7946 0958",
        "MRN 0043219",
        "seen by Dr Okafor",
    ],
)
def test_an_identifier_in_the_domain_text_is_refused(
    tmp_path: Path, target: Path, domain: str
) -> None:
    write_extract(tmp_path / "extract")
    egress.rebuild_file(tmp_path / "extract", target, ALLOWED)
    documents = (("statement", {"packet_id": PACKET, "domain": domain}),)
    submission = gates.Submission("organ", target.parent, ALLOWED, "bf16", documents)
    results = gates.run_gates(submission)
    assert [r.verdict for r in results if r.name == "G2"] == [GateVerdict.FAIL]
    with pytest.raises(RejectedError) as error:
        gates.check_results(results)
    assert error.value.code == "AG-PRV-020"
    with pytest.raises(RejectedError) as error:
        scan.check_strings({"domain": domain}, "the offer")
    assert error.value.code == "AG-PRV-021"
    assert domain not in str(error.value)


def test_text_posing_as_a_lineage_sketch_is_scanned() -> None:
    """A sketch is numbers in base64; a string in its place is text and is scanned as such."""
    posing = {"name": "w", "shape": [2, 2], "values": "jane.doe@clinic.example"}
    with pytest.raises(RejectedError) as error:
        scan.check_strings({"sketch": [posing]}, "the statement")
    assert error.value.code == "AG-PRV-021"
