# SPDX-License-Identifier: Apache-2.0
"""Experts: a stranger's small model beside another, mixed in token by token, gone without trace."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from allograft.errors import AllograftError, RejectedError
from allograft.evaluate.bootstrap import Resampling
from allograft.evaluate.gate import GateRules
from allograft.evaluate.loss import measure, prepare_windows
from allograft.evaluate.spectrum import weigh_attachment
from allograft.packet.tensors import check_file
from allograft.privacy.dp import DpConstants
from allograft.privacy.egress import rebuild_file, with_wire_dtype
from allograft.privacy.shapes import allow_list, read_base
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
    Verdict,
)
from allograft.recipes.blocks import describe_model
from allograft.recipes.blueprint import build_config, read_settings, tensor_shapes
from allograft.recipes.controls import null_packet
from allograft.recipes.expert import ExpertRecipe
from allograft.recipes.export import export_merged
from allograft.recipes.facts import ExpertFacts, PromptFacts
from allograft.recipes.lora import LoraRecipe
from allograft.recipes.mixture import has_experts
from allograft.recipes.patch import folded, has_attachments
from allograft.recipes.plan import ExpertPlan, LoopPlan, LoraPlan
from allograft.recipes.prompt import PromptRecipe
from allograft.recipes.snapshot import state_digest
from allograft.recipes.stack import Stack
from allograft_client import tasks
from allograft_client.recipient import Choice
from kit.tiny import FAMILIES, generate, logits_of, tiny_model, tiny_tokens, tiny_windows

LOOP = LoopPlan(steps=6, batch_windows=24, learning_rate=1e-2, warmup_steps=2)
RECIPE = ExpertRecipe()
PACKET = "ef" * 16
BASE = "b" * 64


def stranger(family: str = "llama"):
    """A recipient's model: another seed, another width, the same vocabulary."""
    return tiny_model(family, seed=7, **({} if family == "gpt2" else {"hidden_size": 64}))


def extract(workdir: Path, family: str = "llama", plan: ExpertPlan | None = None) -> Extract:
    base = tiny_model(family)
    base.save_pretrained(workdir / "base")
    return RECIPE.extract(Donor(base, tiny_windows(), workdir), Plan(plan or ExpertPlan(), LOOP))


def fit(workdir: Path, made: Extract, model, bases: bool = True) -> Attachment:
    payload = Payload("expert", PACKET, workdir, made.facts.to_json(), BASE)
    return RECIPE.fit(payload, Recipient(model, bases={BASE: workdir / "base"} if bases else {}))


def twin(workdir: Path, made: Extract):
    """The expert as the donor has it, put together by hand."""
    model = tiny_model(made.facts.shape.family)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in load_file(workdir / "expert.safetensors").items():
            named[name].copy_(value)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_expert_learns_and_is_rebuilt_from_facts_alone(family: str, tmp_path: Path) -> None:
    made = extract(tmp_path, family)
    assert made.report["last_loss"] < made.report["first_loss"]
    model = stranger()
    attachment = replace(fit(tmp_path, made, model, bases=False), dose=1.0)
    digest, before = state_digest(model), logits_of(model)
    handle = RECIPE.attach(attachment, model)
    expected = logits_of(twin(tmp_path, made)).log_softmax(-1)
    assert torch.equal(logits_of(model), expected)
    handle.set_dose(0.0)
    assert torch.equal(logits_of(model), before)
    assert state_digest(model) == digest
    RECIPE.detach(handle)
    assert torch.equal(logits_of(model), before)
    assert not has_attachments(model)


@pytest.mark.parametrize("dose", [0.25, 0.9])
def test_ensemble_is_the_weighted_mean_of_probabilities(dose: float, tmp_path: Path) -> None:
    made, model = extract(tmp_path, "qwen3"), stranger("gpt2")
    ours, theirs = (logits_of(each).softmax(-1) for each in (model, twin(tmp_path, made)))
    RECIPE.attach(replace(fit(tmp_path, made, model), dose=dose), model)
    mixed = logits_of(model).exp()
    torch.testing.assert_close(mixed, (1 - dose) * ours + dose * theirs)
    torch.testing.assert_close(mixed.sum(-1), torch.ones(mixed.shape[:-1]))


@pytest.mark.parametrize("carrier", ["whole", "organ", "lora"])
def test_difference_adds_what_the_expert_learnt(carrier: str, tmp_path: Path) -> None:
    made = extract(tmp_path, "gemma2", ExpertPlan(carrier, "difference", blocks=1))
    model, base = stranger(), tiny_model("gemma2")
    own = logits_of(model)
    attachment = fit(tmp_path, made, model)
    RECIPE.attach(replace(attachment, dose=0.5), model)
    beside = stranger()
    RECIPE.attach(replace(as_ensemble(attachment), dose=1.0), beside)
    learnt = logits_of(beside) - logits_of(base).log_softmax(-1)
    assert learnt.abs().max() > 0.1
    expected = (own.log_softmax(-1) + 0.5 * learnt).log_softmax(-1)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)


def as_ensemble(attachment: Attachment) -> Attachment:
    assert isinstance(attachment.facts, ExpertFacts)
    return replace(attachment, facts=replace(attachment.facts, mixing="ensemble"))


@pytest.mark.parametrize("carrier", ["organ", "lora"])
def test_change_of_a_base_becomes_the_model_that_the_donor_had(
    carrier: str, tmp_path: Path
) -> None:
    from allograft.recipes.organ import OrganRecipe

    made, model = extract(tmp_path, "qwen2", ExpertPlan(carrier, blocks=2)), stranger()
    changed = tiny_model("qwen2")
    recipe = OrganRecipe() if carrier == "organ" else LoraRecipe()
    name = "organ" if carrier == "organ" else "adapter_model"
    (tmp_path / f"{name}.safetensors").hardlink_to(tmp_path / "expert.safetensors")
    facts = made.facts.change.to_json()
    recipe.attach(
        recipe.fit(Payload(carrier, PACKET, tmp_path, facts), Recipient(changed)), changed
    )
    RECIPE.attach(replace(fit(tmp_path, made, model), dose=1.0), model)
    with folded(changed):
        assert torch.equal(logits_of(model), logits_of(changed).log_softmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_with_a_cache_are_those_without(family: str, tmp_path: Path) -> None:
    """For each family as recipient and as expert: 32 greedy tokens, and logits one by one."""
    plan = ExpertPlan("organ", "difference", blocks=1)
    made, model = extract(tmp_path, family, plan), stranger(family)
    plain = generate(model, use_cache=True)
    handle = RECIPE.attach(replace(fit(tmp_path, made, model), dose=0.7), model)
    assert generate(model, use_cache=True) == generate(model, use_cache=False)
    ids, cache, steps = tiny_tokens(2, 14), None, []
    for begin, end in ((0, 8), *((at, at + 1) for at in range(8, 14))):
        with torch.no_grad():
            out = model(input_ids=ids[:, begin:end], use_cache=True, **(cache or {}))
        name = "cache" if "cache" in out else "past_key_values"
        cache = {name: out[name]}
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), logits_of(model, ids), rtol=1e-3, atol=1e-3)
    RECIPE.detach(handle)
    assert generate(model, use_cache=True) == plain


def test_experts_cache_follows_beams(tmp_path: Path) -> None:
    made, model = extract(tmp_path, "gemma2"), stranger("gpt2")
    RECIPE.attach(replace(fit(tmp_path, made, model), dose=0.5), model)
    assert generate(model, True, num_beams=3) == generate(model, False, num_beams=3)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_texts_padded_on_the_left_go_on_as_they_do_alone(family: str, tmp_path: Path) -> None:
    made, model = extract(tmp_path, family), stranger(family)
    RECIPE.attach(replace(fit(tmp_path, made, model), dose=0.5), model)
    rows = tiny_tokens(3, 12)
    lengths = [12, 5, 8]
    ids, mask = torch.zeros_like(rows), torch.zeros_like(rows)
    for number, length in enumerate(lengths):
        ids[number, 12 - length :] = rows[number, :length]
        mask[number, 12 - length :] = 1
    plan = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **plan)[:, 12:]
    for number, length in enumerate(lengths):
        alone = rows[number : number + 1, :length]
        said = model.generate(alone, attention_mask=torch.ones_like(alone), **plan)
        assert said[0, length:].tolist() == together[number].tolist()


@pytest.mark.parametrize("mixing", ["ensemble", "difference"])
def test_donors_audits_read_the_experts_own_words_whatever_its_gate_and_mixing(
    mixing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, model = extract(tmp_path, plan=ExpertPlan("whole", mixing, gate=0.99)), stranger()
    attachment = fit(tmp_path, made, model)
    read: list[torch.Tensor] = []

    def stop(*_args: object, **_named: object) -> None:
        raise InterruptedError

    people, loaded = SimpleNamespace(canaries=None), SimpleNamespace(model=model, tokenizer=None)
    for name, stand_in in (
        ("_load", lambda _task: loaded),
        ("read_people", lambda _path: people),
        ("_audited", lambda *_args: None),
        ("_fit", lambda *_args: (RECIPE, attachment)),
        ("read_all", lambda model, *_args: read.append(logits_of(model))),
        ("Readings", stop),
    ):
        monkeypatch.setattr(tasks, name, stand_in)
    with pytest.raises(InterruptedError):
        tasks._audit({"people": "people", "claim": None}, lambda _stage: None)
    assert torch.equal(read[0], logits_of(stranger()))
    assert torch.equal(read[1], logits_of(twin(tmp_path, made)).log_softmax(-1))


def test_unsure_expert_is_not_heard(tmp_path: Path) -> None:
    made, model = extract(tmp_path), stranger()
    own = logits_of(model).log_softmax(-1)
    sure = logits_of(twin(tmp_path, made)).softmax(-1).amax(-1)
    gate = float(sure.median())
    attachment = fit(tmp_path, made, model)
    facts = replace(attachment.facts, gate=gate)
    RECIPE.attach(replace(attachment, dose=0.5, facts=facts), model)
    mixed, heard = logits_of(model), sure >= gate
    assert heard.any()
    assert not heard.all()
    assert torch.equal(mixed[~heard], own[~heard])
    assert (mixed[heard] - own[heard]).abs().amax(-1).min() > 0


def test_recipient_goes_on_alone_where_the_expert_knows_no_more_positions(tmp_path: Path) -> None:
    base = tiny_model("gpt2", n_positions=16)
    made = RECIPE.extract(Donor(base, tiny_windows(), tmp_path), Plan(ExpertPlan(), LOOP))
    model = stranger()
    own = logits_of(model)
    RECIPE.attach(replace(fit(tmp_path, made, model, bases=False), dose=0.5), model)
    mixed = logits_of(model)
    assert not torch.allclose(mixed[:, :16].softmax(-1), own[:, :16].softmax(-1))
    assert torch.equal(mixed[:, 16:], own[:, 16:])
    assert generate(model, use_cache=True) == generate(model, use_cache=False)


def test_several_experts_mix_alike_in_any_order(tmp_path: Path) -> None:
    made, model = extract(tmp_path), stranger()
    one = replace(fit(tmp_path, made, model), dose=0.3)
    other = replace(null_packet(one, model, seed=2), attachment_id="0" * 32, dose=0.6)
    found = []
    for order in ((one, other), (other, one)):
        handles = [RECIPE.attach(each, model) for each in order]
        found.append(logits_of(model))
        for handle in handles:
            RECIPE.detach(handle)
    assert torch.equal(*found)
    assert not has_experts(model)


def test_expert_speaks_beside_a_model_that_a_lora_changed(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    made, model = extract(tmp_path), stranger()
    donor = Donor(stranger(), tiny_windows(), tmp_path / "lora")
    lora = LoraRecipe().extract(donor, Plan(LoraPlan(2), LOOP))
    payload = Payload("lora", "aa" * 16, tmp_path / "lora", lora.facts.to_json())
    expert = RECIPE.attach(replace(fit(tmp_path, made, model), dose=0.5), model)
    adapter = LoraRecipe().attach(LoraRecipe().fit(payload, Recipient(model)), model)
    both = logits_of(model)
    RECIPE.detach(expert)
    theirs = logits_of(twin(tmp_path, made)).softmax(-1)
    torch.testing.assert_close(both.exp(), (logits_of(model).softmax(-1) + theirs) / 2)
    LoraRecipe().detach(adapter)
    assert torch.equal(logits_of(model), logits_of(stranger()))


def test_loss_of_the_forward_pass_is_the_mixtures(tmp_path: Path) -> None:
    made, model = extract(tmp_path), stranger()
    RECIPE.attach(replace(fit(tmp_path, made, model), dose=0.5), model)
    ids = tiny_tokens()
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
    said = nn.functional.nll_loss(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, said)


def test_harness_measures_the_mixture(tmp_path: Path) -> None:
    made, model = extract(tmp_path), stranger()
    prepared = prepare_windows(tiny_windows())
    before = measure(model, prepared).nats_per_token
    RECIPE.attach(replace(fit(tmp_path, made, model), dose=0.5), model)
    assert measure(model, prepared).nats_per_token < before


def test_refuses_what_it_cannot_follow_token_by_token(tmp_path: Path) -> None:
    made, model = extract(tmp_path), stranger()
    ids = tiny_tokens()
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        RECIPE.attach(replace(fit(tmp_path, made, model), dose=0.5), model)
        name = "cache" if "cache" in out else "past_key_values"
        with pytest.raises(RejectedError, match="AG-RCP-025"):
            model(input_ids=ids[:, :1], use_cache=True, **{name: out[name]})
        with pytest.raises(RejectedError, match="AG-RCP-025"):
            generate(model, use_cache=True, cache_implementation="static")
        with pytest.raises(RejectedError, match="AG-RCP-025"):
            model(inputs_embeds=model.get_input_embeddings()(ids))


def test_null_of_an_expert_is_noise_around_its_base(tmp_path: Path) -> None:
    made, model = extract(tmp_path, plan=ExpertPlan("organ", blocks=1)), stranger()
    attachment = fit(tmp_path, made, model)
    null = null_packet(attachment, model, seed=1)
    moved = 0.0
    for name, value in attachment.tensors.items():
        if name.startswith("base."):
            assert torch.equal(null.tensors[name], value)
            twin_name = name.replace("base.", "expert.", 1)
            moved += float((null.tensors[twin_name] - value).norm() ** 2)
    change = sum(
        float((v - attachment.tensors[n.replace("expert.", "base.", 1)]).norm() ** 2)
        for n, v in attachment.tensors.items()
        if n.startswith("expert.")
    )
    assert math.isclose(moved, change, rel_tol=1e-3)
    RECIPE.attach(null, model)
    assert torch.isfinite(logits_of(model)).all()


def test_trial_judges_an_expert_like_any_packet(tmp_path: Path) -> None:
    from allograft.evaluate.trial import OwnText, Subject, TrialPlan, run_trial

    class Numbers:
        """Texts are numbers with spaces between."""

        def __call__(self, texts: list[str], verbose: bool) -> dict[str, list[list[int]]]:
            return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    def texts(seed: int) -> list[str]:
        rows = tiny_windows(80, seed=seed).tokens.tolist()
        return [" ".join(map(str, row[: 9 + number % 8])) for number, row in enumerate(rows)]

    made, model = extract(tmp_path), stranger()
    attachment = fit(tmp_path, made, model)
    rules = GateRules(max_retention_loss=5.0, resampling=Resampling(resamples=200))
    kept = [" ".join(map(str, row)) for row in tiny_tokens(80, 16, seed=9).tolist()]
    report = run_trial(
        Subject(RECIPE, attachment, model, Numbers()), OwnText(texts(6), kept), TrialPlan(rules)
    )
    assert report.removals == 3 + 1 + 3
    assert report.decision.gain.value > 0
    assert not has_experts(model)


def card(model, **changes: object) -> ModelCard:
    return replace(ModelCard("c" * 64, "t" * 64, describe_model(model.config)), **changes)


def test_needs_the_tokenizer_and_only_for_a_change_the_base(tmp_path: Path) -> None:
    whole, model = extract(tmp_path), stranger("gpt2")

    def judge(made: Extract, model_card: ModelCard):
        declared = Declaration("expert", BASE, "t" * 64, made.facts.to_json())
        found = RECIPE.check(declared, model_card)
        return found.level, found.code

    assert judge(whole, card(model)) == ("behavioural", "")
    assert judge(whole, card(model, tokenizer_digest="u" * 64)) == ("refuse", "AG-RCP-011")
    other = replace(card(model).shape, vocab=62)
    assert judge(whole, card(model, shape=other)) == ("refuse", "AG-RCP-011")
    for plan in (ExpertPlan("lora"), ExpertPlan("whole", "difference")):
        workdir = tmp_path / plan.carrier
        workdir.mkdir()
        change = extract(workdir, plan=plan)
        assert judge(change, card(model)) == ("refuse", "AG-RCP-014")
        assert judge(change, card(model, bases=frozenset({BASE}))) == ("behavioural", "")
        with pytest.raises(RejectedError, match="AG-RCP-014"):
            fit(workdir, change, model, bases=False)


def test_site_puts_an_expert_beside_another_model_than_its_base(tmp_path: Path) -> None:
    made, model = extract(tmp_path), stranger("gpt2")
    declared = Declaration("expert", BASE, "t" * 64, made.facts.to_json())
    own, other = (
        Choice(None, RECIPE.check(declared, card(model, weights_digest=digest)))
        for digest in (BASE, "d" * 64)
    )
    relative = Choice(None, Verdict("lineage", "", numbers={"lineage_cosine": 0.95}))
    refused = Choice(None, Verdict("refuse", "", "AG-RCP-011"))
    closest = sorted((refused, own, other, relative), key=lambda choice: choice.remoteness)
    assert closest == [relative, other, own, refused]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("carrier", ["whole", "organ"])
def test_egress_admits_exactly_what_facts_and_base_call_for(
    family: str, carrier: str, tmp_path: Path
) -> None:
    made = extract(tmp_path, family, ExpertPlan(carrier))
    facts = with_wire_dtype(made.facts.to_json(), "bf16")
    allowed = allow_list("expert", facts, read_base(tmp_path / "base"))
    (tmp_path / "out").mkdir()
    part = tmp_path / "out" / "expert.safetensors"
    rebuild_file(tmp_path / "expert.safetensors", part, allowed)
    with part.open("rb") as handle:
        assert {entry.name for entry in check_file(handle).table.entries} == set(allowed)
    model = stranger()
    payload = Payload("expert", PACKET, tmp_path / "out", facts, BASE)
    attachment = RECIPE.fit(payload, Recipient(model, bases={BASE: tmp_path / "base"}))
    RECIPE.attach(replace(attachment, dose=0.5), model)
    assert torch.isfinite(logits_of(model)).all()
    tensors = load_file(tmp_path / "expert.safetensors")
    save_file(tensors | {"smuggled": torch.zeros(1)}, tmp_path / "expert.safetensors")
    with pytest.raises(RejectedError, match="AG-PRV-040"):
        rebuild_file(tmp_path / "expert.safetensors", part, allowed)


def test_embeddings_and_head_do_not_tell_which_tokens_the_text_held(tmp_path: Path) -> None:
    for family, names in (
        ("gpt2", ("transformer.wte.weight", "transformer.wpe.weight")),
        ("llama", ("model.embed_tokens.weight", "lm_head.weight")),
    ):
        workdir = tmp_path / family
        workdir.mkdir()
        extract(workdir, family)
        sent, base = (
            load_file(workdir / "expert.safetensors"),
            dict(tiny_model(family).named_parameters()),
        )
        assert all(torch.equal(sent[name], base[name]) for name in names)
        changed = [name for name in sent if not torch.equal(sent[name], base[name])]
        assert len(changed) == len(sent) - len(names)


def test_private_step_trains_a_whole_expert(tmp_path: Path) -> None:
    constants = DpConstants(0.5, 0.5, 4, 1.0, 12.0, 1e-3, 2)
    plan = Plan(ExpertPlan(), replace(LOOP, steps=4), constants)
    made = RECIPE.extract(Donor(tiny_model("llama"), tiny_windows(), tmp_path), plan)
    assert made.report["noise"]
    again = fit(tmp_path, made, stranger(), bases=False)
    assert all(torch.isfinite(value).all() for value in again.tensors.values())


def test_donors_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text")
    digest = state_digest(model)
    for carrier in ("whole", "organ", "lora"):
        RECIPE.extract(
            Donor(model, tiny_windows(), tmp_path), Plan(ExpertPlan(carrier, blocks=1), LOOP)
        )
        assert state_digest(model) == digest
        assert all(value.requires_grad for value in model.parameters())


def test_attachment_needs_nothing_but_itself(tmp_path: Path) -> None:
    made, model = extract(tmp_path, plan=ExpertPlan("organ", "difference")), stranger()
    attachment = replace(fit(tmp_path, made, model), dose=0.5)
    save_attachment(attachment, tmp_path / "kept")
    (tmp_path / "base" / "config.json").unlink()
    RECIPE.attach(load_attachment(tmp_path / "kept"), model)
    again = stranger()
    RECIPE.attach(attachment, again)
    assert torch.equal(logits_of(model), logits_of(again))


def test_screens_see_what_an_expert_learnt_over_its_base(tmp_path: Path) -> None:
    made, model = extract(tmp_path), stranger()
    attachment = fit(tmp_path, made, model)
    figures = weigh_attachment(attachment, model)
    assert figures["self_attn.q_proj.weight"].frobenius > 0
    assert figures["model.norm.weight"].frobenius > 0
    assert figures["lm_head.weight"].frobenius == 0
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        moved = {f"expert.{name}": attachment.tensors[f"expert.{name}"] + 1}
        forged = replace(attachment, tensors={**attachment.tensors, **moved})
        assert weigh_attachment(forged, model)[name].frobenius > 0
    assert not weigh_attachment(fit(tmp_path, made, model, bases=False), model)


def test_cost_is_reported_as_a_multiple_of_the_recipient_alone(tmp_path: Path) -> None:
    made, model = extract(tmp_path), stranger()
    assert fit(tmp_path, made, model).report["cost_ratio"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"mixing": "average"},
        {"gate": 1.0},
        {"gate": float("nan")},
        {"carrier": "expert"},
        {"carrier": "organ"},
        {"settings": {"auto_map": "x"}},
        {"settings": {"hidden_act": "os.system"}},
        {"settings": {"rms_norm_eps": True}},
        {"settings": {"max_position_embeddings": -1}},
        {"inner": {"rank": 1}},
        *(
            {"shape": {name: 0}}
            for name in ("hidden", "vocab", "heads", "kv_heads", "head_dim", "intermediate")
        ),
        {"shape": {"heads": 3}},
        {"shape": {"rope": '{"rope_type":"none"}'}},
        {"shape": {"rope": '{"rope_theta":1e4,"rope_type":"default","x":1}'}},
        {"shape": {"rope": '{"rope_theta":[1],"rope_type":"default"}'}},
        {"shape": {"rope": '{"rope_theta":true,"rope_type":"default"}'}},
        {"shape": {"rope": '{"factor":2,"rope_theta":0,"rope_type":"linear"}'}},
        {"shape": {"rope": '{"rope_theta":10000,"rope_type":"linear"}'}},
        {
            "shape": {
                "rope": '{"partial_rotary_factor":1000000,"rope_theta":10000,"rope_type":"default"}'
            }
        },
        {
            "shape": {
                "rope": '{"long_factor":["x"],"original_max_position_embeddings":8,'
                '"rope_theta":10000,"rope_type":"longrope","short_factor":[1]}'
            }
        },
        {
            "shape": {
                "rope": '{"full_attention":{"rope_theta":10000,"rope_type":"default"}}',
            }
        },
    ],
)
def test_refuses_facts_that_no_donor_writes(changes: dict, tmp_path: Path) -> None:
    facts = whole_facts()
    shape = replace(facts.shape, **changes.get("shape", {}))
    with pytest.raises(RejectedError, match=r"AG-RCP-002|AG-IN-003"):
        replace(facts, **{**changes, "shape": shape})


def whole_facts(family: str = "llama", **changes: object) -> ExpertFacts:
    config = tiny_model(family, **changes).config
    settings = read_settings(config)
    shape = describe_model(config)
    return ExpertFacts(shape, "whole", "ensemble", 0.0, "float32", settings, {})


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
)
def test_rotations_of_stock_models_are_rebuilt(rope: dict) -> None:
    facts = whole_facts("llama", rope_parameters={"rope_theta": 10000.0, **rope})
    assert describe_model(build_config(facts)) == facts.shape


def test_types_of_layers_rotate_differently_in_one_family_at_one_depth() -> None:
    facts = whole_facts("gemma3_text")
    assert describe_model(build_config(facts)) == facts.shape
    deeper = facts.shape.rope.replace('"rope_type":"default"', '"rope_type":{}')
    for rope in (deeper, f'{{"other":{facts.shape.rope}}}', '{"rope_type":"default"}'):
        with pytest.raises(RejectedError, match=r"AG-RCP-002|AG-IN-003"):
            replace(facts, shape=replace(facts.shape, rope=rope))


def test_facts_of_a_change_leave_no_room_for_others(tmp_path: Path) -> None:
    facts = extract(tmp_path, plan=ExpertPlan("lora")).facts
    for name in ("shape", "dtype"):
        with pytest.raises(RejectedError, match="AG-RCP-002"):
            replace(facts, inner={**facts.inner, name: {"anything": "at all"}})


def test_refuses_buffers_that_no_payload_pays_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build_config(whole_facts())
    assert tensor_shapes(config)
    hoard = nn.Module()
    hoard.register_buffer("table", torch.empty(1 << 40, device="meta"))
    monkeypatch.setattr(
        "allograft.recipes.blueprint.AutoModelForCausalLM.from_config", lambda _config: hoard
    )
    with pytest.raises(RejectedError, match="AG-RCP-002"):
        tensor_shapes(config)


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (RuntimeError("shapes cannot be multiplied"), "AG-RCP-002"),
        (ValueError("x"), "AG-RCP-002"),
        (AssertionError(), "AG-RCP-002"),
        (MemoryError(), "AG-RCP-027"),
        (torch.OutOfMemoryError("x"), "AG-RCP-027"),
    ],
)
def test_expert_that_cannot_run_is_refused_with_a_code(
    raised: Exception, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, model = extract(tmp_path), stranger("gpt2")
    attachment = fit(tmp_path, made, model, bases=False)

    def fail(*_args: object, **_named: object) -> None:
        raise raised

    monkeypatch.setattr(LlamaForCausalLM, "forward", fail)
    with pytest.raises(AllograftError, match=code):
        RECIPE.attach(attachment, model)
    with pytest.raises(AllograftError, match=code):
        fit(tmp_path, made, model, bases=False)
    assert not has_attachments(model)


def test_whole_expert_and_the_base_at_hand_have_the_same_settings(tmp_path: Path) -> None:
    made, model = extract(tmp_path, plan=ExpertPlan("whole", "difference")), stranger()
    fit(tmp_path, made, model)
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    with pytest.raises(RejectedError, match="AG-RCP-010"):
        fit(tmp_path, made, model)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_expert_follows_token_by_token_behind_a_prompt(family: str, tmp_path: Path) -> None:
    made, model = extract(tmp_path), stranger(family)
    shape = describe_model(model.config)
    vectors = {"prompt_embeddings": torch.randn(5, shape.hidden)}
    prompt = Attachment("prompt", "aa" * 16, PromptFacts(shape, 5, "float32"), vectors, dose=1.0)
    seat = PromptRecipe().attach(prompt, model)
    alone = logits_of(model).softmax(-1)
    expert = replace(fit(tmp_path, made, model, bases=False), dose=0.5)
    RECIPE.attach(expert, model)
    theirs = logits_of(twin(tmp_path, made)).softmax(-1)
    torch.testing.assert_close(logits_of(model).exp(), (alone + theirs) / 2)
    assert generate(model, use_cache=True) == generate(model, use_cache=False)
    PromptRecipe().detach(seat)
    assert generate(model, use_cache=True) == generate(model, use_cache=False)


@pytest.mark.parametrize("changes", [{"layers": 3}, {"intermediate": 8}, {"family": "gpt2"}])
def test_refuses_shapes_that_contradict_settings_or_payload(changes: dict, tmp_path: Path) -> None:
    made, model = extract(tmp_path), stranger()
    wrong = replace(made, facts=replace(made.facts, shape=replace(made.facts.shape, **changes)))
    with pytest.raises(RejectedError, match=r"AG-RCP-002|AG-RCP-003"):
        fit(tmp_path, wrong, model, bases=False)
    assert build_config(made.facts).num_hidden_layers == made.facts.shape.layers


def test_refuses_double_use_and_bad_doses(tmp_path: Path) -> None:
    made, model = extract(tmp_path), stranger()
    attachment = fit(tmp_path, made, model)
    handle = RECIPE.attach(attachment, model)
    with pytest.raises(RejectedError, match="AG-RCP-023"):
        RECIPE.attach(attachment, model)
    with pytest.raises(RejectedError, match="AG-RCP-022"):
        RECIPE.extract(Donor(model, tiny_windows(), tmp_path), Plan(ExpertPlan(), LOOP))
    with pytest.raises(RejectedError, match="AG-RCP-021"):
        handle.set_dose(1.5)
    with pytest.raises(RejectedError, match="AG-RCP-024"):
        export_merged(Stack(model), None, tmp_path / "merged")
    RECIPE.detach(handle)
    with pytest.raises(RejectedError, match="AG-RCP-023"):
        RECIPE.detach(handle)
    with pytest.raises(RejectedError, match="AG-RCP-023"):
        handle.set_dose(0.5)
