# SPDX-License-Identifier: Apache-2.0
"""Prompts: PEFT's prompt tuning on a stock model, with its cache, padding and `generate`."""

import inspect
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from allograft.errors import RejectedError, UnavailableError
from allograft.evaluate.spectrum import weigh_attachment
from allograft.privacy.dp import DpConstants
from allograft.privacy.egress import rebuild_file
from allograft.privacy.shapes import allow_list, read_base
from allograft.recipes import blocks
from allograft.recipes.attachment import load_attachment, save_attachment
from allograft.recipes.base import (
    Attachment,
    Declaration,
    Donor,
    Extract,
    ModelCard,
    Payload,
    Plan,
    Recipient,
)
from allograft.recipes.controls import null_packet
from allograft.recipes.export import export_merged, export_peft
from allograft.recipes.facts import PromptFacts, read_facts
from allograft.recipes.lora import LoraRecipe
from allograft.recipes.patch import has_attachments
from allograft.recipes.plan import LoopPlan, LoraPlan, PromptPlan, read_recipe_plan
from allograft.recipes.prompt import PAYLOAD, TENSOR, PromptRecipe
from allograft.recipes.snapshot import state_digest
from allograft.recipes.stack import Stack
from kit.tiny import FAMILIES, generate, logits_of, tiny_model, tiny_tokens, tiny_windows

LOOP = LoopPlan(steps=6, batch_windows=24, learning_rate=0.3, warmup_steps=1)
RECIPE = PromptRecipe()
COUNT = 5


def extract(model, workdir: Path, count: int = COUNT, **donor) -> Extract:
    return RECIPE.extract(
        Donor(model, tiny_windows(), workdir, **donor), Plan(PromptPlan(count), LOOP)
    )


def fit(model, workdir: Path, made: Extract, packet_id: str = "ef" * 16) -> Attachment:
    return RECIPE.fit(Payload("prompt", packet_id, workdir, made.facts.to_json()), Recipient(model))


def untrained(model, count: int = COUNT, packet_id: str = "ef" * 16) -> Attachment:
    """A prompt as strong as embeddings, without the cost of training."""
    shape = blocks.base_shape(model)
    generator = torch.Generator().manual_seed(count)
    size = model.get_input_embeddings()(torch.arange(9)).detach().std()
    vectors = size * torch.randn(count, shape.hidden, generator=generator)
    facts = PromptFacts(shape, count, "float32")
    return Attachment("prompt", packet_id, facts, {TENSOR: vectors}, doses=(1.0,))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_learns_fits_and_leaves_the_base_as_it_was(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    digest, before = state_digest(model), logits_of(model)
    made = extract(model, tmp_path)
    assert state_digest(model) == digest
    assert made.report["last_loss"] < made.report["first_loss"]
    assert made.report["trainable_parameters"] == COUNT * 32
    assert all(value.requires_grad and value.grad is None for value in model.parameters())
    attachment = fit(model, tmp_path, made)
    handle = RECIPE.attach(attachment, model)
    full = logits_of(model)
    assert full.shape == before.shape
    assert not torch.allclose(full, before, rtol=1e-2, atol=1e-2)
    assert has_attachments(model)
    assert state_digest(model) != digest
    handle.set_dose(0.0)
    assert torch.equal(logits_of(model), before)
    handle.set_dose(1.0)
    assert torch.equal(logits_of(model), full)
    RECIPE.detach(handle)
    assert state_digest(model) == digest
    assert torch.equal(logits_of(model), before)
    assert not has_attachments(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_pefts_prompt_tuning(family: str) -> None:
    import peft

    model, twin = tiny_model(family), tiny_model(family)
    attachment = untrained(model)
    RECIPE.attach(attachment, model)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        theirs = peft.get_peft_model(twin, config).eval()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(attachment.tensors[TENSOR])
        tokens = tiny_tokens()
        found = theirs(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False
        ).logits
    torch.testing.assert_close(logits_of(model), found[:, COUNT:], rtol=1e-4, atol=1e-4)


def cache_of(model) -> dict[str, DynamicCache]:
    """An empty cache as an argument, whose name transformers is changing."""
    name = {"cache", "past_key_values"} & inspect.signature(model.forward).parameters.keys()
    return {key: DynamicCache(config=model.config) for key in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_holds_the_prompt_and_changes_no_token(family: str) -> None:
    model = tiny_model(family)
    plain = generate(model, use_cache=True)
    handle = RECIPE.attach(untrained(model), model)
    assert generate(model, use_cache=True) == generate(model, use_cache=False)
    tokens, cache = tiny_tokens(), cache_of(model)
    with torch.no_grad():
        parts = [
            model(input_ids=part, use_cache=True, **cache).logits
            for part in (tokens[:, :12], *tokens[:, 12:].split(1, dim=1))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits_of(model), rtol=1e-4, atol=1e-4)
    RECIPE.detach(handle)
    assert generate(model, use_cache=True) == plain


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_of_a_batch_are_continued_as_they_are_alone(family: str) -> None:
    model = tiny_model(family)
    RECIPE.attach(untrained(model), model)
    long, short = tiny_tokens(1, 12), tiny_tokens(1, 7, seed=8)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        both = model.generate(torch.cat([long, padded]), attention_mask=mask, **options)[:, 12:]
        for row, tokens in ((0, long), (1, short)):
            alone = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
            assert both[row].tolist() == alone[0, tokens.shape[1] :].tolist()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_positions_and_embeddings_given_by_the_caller_mean_the_text(family: str) -> None:
    model = tiny_model(family)
    RECIPE.attach(untrained(model), model)
    tokens = tiny_tokens()
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        placed = model(input_ids=tokens, position_ids=places, use_cache=False).logits
        embedded = model.get_input_embeddings()(tokens)
        given = model(inputs_embeds=embedded, use_cache=False).logits
        last = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
    assert torch.equal(placed, logits_of(model))
    assert torch.equal(given, logits_of(model))
    torch.testing.assert_close(last[:, 0], logits_of(model)[:, -1])


def test_what_would_be_computed_wrongly_is_refused() -> None:
    model = tiny_model("llama")
    tokens = tiny_tokens(1, 12)
    mask = torch.ones_like(tokens)
    old, new = cache_of(model), cache_of(model)
    with torch.no_grad():
        model(input_ids=tokens, attention_mask=mask, use_cache=True, **old)
    RECIPE.attach(untrained(model), model)
    options = {"max_new_tokens": 2, "pad_token_id": 0, "do_sample": False}
    with pytest.raises(RejectedError, match="AG-RCP-036"):  # it has no room for the vectors
        model.generate(tokens, attention_mask=mask, cache_implementation="static", **options)
    longer = tiny_tokens(1, 20)
    with pytest.raises(RejectedError, match="AG-RCP-036"):  # a cache from before the prompt
        model.generate(longer, attention_mask=torch.ones_like(longer), **old, **options)
    model.generate(tokens, attention_mask=mask, **new, **options)
    with pytest.raises(RejectedError, match="AG-RCP-036"):  # it would skip five tokens of the text
        model.generate(longer, attention_mask=torch.ones_like(longer), **new, **options)


def test_learned_positions_run_out_with_a_code_and_not_a_crash() -> None:
    model = tiny_model("gpt2")
    RECIPE.attach(untrained(model), model)
    fits, exceeds = tiny_tokens(1, 96 - COUNT), tiny_tokens(1, 97 - COUNT)
    assert bool(torch.isfinite(logits_of(model, fits)).all())
    with pytest.raises(RejectedError, match="AG-RCP-036"):
        logits_of(model, exceeds)
    tokens = tiny_tokens()
    with pytest.raises(RejectedError, match="AG-RCP-036"):
        model(input_ids=tokens, token_type_ids=torch.zeros_like(tokens))


def test_two_prompts_on_one_model_are_refused() -> None:
    model = tiny_model("qwen3")
    digest = state_digest(model)
    handle = RECIPE.attach(untrained(model), model)
    with pytest.raises(RejectedError, match="AG-RCP-036"):
        RECIPE.attach(untrained(model, packet_id="01" * 16), model)
    handle.set_dose(0.0)
    with pytest.raises(RejectedError, match="AG-RCP-036"):
        RECIPE.attach(untrained(model, packet_id="01" * 16), model)
    RECIPE.detach(handle)
    assert state_digest(model) == digest


def test_memory_that_runs_out_leaves_the_model_and_the_dose_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    plain = state_digest(model)
    move = torch.Tensor.to

    def failing(self: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        if options.get("copy"):
            raise torch.OutOfMemoryError
        return move(self, *args, **options)

    prompt = untrained(model)
    with monkeypatch.context() as full:
        full.setattr(torch.Tensor, "to", failing)
        with pytest.raises(UnavailableError, match="AG-RCP-027"):
            RECIPE.attach(prompt, model)
    assert state_digest(model) == plain
    assert not has_attachments(model)
    handle = RECIPE.attach(prompt, model)
    whole = state_digest(model)
    with monkeypatch.context() as full:
        full.setattr(torch.Tensor, "to", failing)
        handle.set_dose(1.0)  # needs none
        assert state_digest(model) == whole
        handle.set_dose(0.0)
        with pytest.raises(UnavailableError, match="AG-RCP-027"):
            handle.set_dose(1.0)
    assert state_digest(model) == plain
    assert handle.attachment.dose == 0.0
    handle.set_dose(1.0)
    assert state_digest(model) == whole
    RECIPE.detach(handle)
    assert state_digest(model) == plain


def test_a_prompt_stands_before_other_attachments_in_any_order(tmp_path: Path) -> None:
    model = tiny_model("mistral")
    plain = state_digest(model)
    lora = LoraRecipe()
    loop = replace(LOOP, learning_rate=1e-2)
    made = lora.extract(Donor(model, tiny_windows(), tmp_path), Plan(LoraPlan(rank=2), loop))
    adapter = lora.fit(Payload("lora", "cd" * 16, tmp_path, made.facts.to_json()), Recipient(model))
    prompt = untrained(model)
    organ = blocks.copy_blocks(model, 0, 1)
    digests = set()
    for order in (((lora, adapter), (RECIPE, prompt)), ((RECIPE, prompt), (lora, adapter))):
        blocks.insert_blocks(model, organ, 0, 2, "organ-a")
        handles = [(recipe, recipe.attach(attachment, model)) for recipe, attachment in order]
        digests.add(state_digest(model))
        assert generate(model, use_cache=True) == generate(model, use_cache=False)
        blocks.remove_blocks(model, "organ-a")
        for recipe, handle in handles:
            recipe.detach(handle)
        assert state_digest(model) == plain
    assert len(digests) == 1


def test_only_exactly_the_base_may_open_a_prompt() -> None:
    facts = untrained(tiny_model("llama")).facts
    statement = Declaration("prompt", "aa" * 32, "bb" * 32, facts.to_json())
    card = ModelCard("aa" * 32, "bb" * 32, facts.shape)
    assert RECIPE.check(statement, card).level == "exact"
    other = replace(card, weights_digest="cc" * 32)
    for cosine in (None, 0.5, 0.999):
        verdict = RECIPE.check(statement, replace(other, lineage_cosine=cosine))
        assert (verdict.level, verdict.code, verdict.needs) == ("refuse", "AG-RCP-036", ())
    assert RECIPE.check(statement, replace(card, tokenizer_digest="dd" * 32)).code == "AG-RCP-011"


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_egress_guard_knows_the_one_tensor(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "base")
    made = extract(model, tmp_path)
    base = read_base(tmp_path / "base")
    allowed = allow_list("prompt", made.facts.to_json(), base)
    value = load_file(made.files[0])[TENSOR]
    assert allowed.keys() == {TENSOR}
    assert float(value.square().mean().sqrt()) <= allowed[TENSOR].max_rms
    (tmp_path / "out").mkdir()
    rebuild_file(made.files[0], tmp_path / "out" / PAYLOAD, allowed)
    again = replace(made, facts=replace(made.facts, dtype="bfloat16"))
    assert fit(model, tmp_path / "out", again).tensors[TENSOR].dtype == torch.bfloat16
    with pytest.raises(RejectedError, match="AG-PRV-040"):
        allow_list("prompt", {"virtual_tokens": 0}, base)


def test_a_prompt_has_a_null_and_no_matrices() -> None:
    model = tiny_model("qwen2")
    attachment = untrained(model)
    null = null_packet(attachment, model, seed=3)
    ours, theirs = attachment.tensors[TENSOR], null.tensors[TENSOR]
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours.norm(), theirs.norm(), rtol=1e-4, atol=0)
    assert weigh_attachment(attachment, model) == {}


def test_a_prompt_is_in_no_snapshot_and_no_lora_directory(tmp_path: Path) -> None:
    model = tiny_model("llama")
    attachment = untrained(model)
    handle = RECIPE.attach(attachment, model)
    with pytest.raises(RejectedError, match="AG-RCP-024"):
        export_merged(Stack(model), None, tmp_path / "merged")
    with pytest.raises(RejectedError, match="AG-RCP-024"):
        export_peft(attachment, tmp_path / "adapter")
    RECIPE.detach(handle)
    save_attachment(attachment, tmp_path / "kept")
    again = load_attachment_with_doses(tmp_path / "kept")
    assert again.doses == (1.0,)


def load_attachment_with_doses(directory: Path) -> Attachment:
    """As `load_attachment`, with the recipe at hand instead of by entry point."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("allograft.recipes.attachment.load_recipe", lambda *_: RECIPE)
        return load_attachment(directory)


def test_private_vectors_are_trained_one_person_at_a_time(tmp_path: Path) -> None:
    constants = DpConstants(0.3, 0.5, 3, 1.0, 5.0, 1e-6, 4)
    plan = Plan(PromptPlan(COUNT), LoopPlan(steps=3, warmup_steps=1), constants)
    model = tiny_model("llama")
    digest = state_digest(model)
    made = RECIPE.extract(Donor(model, tiny_windows(), tmp_path), plan)
    assert made.report["noise"] == "chacha20"
    with pytest.raises(RejectedError, match="AG-PRV-080"):
        RECIPE.extract(Donor(model, tiny_windows(), tmp_path, private_way="joint"), plan)
    assert state_digest(model) == digest


@pytest.mark.parametrize("how", ["missing", "extra", "shape", "nan"])
def test_refuses_payloads_that_do_not_fit(how: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    attachment = untrained(model)
    tensors = dict(attachment.tensors)
    if how == "missing":
        tensors = {"other": tensors[TENSOR]}
    elif how == "extra":
        tensors["lm_head.weight"] = torch.zeros(61, 32)
    elif how == "shape":
        tensors[TENSOR] = tensors[TENSOR][1:].contiguous()
    else:
        tensors[TENSOR][0, 0] = float("nan")
    save_file(tensors, tmp_path / PAYLOAD)
    payload = Payload("prompt", "ef" * 16, tmp_path, attachment.facts.to_json())
    with pytest.raises(RejectedError, match="AG-RCP-003"):
        RECIPE.fit(payload, Recipient(model))


def test_refuses_bad_settings_and_double_use(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for count in (0, 513):
        with pytest.raises(RejectedError, match="AG-RCP-035"):
            extract(model, tmp_path, count)
        with pytest.raises(RejectedError, match="AG-RCP-035"):
            read_recipe_plan("prompt", {"virtual_tokens": count})
    with pytest.raises(RejectedError, match="AG-RCP-035"):
        RECIPE.extract(Donor(model, tiny_windows(), tmp_path), Plan(LoraPlan(), LOOP))
    facts = untrained(model).facts.to_json()
    for change in ({"dtype": "int8"}, {"virtual_tokens": 0}, {"virtual_tokens": 513}):
        with pytest.raises(RejectedError, match="AG-RCP-002"):
            read_facts("prompt", facts | change)
    attachment = untrained(model)
    with pytest.raises(RejectedError, match="AG-RCP-021"):
        RECIPE.attach(replace(attachment, dose=0.5), model)
    handle = RECIPE.attach(attachment, model)
    with pytest.raises(RejectedError, match="AG-RCP-021"):
        handle.set_dose(0.5)
    with pytest.raises(RejectedError, match="AG-RCP-023"):
        RECIPE.attach(attachment, model)
    with pytest.raises(RejectedError, match="AG-RCP-022"):
        extract(model, tmp_path)
    RECIPE.detach(handle)
    for act in (lambda: RECIPE.detach(handle), lambda: handle.set_dose(1.0)):
        with pytest.raises(RejectedError, match="AG-RCP-023"):
            act()
    with pytest.raises(RejectedError, match="AG-RCP-010"):
        RECIPE.attach(attachment, tiny_model("qwen3"))
    assert not has_attachments(model)
