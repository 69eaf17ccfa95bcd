# SPDX-License-Identifier: Apache-2.0
"""A recipient's stack: any order in, any order out; nulls of equal norm; exports that load."""

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

from allograft.errors import RejectedError
from allograft.recipes import blocks
from allograft.recipes.base import (
    Attachment,
    Donor,
    Payload,
    Plan,
    Recipient,
    load_recipe,
)
from allograft.recipes.controls import null_packet, starting_point
from allograft.recipes.export import CONTENTS_NAME, Source, export_merged, export_peft
from allograft.recipes.patch import folded
from allograft.recipes.plan import LoopPlan, LoraPlan, OrganPlan
from allograft.recipes.snapshot import state_digest
from allograft.recipes.stack import Stack, stack_digest
from kit.tiny import (
    FAMILIES,
    LAYERS,
    generate,
    logits_of,
    tiny_model,
    tiny_tokenizer,
    tiny_tokens,
    tiny_windows,
)

LOOP = LoopPlan(steps=2, batch_windows=8, learning_rate=1e-2, warmup_steps=0)


class NoTokenizer:
    """Writes the one file an export puts beside the model."""

    def save_pretrained(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}")


def make(model, workdir: Path, recipe: OrganPlan | LoraPlan, key: str) -> Attachment:
    kind = "organ" if isinstance(recipe, OrganPlan) else "lora"
    folder = workdir / key
    folder.mkdir()
    code = load_recipe(kind)
    made = code.extract(Donor(model, tiny_windows(), folder), Plan(recipe, LOOP))
    return code.fit(Payload(kind, key * 32, folder, made.facts.to_json()), Recipient(model))


@pytest.fixture
def three(tmp_path: Path) -> tuple[Attachment, ...]:
    model = tiny_model("gemma3_text")
    return (
        make(model, tmp_path, OrganPlan(2, 1, 3), "a"),
        make(model, tmp_path, LoraPlan(rank=2), "b"),
        make(model, tmp_path, OrganPlan(1, 3, 3), "c"),
    )


def test_stack_does_not_depend_on_order(three: tuple[Attachment, ...]) -> None:
    model = tiny_model("gemma3_text")
    plain = state_digest(model)
    names: set[tuple[str, str]] = set()
    remainders: set[str] = set()
    for order in permutations(range(3)):
        stack = Stack(model)
        for number in order:
            stack.attach(three[number])
        names.add((stack.digest(), state_digest(model)))
        assert generate(model, use_cache=True) == generate(model, use_cache=False)
        for number in order[:2]:
            stack.detach(three[number].attachment_id)
        remainders.add(state_digest(model))
        stack.detach(three[order[2]].attachment_id)
        assert state_digest(model) == plain
        assert stack.attachments == ()
    assert len(names) == 1
    assert len(remainders) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_inserting_replacing_and_adapting_add_up_in_any_order(family: str, tmp_path: Path) -> None:
    """Two organs on one block, one of which replaces it, and an adapter on the same matrices."""
    model = tiny_model(family)
    plain = state_digest(model)
    some = (
        make(model, tmp_path, OrganPlan(1, 2, 2, "replace"), "a"),
        make(model, tmp_path, OrganPlan(2, 1, 3), "b"),
        make(model, tmp_path, OrganPlan(1, 2, 2, "replace"), "c"),
        make(model, tmp_path, LoraPlan(rank=2), "d"),
    )
    whole: set[str] = set()
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
        stack = Stack(model)
        for number in order:
            stack.attach(some[number])
        whole.add(state_digest(model))
        assert blocks.count_blocks_run(model, tiny_tokens()) == LAYERS + 2
        stack.detach(some[1].attachment_id)
        assert generate(model, use_cache=True) == generate(model, use_cache=False)
        for number in (0, 3, 2):
            stack.detach(some[number].attachment_id)
        assert state_digest(model) == plain
    assert len(whole) == 1


def test_null_of_a_replacement_is_noise_of_the_size_of_its_change(tmp_path: Path) -> None:
    model = tiny_model("gemma2")
    organ = make(model, tmp_path, OrganPlan(1, 2, 2, "replace"), "a")
    null = null_packet(organ, model, seed=3)
    for name, value in organ.tensors.items():
        torch.testing.assert_close(null.tensors[name].norm(), value.norm(), rtol=1e-3, atol=1e-6)


def test_digest_tells_doses_and_members_apart(three: tuple[Attachment, ...]) -> None:
    half = replace(three[0], dose=0.5)
    digests = [stack_digest(s) for s in ((), three[:1], (half,), three[:2], three)]
    assert len(set(digests)) == 5
    assert stack_digest(three) == stack_digest(reversed(three))


def test_changing_a_dose_on_the_stack_shows_in_its_digest(three: tuple[Attachment, ...]) -> None:
    stack = Stack(tiny_model("gemma3_text"))
    handle = stack.attach(three[0])
    handle.set_dose(0.25)
    assert stack.digest() == stack_digest([replace(three[0], dose=0.25)])


def test_attach_all_attaches_all_or_none(three: tuple[Attachment, ...]) -> None:
    model = tiny_model("gemma3_text")
    plain = state_digest(model)
    stack = Stack(model)
    with pytest.raises(RejectedError, match="AG-RCP-021"):
        stack.attach_all([three[0], three[1], replace(three[2], dose=7.0)])
    assert state_digest(model) == plain
    stack.attach_all(three)
    assert [a.attachment_id[0] for a in stack.attachments] == ["a", "b", "c"]


def test_refuses_what_is_already_there_or_not_there(three: tuple[Attachment, ...]) -> None:
    stack = Stack(tiny_model("gemma3_text"))
    stack.attach(three[0])
    with pytest.raises(RejectedError, match="AG-RCP-023"):
        stack.attach(three[0])
    with pytest.raises(RejectedError, match="AG-RCP-023"):
        stack.detach(three[1].attachment_id)
    with pytest.raises(RejectedError, match="AG-RCP-001"):
        stack.attach(replace(three[1], kind="os"))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_null_organ_moves_as_far_from_its_start_as_the_organ(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    organ = make(model, tmp_path, OrganPlan(2, 1, 3), "a")
    null = null_packet(organ, model, seed=3)
    start = {}
    for number, block in enumerate(blocks.copy_blocks(model, 1, 2)):
        blocks.silence(blocks.find_family(model.config), block)
        start |= {f"blocks.{number}.{k}": v for k, v in block.state_dict().items()}
    for name, value in organ.tensors.items():
        theirs, ours = (value - start[name]).norm(), (null.tensors[name] - start[name]).norm()
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    silenced = blocks.dosed_names(blocks.find_family(model.config), blocks.base_blocks(model)[1])
    assert all(
        (organ.tensors[f"blocks.0.{n}"] - start[f"blocks.0.{n}"]).norm() > 0 for n in silenced
    )
    again = null_packet(organ, model, seed=3)
    assert all(torch.equal(v, again.tensors[n]) for n, v in null.tensors.items())
    other = null_packet(organ, model, seed=4)
    assert any(not torch.equal(v, other.tensors[n]) for n, v in null.tensors.items())


def test_an_organ_is_measured_against_the_base_whatever_else_is_on_the_model(
    three: tuple[Attachment, ...],
) -> None:
    model = tiny_model("gemma3_text")
    organ = three[0]
    start, null = starting_point(organ, model), null_packet(organ, model, seed=0)
    # Changes the very blocks that the organ began as copies of.
    Stack(model).attach(three[1])
    names = [name for name, value in start.items() if value.norm() > 0]
    assert names
    for name, value in starting_point(organ, model).items():
        assert torch.equal(value, start[name])
    for name, value in null_packet(organ, model, seed=0).tensors.items():
        assert torch.equal(value, null.tensors[name])


def test_null_attaches_and_detaches_like_the_packet(three: tuple[Attachment, ...]) -> None:
    model = tiny_model("gemma3_text")
    plain, before = state_digest(model), logits_of(model)
    for attachment in three:
        null = null_packet(attachment, model, seed=0)
        recipe = load_recipe(null.kind)
        handle = recipe.attach(null, model)
        assert not torch.equal(logits_of(model), before)
        recipe.detach(handle)
        assert state_digest(model) == plain
    lora, noise = three[1], null_packet(three[1], model, seed=0)
    for name, value in lora.tensors.items():
        torch.testing.assert_close(noise.tensors[name].norm(), value.norm(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_snapshot_loads_with_equal_logits(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    stack = Stack(model)
    stack.attach(replace(make(tiny_model(family), tmp_path, OrganPlan(2, 1, 3), "a"), dose=0.5))
    stack.attach(replace(make(tiny_model(family), tmp_path, LoraPlan(rank=2), "b"), dose=0.25))
    export_merged(stack, NoTokenizer(), tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with folded(model):
        assert torch.equal(logits_of(again), logits_of(model))
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=1e-4, atol=1e-4)
    assert generate(again, use_cache=True) == generate(model, use_cache=False)
    assert not list(tmp_path.glob(".*"))


def test_export_never_replaces_a_directory(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    with pytest.raises(RejectedError, match="AG-RCP-024"):
        export_merged(Stack(tiny_model("llama")), NoTokenizer(), tmp_path / "merged")


def test_failed_export_leaves_nothing_behind(tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, directory: Path) -> None:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        export_merged(Stack(tiny_model("llama")), Broken(), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_organ_is_no_peft_adapter(three: tuple[Attachment, ...], tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match="AG-RCP-024"):
        export_peft(three[0], tmp_path / "adapter")
    with pytest.raises(RejectedError, match="AG-RCP-024"):
        export_peft(replace(three[1], dose=0.0), tmp_path / "adapter")


@pytest.mark.parametrize("family", FAMILIES)
def test_pipeline_generates_with_attachments_on(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    stack = Stack(model)
    plain = generate(model, use_cache=False)
    stack.attach(make(model, tmp_path, OrganPlan(2, 1, 3), "a"))
    stack.attach(make(tiny_model(family), tmp_path, LoraPlan(rank=2), "b"))
    writer = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())
    prompt = " ".join(f"w{token}" for token in tiny_tokens(1, 12)[0].tolist())
    options = {"min_new_tokens": 32, "do_sample": False, "return_full_text": False}
    (said,) = writer(prompt, max_new_tokens=32, **options)
    tokens = [int(word.removeprefix("w")) for word in said["generated_text"].split()]
    expected = generate(model, use_cache=False)
    assert tokens == [token for token in expected if token != 0]  # the pipeline drops padding
    assert expected != plain


def test_every_export_lists_what_is_inside(three: tuple[Attachment, ...], tmp_path: Path) -> None:
    stack = Stack(tiny_model("gemma3_text"))
    stack.attach_all(replace(each, dose=0.5) for each in three)
    source = Source("c" * 64, {"a" * 32: "hospital-a"})
    export_merged(stack, NoTokenizer(), tmp_path / "merged", source)
    export_peft(three[1], tmp_path / "adapter", source=source)
    merged = json.loads((tmp_path / "merged" / CONTENTS_NAME).read_bytes())
    inside = [(e["packet_id"], e["kind"], e["dose"], e["donor"]) for e in merged["inside"]]
    assert inside == [
        ("a" * 32, "organ", 0.5, "hospital-a"),
        ("b" * 32, "lora", 0.5, ""),
        ("c" * 32, "organ", 0.5, ""),
    ]
    assert (merged["base"], merged["stack"]) == ("c" * 64, stack.digest())
    (adapter,) = json.loads((tmp_path / "adapter" / CONTENTS_NAME).read_bytes())["inside"]
    assert (adapter["packet_id"], adapter["kind"], adapter["dose"]) == ("b" * 32, "lora", 1.0)


def test_refuses_to_export_what_it_cannot_list(
    three: tuple[Attachment, ...], tmp_path: Path
) -> None:
    model = tiny_model("gemma3_text")
    load_recipe("lora").attach(three[1], model)
    with pytest.raises(RejectedError, match="AG-RCP-024"):
        export_merged(Stack(model), NoTokenizer(), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
