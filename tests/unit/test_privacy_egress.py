# SPDX-License-Identifier: Apache-2.0
"""The egress guard rebuilds, the gates judge, the allow-list follows from the base."""

import math
import os
import stat
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch

from allograft.crypto import dsse
from allograft.crypto.keys import SealingKey, SigningKey
from allograft.errors import RejectedError, UnavailableError
from allograft.packet import container
from allograft.packet.delta import Integers
from allograft.packet.kinds import find_kind
from allograft.packet.tensors import check_file, read_table, read_tensor
from allograft.privacy import egress, gates, shapes
from allograft.privacy.dossier import GateVerdict
from allograft.privacy.egress import AllowedTensor
from kit.releases import ALLOWED, PACKET, Desk, part_of, write_extract
from kit.tiny import tiny_model


def code(error: pytest.ExceptionInfo) -> str:
    return error.value.code


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    directory = tmp_path / "payload"
    directory.mkdir()
    return directory


def rebuilt(tmp_path: Path, payload: Path, **options: object) -> dict[str, np.ndarray]:
    target = payload / "organ.safetensors"
    egress.rebuild_file(tmp_path / "extract", target, ALLOWED, **options)
    with target.open("rb") as handle:
        table = read_table(handle)
        return {entry.name: read_tensor(handle, entry) for entry in table.entries}


def test_a_rebuilt_file_is_strict_and_within_half_a_percent(tmp_path: Path, payload: Path) -> None:
    tensors = write_extract(tmp_path / "extract")
    part = egress.rebuild_file(tmp_path / "extract", payload / "organ.safetensors", ALLOWED)
    with (payload / "organ.safetensors").open("rb") as handle:
        checked = check_file(handle)
    assert part == part_of(payload / "organ.safetensors")
    assert {e.dtype for e in checked.table.entries} == {"BF16"}
    found = rebuilt(tmp_path, payload)
    for name, values in tensors.items():
        assert np.abs(found[name] - values).max() <= np.abs(values).max() / 128


def test_f32_keeps_values_exactly(tmp_path: Path, payload: Path) -> None:
    tensors = write_extract(tmp_path / "extract")
    found = rebuilt(tmp_path, payload, wire_dtype="f32")
    for name, values in tensors.items():
        assert np.array_equal(found[name], values)


def test_values_already_in_bf16_do_not_change(tmp_path: Path, payload: Path) -> None:
    tensors = {n: v.view(np.uint32) & 0xFFFF0000 for n, v in write_extract(tmp_path / "x").items()}
    exact = {name: bits.astype(np.uint32).view(np.float32) for name, bits in tensors.items()}
    safetensors.numpy.save_file(exact, tmp_path / "extract")
    found = rebuilt(tmp_path, payload)
    for name, values in exact.items():
        assert np.array_equal(found[name], values)


NUMBERS = {
    "a.int8": AllowedTensor((2, 5), math.inf, Integers(8, 5)),
    "a.int4": AllowedTensor((2, 3), math.inf, Integers(4, 5)),
    "a.scale": AllowedTensor((4,), 1.0),
}


def write_numbers(path: Path) -> dict[str, np.ndarray]:
    tensors = {
        "a.int8": np.arange(-5, 5, dtype=np.int8).reshape(2, 5),
        "a.int4": np.array([[0x21, 0x9F, 0x07], [0, 0x70, 0x09]], dtype=np.uint8),
        "a.scale": np.float32([0.1, 0.2, 0.3, 0.4]),
    }
    safetensors.numpy.save_file(tensors, path)
    return tensors


def test_integers_leave_as_they_are_and_scales_in_the_wires_format(tmp_path: Path) -> None:
    tensors = write_numbers(tmp_path / "extract")
    target = tmp_path / "delta.safetensors"
    egress.rebuild_file(tmp_path / "extract", target, NUMBERS)
    found = safetensors.torch.load_file(target)
    assert np.array_equal(found["a.int8"].numpy(), tensors["a.int8"])
    assert np.array_equal(found["a.int4"].numpy(), tensors["a.int4"])
    assert str(found["a.scale"].dtype) == "torch.bfloat16"
    with target.open("rb") as handle:
        checked = check_file(handle, find_kind("delta").rules)
    norms = {figure.name: figure.frobenius_norm for figure in checked.figures}
    for name in ("a.int8", "a.int4"):
        assert norms[name] == pytest.approx(np.linalg.norm(tensors[name].astype(float)))


def test_integers_are_for_kinds_that_have_them(tmp_path: Path) -> None:
    write_numbers(tmp_path / "extract")
    egress.rebuild_file(tmp_path / "extract", tmp_path / "delta.safetensors", NUMBERS)
    for kind in ("lora", "expert", "module_graft", "prompt"):
        with (
            (tmp_path / "delta.safetensors").open("rb") as handle,
            pytest.raises(RejectedError, match="AG-PKT-016"),
        ):
            check_file(handle, find_kind(kind).rules)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("a.int8", np.full((2, 5), -128, dtype=np.int8), "AG-PKT-027"),
        ("a.int4", np.full((2, 3), 0x08, dtype=np.uint8), "AG-PKT-027"),
        ("a.int4", np.full((2, 3), 0x11, dtype=np.uint8), "AG-PKT-027"),
        ("a.int8", np.zeros((2, 5), dtype=np.uint8), "AG-PRV-040"),
        ("a.int8", np.zeros((2, 5), dtype=np.float32), "AG-PRV-040"),
        ("a.int8", np.zeros((2, 6), dtype=np.int8), "AG-PRV-040"),
        ("a.scale", np.zeros(4, dtype=np.int8), "AG-PRV-040"),
    ],
)
def test_refuses_integers_out_of_form(
    tmp_path: Path, name: str, value: np.ndarray, wanted: str
) -> None:
    tensors = write_numbers(tmp_path / "extract") | {name: value}
    safetensors.numpy.save_file(tensors, tmp_path / "extract")
    with pytest.raises(RejectedError, match=wanted):
        egress.rebuild_file(tmp_path / "extract", tmp_path / "delta.safetensors", NUMBERS)
    assert not (tmp_path / "delta.safetensors").exists()


def test_rounding_is_unbiased_and_goes_to_neighbours() -> None:
    value = np.float32(1.0 + 0.25 / 128)  # a quarter of the way between two bf16 numbers
    bits = egress.round_to_bf16(np.full(200_000, value, dtype=np.float32))
    found = (bits.astype(np.uint32) << 16).view(np.float32)
    assert set(np.unique(found)) == {np.float32(1.0), np.float32(1.0 + 1 / 128)}
    # Standard error 0.001; six of them is beyond any chance of failing by luck.
    assert abs((found > 1.0).mean() - 0.25) < 0.006
    negative = egress.round_to_bf16(np.full(10, -value, dtype=np.float32))
    assert ((negative.astype(np.uint32) << 16).view(np.float32) <= -1.0).all()
    assert not egress.round_to_bf16(np.zeros(1000, dtype=np.float32)).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.finfo(np.float32).max])
def test_refuses_values_that_bf16_cannot_hold(tmp_path: Path, payload: Path, value: float) -> None:
    bad = np.zeros((64, 32), dtype=np.float32)
    bad[3, 4] = value
    write_extract(tmp_path / "extract", **{"blocks.0.a.weight": bad})
    with pytest.raises(RejectedError) as error:
        egress.rebuild_file(
            tmp_path / "extract", payload / "o", ALLOWED, random_bytes=lambda n: b"\xff" * n
        )
    assert code(error) == "AG-PRV-041"
    assert not list(payload.iterdir())


def test_refuses_non_finite_values_for_f32_too(tmp_path: Path, payload: Path) -> None:
    bad = np.full((64, 32), np.nan, dtype=np.float32)
    write_extract(tmp_path / "extract", **{"blocks.0.a.weight": bad})
    with pytest.raises(RejectedError) as error:
        egress.rebuild_file(tmp_path / "extract", payload / "o", ALLOWED, "f32")
    assert code(error) == "AG-PRV-041"


def test_refuses_another_shape_a_missing_tensor_and_integers(tmp_path: Path, payload: Path) -> None:
    write_extract(tmp_path / "extract")
    wrong = ALLOWED | {"blocks.0.norm.weight": AllowedTensor((33,), 1.0)}
    more = ALLOWED | {"blocks.0.b.weight": AllowedTensor((1,), 1.0)}
    for allowed in (wrong, more):
        with pytest.raises(RejectedError) as error:
            egress.rebuild_file(tmp_path / "extract", payload / "o", allowed)
        assert code(error) == "AG-PRV-040"
    write_extract(tmp_path / "extract", **{"blocks.0.norm.weight": np.zeros(32, np.int32)})
    with pytest.raises(RejectedError) as error:
        egress.rebuild_file(tmp_path / "extract", payload / "o", ALLOWED)
    assert code(error) == "AG-PRV-040"


def test_a_full_disk_leaves_nothing(tmp_path: Path, payload: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_extract(tmp_path / "extract")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UnavailableError) as error:
        egress.rebuild_file(tmp_path / "extract", payload / "o", ALLOWED)
    assert code(error) == "AG-STO-001"
    assert not list(payload.iterdir())


def test_facts_name_the_type_on_the_wire() -> None:
    assert egress.with_wire_dtype({"dtype": "float32", "a": 1}, "bf16") == {
        "dtype": "bfloat16",
        "a": 1,
    }
    assert egress.with_wire_dtype({"rank": 4}, "bf16") == {"rank": 4}


class TestGates:
    """G0, G2 and G6 on a rebuilt payload."""

    @pytest.fixture
    def submission(self, tmp_path: Path, payload: Path) -> gates.Submission:
        write_extract(tmp_path / "extract")
        egress.rebuild_file(tmp_path / "extract", payload / "organ.safetensors", ALLOWED)
        statement = {"domain": "discharge letters", "packet_id": PACKET}
        return gates.Submission("organ", payload, ALLOWED, "bf16", (("statement", statement),))

    def verdicts(self, submission: gates.Submission) -> dict[str, GateVerdict]:
        return {result.name: result.verdict for result in gates.run_gates(submission)}

    def test_pass(self, submission: gates.Submission) -> None:
        results = gates.run_gates(submission)
        gates.check_results(results)
        assert [r.name for r in results] == ["G0", "G2", "G6"]
        figures = dict(results[2].figures)
        assert figures["parameters"] == 64 * 32 + 32
        assert figures["largest_rms_ratio"] < 1

    def test_no_result_is_no_pass(self) -> None:
        with pytest.raises(RejectedError) as error:
            gates.check_results(())
        assert code(error) == "AG-PRV-020"

    def test_type_gate_fails_an_unknown_kind(self, submission: gates.Submission) -> None:
        assert self.verdicts(replace(submission, kind="pickle"))["G0"] is GateVerdict.FAIL

    def test_type_gate_fails_a_second_file_and_a_link(self, submission: gates.Submission) -> None:
        extra = submission.payload / "tokenizer.json"
        extra.write_bytes(b"{}")
        assert self.verdicts(submission)["G0"] is GateVerdict.FAIL
        extra.unlink()
        real = submission.payload / "organ.safetensors"
        real.rename(submission.payload.parent / "elsewhere")
        real.symlink_to(submission.payload.parent / "elsewhere")
        assert stat.S_ISLNK(real.lstat().st_mode)
        assert self.verdicts(submission)["G0"] is GateVerdict.FAIL

    def test_type_gate_fails_without_a_statement(self, submission: gates.Submission) -> None:
        assert self.verdicts(replace(submission, documents=()))["G0"] is GateVerdict.FAIL

    def test_text_gate_counts_and_never_quotes(self, submission: gates.Submission) -> None:
        documents = (("offer", {"domain": "letters of Mrs Example"}),)
        result = gates.run_gates(replace(submission, documents=documents))[1]
        assert result.verdict is GateVerdict.FAIL
        assert dict(result.figures)["titled-name"] == 1
        assert "Example" not in repr(result)

    def test_structure_gate_fails_wrong_dtype_and_large_values(
        self, tmp_path: Path, submission: gates.Submission
    ) -> None:
        assert self.verdicts(replace(submission, wire_dtype="f32"))["G6"] is GateVerdict.FAIL
        small = {name: AllowedTensor(a.shape, 1e-6) for name, a in ALLOWED.items()}
        assert self.verdicts(replace(submission, allowed=small))["G6"] is GateVerdict.FAIL

    def test_a_gate_that_cannot_judge_is_invalid(self, submission: gates.Submission) -> None:
        gone = replace(submission, payload=submission.payload / "missing")
        verdicts = self.verdicts(gone)
        assert verdicts["G0"] is GateVerdict.INVALID
        assert verdicts["G6"] is GateVerdict.INVALID
        result = gates.run_gates(gone)[0]
        assert "FileNotFoundError" in result.reason
        with pytest.raises(RejectedError) as error:
            gates.check_results(gates.run_gates(gone))
        assert code(error) == "AG-PRV-020"

    def test_a_gate_that_crashes_in_an_unforeseen_way_leaves_no_result(
        self, submission: gates.Submission
    ) -> None:
        def crash(*_: object) -> None:
            raise RuntimeError("unforeseen")

        with pytest.raises(RuntimeError):
            gates.run_gate(gates.Gate("G9", "1", crash), submission)


class TestShapes:
    """The allow-list of a base."""

    @pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2"])
    def test_organ_tensors_are_those_of_the_blocks(self, tmp_path: Path, family: str) -> None:
        model = tiny_model(family)
        model.save_pretrained(tmp_path)
        allowed = shapes.organ_tensors(shapes.read_base(tmp_path), 1, 2)
        trunk = model.transformer.h if family == "gpt2" else model.model.layers
        expected = {
            f"blocks.{number}.{name}": tuple(value.shape)
            for number in range(2)
            for name, value in trunk[1 + number].state_dict().items()
        }
        assert {name: a.shape for name, a in allowed.items()} == expected

    @pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gemma3_text"])
    def test_a_norm_may_be_silenced_whatever_its_base_stores(
        self, tmp_path: Path, family: str
    ) -> None:
        # Gemma stores gains less one: near zero in the base, -1 in an organ that begins to learn.
        tiny_model(family).save_pretrained(tmp_path)
        allowed = shapes.organ_tensors(shapes.read_base(tmp_path), 1, 2)
        gains = [a for name, a in allowed.items() if len(a.shape) == 1 and "bias" not in name]
        assert gains
        assert all(gain.max_rms >= shapes.RMS_FACTOR for gain in gains)

    def test_a_sharded_base_is_read_whole(self, tmp_path: Path) -> None:
        tiny_model("llama").save_pretrained(tmp_path / "one")
        tiny_model("llama").save_pretrained(tmp_path / "many", max_shard_size="20KB")
        assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
        one, many = (shapes.read_base(tmp_path / name) for name in ("one", "many"))
        assert shapes.organ_tensors(one, 0, 4) == shapes.organ_tensors(many, 0, 4)

    @pytest.mark.parametrize(
        ("family", "modules", "name", "shape"),
        [
            ("llama", ["q_proj"], "model.layers.3.self_attn.q_proj.lora_A", (4, 32)),
            ("llama", ["down_proj"], "model.layers.0.mlp.down_proj.lora_B", (32, 4)),
            ("gpt2", ["c_attn"], "transformer.h.0.attn.c_attn.lora_B", (96, 4)),
            ("gpt2", ["c_proj"], "transformer.h.1.mlp.c_proj.lora_A", (4, 128)),
        ],
    )
    def test_adapter_tensors_follow_from_modules_and_rank(
        self, tmp_path: Path, family: str, modules: list, name: str, shape: tuple
    ) -> None:
        tiny_model(family).save_pretrained(tmp_path)
        base = shapes.read_base(tmp_path)
        facts = {"rank": 4, "alpha": 8.0, "target_modules": modules}
        allowed = shapes.allow_list("lora", facts, base)
        assert allowed[f"base_model.model.{name}.weight"].shape == shape
        assert len(allowed) % 8 == 0  # A and B in each of four blocks

    def test_refuses_what_the_base_does_not_have(self, tmp_path: Path) -> None:
        tiny_model("llama").save_pretrained(tmp_path)
        base = shapes.read_base(tmp_path)
        for facts in (
            {"rank": 4, "alpha": 8.0, "target_modules": ["c_attn"]},
            {"rank": 64, "alpha": 8.0, "target_modules": ["q_proj"]},
            {"rank": 4, "alpha": 8.0, "target_modules": ["input_layernorm"]},
        ):
            with pytest.raises(RejectedError) as error:
                shapes.allow_list("lora", facts, base)
            assert code(error) == "AG-PRV-040"
        for facts in ({"source": 3, "blocks": 2}, {"source": 0, "blocks": 0}):
            with pytest.raises(RejectedError) as error:
                shapes.allow_list("organ", facts, base)
            assert code(error) == "AG-PRV-040"
        with pytest.raises(RejectedError) as error:
            shapes.allow_list("painting", {}, base)
        assert code(error) == "AG-PKT-001"
        with pytest.raises(RejectedError, match="AG-PKT-028"):
            shapes.allow_list("delta", {}, base)

    def test_refuses_a_directory_that_is_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(RejectedError) as error:
            shapes.read_base(tmp_path)
        assert code(error) == "AG-PRV-042"
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(RejectedError) as error:
            shapes.read_base(tmp_path)
        assert code(error) == "AG-PRV-042"


class TestSealing:
    """Only released bytes are sealed, for released recipients."""

    @pytest.fixture
    def desk(self, tmp_path: Path, payload: Path) -> Desk:
        write_extract(tmp_path / "extract")
        part = egress.rebuild_file(tmp_path / "extract", payload / "organ.safetensors", ALLOWED)
        return Desk(parts=(part,))

    def plan(self, desk: Desk, **changes: object) -> container.SealPlan:
        parts = tuple(container.PlainPart(p.name, p.size_bytes, p.sha256) for p in desk.parts)
        plan = container.SealPlan(
            packet_id=PACKET,
            dispatch_id="6" * 32,
            donor="hospital-a",
            kind="organ",
            not_after=datetime(2027, 1, 1, tzinfo=UTC),
            statement_digest="c" * 64,
            parts=parts,
            recipients=(container.Recipient("hospital-b", SealingKey.generate().public),),
        )
        return replace(plan, **changes)

    def attestations(self, desk: Desk) -> bytes:
        signed = dsse.sign(desk.dossier.to_statement(), dsse.IN_TOTO, [SigningKey.generate()])
        return container.join_attestations([b'{"other": "format"}', signed.to_bytes()])

    def test_seals_what_was_released(self, desk: Desk, payload: Path, tmp_path: Path) -> None:
        header = egress.seal_release(
            desk.release(), payload, self.attestations(desk), self.plan(desk), tmp_path
        )
        assert header.audience == ("hospital-b",)

    def test_refuses_other_recipients_packets_and_attestations(
        self, desk: Desk, payload: Path, tmp_path: Path
    ) -> None:
        key = SealingKey.generate().public
        others = (container.Recipient("hospital-d", key),)
        more = (*self.plan(desk).recipients, *others)
        release, proof = desk.release(), self.attestations(desk)
        bare = container.join_attestations([b'{"other": "format"}'])
        for plan, attestations in (
            (self.plan(desk, recipients=others), proof),
            (self.plan(desk, recipients=more), proof),
            (self.plan(desk, packet_id="7" * 32), proof),
            (self.plan(desk, kind="lora"), proof),
            (self.plan(desk), bare),
        ):
            with pytest.raises(RejectedError) as error:
                egress.seal_release(release, payload, attestations, plan, tmp_path)
            assert code(error) == "AG-PRV-032"
        assert not list(tmp_path.glob("*.sealed"))

    def test_refuses_bytes_that_changed_after_approval(self, desk: Desk, payload: Path) -> None:
        release = desk.release()
        assert egress.admit_payload(release, payload) == (payload / "organ.safetensors",)
        path = payload / "organ.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(RejectedError) as error:
            egress.admit_payload(release, payload)
        assert code(error) == "AG-PRV-032"

    def test_refuses_added_and_linked_files(self, desk: Desk, payload: Path) -> None:
        release = desk.release()
        (payload / "notes.txt").write_text("x")
        with pytest.raises(RejectedError):
            egress.admit_payload(release, payload)
        (payload / "notes.txt").unlink()
        (payload / "organ.safetensors").rename(payload.parent / "moved")
        (payload / "organ.safetensors").symlink_to(payload.parent / "moved")
        with pytest.raises(RejectedError):
            egress.admit_payload(release, payload)


def test_a_truncated_extract_is_refused(tmp_path: Path, payload: Path) -> None:
    write_extract(tmp_path / "extract")
    content = (tmp_path / "extract").read_bytes()
    (tmp_path / "extract").write_bytes(content[:-4])
    with pytest.raises(RejectedError) as error:
        egress.rebuild_file(tmp_path / "extract", payload / "o", ALLOWED)
    assert code(error).startswith("AG-PKT")
