# SPDX-License-Identifier: Apache-2.0
"""The delta: trained in place, packed small, read strictly, and gone without a trace."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from allograft.errors import RejectedError, UnavailableError
from allograft.evaluate import spectrum
from allograft.evaluate.spectrum import weigh_attachment
from allograft.packet.delta import EMBEDDING, DeltaLayout
from allograft.privacy.dp import DpConstants
from allograft.provenance.lineage import digest_weights
from allograft.recipes import factors, patch
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
from allograft.recipes.blocks import describe_model
from allograft.recipes.controls import null_packet
from allograft.recipes.delta import (
    PAYLOAD,
    DeltaRecipe,
    PackedChange,
    delta_places,
    extract_difference,
    packed_directions,
)
from allograft.recipes.export import export_peft
from allograft.recipes.factors import squared_norm, unpack
from allograft.recipes.facts import DeltaFacts
from allograft.recipes.loop import token_losses
from allograft.recipes.lora import LoraRecipe
from allograft.recipes.organ import OrganRecipe
from allograft.recipes.patch import has_attachments
from allograft.recipes.plan import DeltaPlan, LoopPlan, LoraPlan, OrganPlan, Step
from allograft.recipes.snapshot import state_digest
from kit.tiny import FAMILIES, LAYERS, generate, logits_of, tiny_model, tiny_windows, write_model

LOOP = LoopPlan(steps=6, batch_windows=24, learning_rate=1e-2, warmup_steps=2)
RECIPE = DeltaRecipe()
PACKET = "ef" * 16
WHOLE = DeltaPlan(vectors=True, embeddings=True)


def extract(model, workdir: Path, plan: DeltaPlan | None = None, loop=LOOP, **private) -> Extract:
    workdir.mkdir(exist_ok=True)
    chosen = Plan(plan or DeltaPlan(), loop, **private)
    return RECIPE.extract(Donor(model, tiny_windows(), workdir), chosen)


def fit(model, workdir: Path, made: Extract, packet_id: str = PACKET) -> Attachment:
    return RECIPE.fit(Payload("delta", packet_id, workdir, made.facts.to_json()), Recipient(model))


def loss_of(model) -> float:
    windows = tiny_windows()
    with torch.no_grad():
        losses = token_losses(model(windows.tokens).logits, windows.tokens, windows.lengths)
    return float(losses.sum() / (windows.lengths - 1).sum())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", [DeltaPlan(), DeltaPlan(bits=8), WHOLE])
def test_delta_learns_fits_and_leaves_the_base_as_it_was(
    family: str, plan: DeltaPlan, tmp_path: Path
) -> None:
    model = tiny_model(family)
    digest, before = state_digest(model), logits_of(model)
    made = extract(model, tmp_path, plan)
    assert state_digest(model) == digest
    assert all(value.requires_grad and value.grad is None for value in model.parameters())
    assert made.report["last_loss"] < made.report["first_loss"]
    attachment = fit(model, tmp_path, made)
    start = loss_of(model)
    handle = RECIPE.attach(attachment, model)
    full = logits_of(model)
    assert loss_of(model) < start - 0.5
    handle.set_dose(0.5)
    assert 0 < (logits_of(model) - before).norm() < (full - before).norm()
    handle.set_dose(0.0)
    assert torch.equal(logits_of(model), before)
    handle.set_dose(1.0)
    assert torch.equal(logits_of(model), full)
    assert generate(model, use_cache=True) == generate(model, use_cache=False)
    RECIPE.detach(handle)
    assert state_digest(model) == digest
    assert not has_attachments(model)


def test_a_sixth_of_the_bytes_keeps_nine_tenths_of_the_gain(tmp_path: Path) -> None:
    """Against the full change of the same training, in float32."""
    model = tiny_model("llama")
    loop = replace(LOOP, steps=40, learning_rate=5e-3)
    made = extract(model, tmp_path / "work", loop=loop)
    start = loss_of(model)
    # The losses of training itself are those of the full change.
    whole = start - float(made.report["last_loss"])
    RECIPE.attach(fit(model, tmp_path / "work", made), model)
    packed = start - loss_of(model)
    matrices = [
        module.get_parameter(name)
        for target, (module, name) in delta_places(model).items()
        if target.startswith("blocks.") and module.get_parameter(name).ndim == 2
    ]
    bytes_whole = sum(4 * value.numel() for value in matrices)
    assert made.report["payload_bytes"] < bytes_whole / 6
    assert packed > 0.9 * whole > 0.9


@pytest.mark.parametrize("bits", [4, 8])
def test_the_payload_stays_within_its_budget(bits: int, tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    kept = []
    for budget in (14_000, 20_000, 30_000):
        plan = DeltaPlan(bits=bits, budget_bytes=budget)
        made = extract(model, tmp_path / str(budget), plan)
        (file,) = made.files
        assert budget / 2 < file.stat().st_size <= budget
        kept.append(float(made.report["energy_kept"]))
    assert kept == sorted(kept)
    with pytest.raises(RejectedError, match="AG-RCP-035"):
        extract(model, tmp_path / "none", DeltaPlan(bits=bits, budget_bytes=100))


def test_the_figures_are_those_of_what_was_packed(tmp_path: Path) -> None:
    base, tuned = write_model(tmp_path / "base"), tiny_model("llama")
    torch.manual_seed(1)
    with torch.no_grad():
        for value in tuned.parameters():
            value.add_(0.02 * torch.randn_like(value))
    tuned.save_pretrained(tmp_path / "tuned")
    (tmp_path / "work").mkdir()
    made = difference(tmp_path, DeltaPlan(bits=4, energy=0.5, vectors=True))
    before = {n: v.detach().clone() for n, v in base.named_parameters()}
    RECIPE.attach(fit(base, tmp_path / "work", made), base)
    others, error, total, carried = dict(tuned.state_dict()), 0.0, 0.0, 0.0
    for name, value in base.state_dict().items():
        size = float((others[name] - before[name]).norm() ** 2)
        total += size
        if ".layers." in name:
            carried += size
        if ".layers." in name and value.ndim == 2:
            error += float((others[name] - value).norm() ** 2)
    matrices = sum(
        float((others[n] - v).norm() ** 2)
        for n, v in before.items()
        if ".layers." in n and v.ndim == 2
    )
    assert made.report["energy_kept"] == pytest.approx(1 - error / matrices, abs=1e-4)
    assert made.report["energy_in_reach"] == pytest.approx(carried / total, abs=1e-4)
    assert 0.45 < made.report["energy_kept"] < 0.55


def difference(folder: Path, plan: DeltaPlan, stage: str = "base", **changes: str) -> Extract:
    digest = changes.get("digest") or digest_weights(folder / "base")
    return extract_difference(
        folder / "base", folder / "tuned", plan, folder / "work", digest, stage
    )


def write_pair(folder: Path, family: str = "llama") -> None:
    """A base and what became of it by a low-rank change, where `difference` looks."""
    write_model(folder / "base", family)
    tuned = tiny_model(family)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for module, name in delta_places(tuned).values():
            value = module.get_parameter(name)
            if value.ndim == 2:
                left = torch.randn(len(value), 2, generator=generator)
                value.add_(0.05 * left @ torch.randn(2, value.shape[1], generator=generator))
            else:
                value.add_(0.05 * torch.randn(value.shape, generator=generator))
    tuned.save_pretrained(folder / "tuned")
    (folder / "work").mkdir()


@pytest.mark.parametrize("family", FAMILIES)
def test_two_snapshots_make_a_delta_that_turns_one_into_the_other(
    family: str, tmp_path: Path
) -> None:
    write_pair(tmp_path, family)
    # Rank two of every matrix: all of the change that a delta can carry.
    made = difference(tmp_path, replace(WHOLE, bits=8, energy=0.9999))
    model = tiny_model(family)
    RECIPE.attach(fit(model, tmp_path / "work", made), model)
    tuned = tiny_model(family)
    tuned.load_state_dict(load_file(tmp_path / "tuned" / "model.safetensors"), strict=False)
    tuned.tie_weights()
    wanted = {t: m.get_parameter(n) for t, (m, n) in delta_places(tuned).items()}
    for target, (module, name) in delta_places(model).items():
        error = (module.get_parameter(name) - wanted[target]).norm()
        assert error < 0.02 * wanted[target].norm()


def test_a_skill_names_its_anchor_and_stage(tmp_path: Path) -> None:
    write_pair(tmp_path)
    digest = digest_weights(tmp_path / "base")
    facts = difference(tmp_path, DeltaPlan(), "post-sft").facts
    assert isinstance(facts, DeltaFacts)
    assert (facts.anchor, facts.stage) == (digest, "post-sft")
    statement = Declaration("delta", digest, "b" * 64, facts.to_json())
    card = ModelCard("c" * 64, "b" * 64, describe_model(tiny_model("llama").config), 0.97)
    verdict = RECIPE.check(statement, card)
    assert verdict.level == "lineage"
    assert "post-sft" in verdict.reason
    assert RECIPE.check(statement, replace(card, lineage_cosine=0.1)).code == "AG-RCP-013"
    assert RECIPE.check(statement, replace(card, weights_digest=digest)).level == "exact"
    moved = replace(statement, base_weights_digest="d" * 64)
    assert RECIPE.check(moved, card).code == "AG-RCP-002"


def test_refuses_snapshots_that_are_not_what_is_declared(tmp_path: Path) -> None:
    write_pair(tmp_path)
    with pytest.raises(RejectedError, match="AG-RCP-012"):
        difference(tmp_path, DeltaPlan(), digest="0" * 64)
    for name, plan, code in (
        ("wider", DeltaPlan(), "AG-RCP-010"),
        ("same", DeltaPlan(), "AG-RCP-035"),
        ("same", DeltaPlan(bits=2), "AG-RCP-035"),
    ):
        changes = {"vocab_size": 77} if name == "wider" else {}
        tiny_model("llama", **changes).save_pretrained(tmp_path / name)
        digest = digest_weights(tmp_path / "base")
        with pytest.raises(RejectedError, match=code):
            extract_difference(
                tmp_path / "base", tmp_path / name, plan, tmp_path / "work", digest, "base"
            )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tied_embeddings_stay_one_tensor(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tie_word_embeddings=True)
    digest = state_digest(model)
    made = extract(model, tmp_path, DeltaPlan(embeddings=True))
    assert "head" not in made.facts.layout.ranks
    handle = RECIPE.attach(fit(model, tmp_path, made), model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert state_digest(model) != digest
    RECIPE.detach(handle)
    assert state_digest(model) == digest


def test_a_head_of_its_own_is_refused_by_a_base_with_tied_embeddings(tmp_path: Path) -> None:
    made = extract(tiny_model("llama"), tmp_path, DeltaPlan(embeddings=True))
    assert "head" in made.facts.layout.ranks
    with pytest.raises(RejectedError, match="AG-PKT-028"):
        fit(tiny_model("llama", tie_word_embeddings=True), tmp_path, made)


def test_embeddings_and_vectors_travel_only_when_asked_for(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    plain = extract(model, tmp_path / "plain")
    names = load_file(plain.files[0])
    assert not any("embedding" in name or name.endswith(".change") for name in names)
    whole = load_file(extract(model, tmp_path / "whole", WHOLE).files[0])
    assert "embedding.scale" in whole
    assert sum(name.endswith(".change") for name in whole) == LAYERS * 5


Spoil = Callable[[dict[str, torch.Tensor]], object]
_MATRIX = "blocks.1.mlp.up_proj.weight"
SPOILT: dict[str, tuple[Spoil, str]] = {
    "missing": (lambda t: t.pop(f"{_MATRIX}.int4"), "AG-RCP-003"),
    "unexpected": (lambda t: t.update(extra=torch.zeros(2)), "AG-RCP-003"),
    "one direction less": (
        lambda t: t.update({f"{_MATRIX}.int4": t[f"{_MATRIX}.int4"][1:].contiguous()}),
        "AG-RCP-003",
    ),
    "floats for numbers": (
        lambda t: t.update({f"{_MATRIX}.int4": t[f"{_MATRIX}.int4"].float()}),
        "AG-RCP-003",
    ),
    "numbers for floats": (
        lambda t: t.update({f"{_MATRIX}.scale": t[f"{_MATRIX}.scale"].to(torch.int8)}),
        "AG-RCP-003",
    ),
    "an infinite scale": (lambda t: t[f"{_MATRIX}.scale"].fill_(torch.inf), "AG-RCP-003"),
    "a scale that is no number": (lambda t: t[f"{_MATRIX}.scale"].fill_(torch.nan), "AG-RCP-003"),
    "a negative scale": (lambda t: t[f"{_MATRIX}.scale"].neg_(), "AG-RCP-003"),
    "minus eight": (lambda t: t[f"{_MATRIX}.int4"][:1, :1].fill_(0x08), "AG-PKT-027"),
    "minus eight above": (lambda t: t[f"{_MATRIX}.int4"][:1, :1].fill_(0x80), "AG-PKT-027"),
    "minus 128": (lambda t: t["embedding.int8"][:1, :1].fill_(-128), "AG-PKT-027"),
    "bits behind an odd row": (lambda t: t["head.int4"][:1, -1:].bitwise_or_(0x10), "AG-PKT-027"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_refuses_payloads_that_do_not_fit(how: str, tmp_path: Path) -> None:
    write_pair(tmp_path)
    made = difference(tmp_path, WHOLE)
    path = tmp_path / "work" / PAYLOAD
    tensors = load_file(path)
    made = with_wide_embedding(made, tensors)
    spoil, code = SPOILT[how]
    save_file(tensors, path)
    model = tiny_model("llama")
    digest = state_digest(model)
    assert fit(model, tmp_path / "work", made).tensors.keys() == tensors.keys()
    spoil(tensors)
    save_file(tensors, path)
    with pytest.raises(RejectedError, match=code):
        fit(model, tmp_path / "work", made)
    assert state_digest(model) == digest


def with_wide_embedding(made: Extract, tensors: dict[str, torch.Tensor]) -> Extract:
    """Numbers of 8 bits where the allocation had found none worth them."""
    facts = made.facts
    assert isinstance(facts, DeltaFacts)
    ((wide, narrow),) = facts.layout.ranks[EMBEDDING]
    assert wide == 0
    tensors["embedding.int8"] = torch.ones(narrow, 61 + 32, dtype=torch.int8)
    del tensors["embedding.int4"]
    ranks = {**facts.layout.ranks, EMBEDDING: ((narrow, 0),)}
    return replace(made, facts=replace(facts, layout=DeltaLayout(ranks, facts.layout.vectors)))


def test_facts_must_agree_with_each_other(tmp_path: Path) -> None:
    facts = extract(tiny_model("llama"), tmp_path).facts.to_json()
    assert DeltaFacts.from_json(facts).to_json() == facts
    for change, code in (
        ({"ranks": {"mlp.up_proj.weight": [[1, 0]]}}, "AG-RCP-002"),
        ({"dtype": "int8"}, "AG-RCP-002"),
        ({"stage": "Post SFT"}, "AG-RCP-002"),
        ({"stage": "post-sft"}, "AG-RCP-002"),
        ({"anchor": "abc"}, "AG-IN-003"),
        ({"ranks": {"mlp.up_proj.weight": 4}}, "AG-PKT-028"),
        ({"more": 1}, "AG-IN-003"),
    ):
        with pytest.raises(RejectedError, match=code):
            DeltaFacts.from_json({**facts, **change})


def test_order_does_not_matter_beside_an_organ_and_an_adapter(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text")
    plain = state_digest(model)
    windows = tiny_windows()
    attachments = []
    for recipe, plan in (
        (RECIPE, WHOLE),
        (OrganRecipe(), OrganPlan(1, 1, 2)),
        (LoraRecipe(), LoraPlan(rank=2)),
        (RECIPE, DeltaPlan(bits=8)),
    ):
        key = str(len(attachments))
        (tmp_path / key).mkdir()
        made = recipe.extract(Donor(model, windows, tmp_path / key), Plan(plan, LOOP))
        payload = Payload(recipe.kind, key * 32, tmp_path / key, made.facts.to_json())
        attachments.append((recipe, recipe.fit(payload, Recipient(model))))
    whole, remainders = set(), set()
    for order in list(permutations(range(4)))[::5]:
        handles = {i: attachments[i][0].attach(attachments[i][1], model) for i in order}
        whole.add(state_digest(model))
        attachments[1][0].detach(handles[1])
        remainders.add(state_digest(model))
        for number in (0, 3, 2):
            attachments[number][0].detach(handles[number])
        assert state_digest(model) == plain
    assert len(whole) == len(remainders) == 1


def test_refuses_double_use_and_another_model(tmp_path: Path) -> None:
    model = tiny_model("mistral")
    made = extract(model, tmp_path)
    attachment = fit(model, tmp_path, made)
    handle = RECIPE.attach(attachment, model)
    with pytest.raises(RejectedError, match="AG-RCP-023"):
        RECIPE.attach(attachment, model)
    with pytest.raises(RejectedError, match="AG-RCP-022"):
        extract(model, tmp_path)
    with pytest.raises(RejectedError, match="AG-RCP-021"):
        handle.set_dose(1.5)
    RECIPE.detach(handle)
    with pytest.raises(RejectedError, match="AG-RCP-023"):
        RECIPE.detach(handle)
    with pytest.raises(RejectedError, match="AG-RCP-023"):
        handle.set_dose(0.5)
    for use in (fit, lambda other, *_: RECIPE.attach(attachment, other)):
        with pytest.raises(RejectedError, match="AG-RCP-010"):
            use(tiny_model("qwen3"), tmp_path, made)
    with pytest.raises(RejectedError, match="AG-RCP-021"):
        RECIPE.attach(replace(attachment, dose=-1.0), model)
    with pytest.raises(RejectedError, match="AG-RCP-035"):
        RECIPE.extract(Donor(model, tiny_windows(), tmp_path), Plan(LoraPlan(), LOOP))
    assert not has_attachments(model)


def test_a_failure_in_the_middle_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out at the tenth matrix, of a first attaching and of a change of dose."""
    model = tiny_model("llama")
    digest = state_digest(model)
    attachment = fit(model, tmp_path, extract(model, tmp_path))
    write, calls = patch._write, 0

    def failing(value: torch.nn.Parameter, patches: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise MemoryError
        write(value, patches)

    monkeypatch.setattr(patch, "_write", failing)
    with pytest.raises(UnavailableError, match="AG-RCP-027"):
        RECIPE.attach(attachment, model)
    assert state_digest(model) == digest
    assert not has_attachments(model)
    handle = RECIPE.attach(attachment, model)
    full, calls = state_digest(model), 0
    with pytest.raises(UnavailableError, match="AG-RCP-027"):
        handle.set_dose(0.25)
    assert state_digest(model) == full
    assert handle.attachment.dose == 1.0
    RECIPE.detach(handle)
    assert state_digest(model) == digest


def test_no_dense_change_of_a_whole_matrix_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin = tiny_model("gpt2"), tiny_model("gpt2")
    attachment = fit(model, tmp_path, extract(model, tmp_path, WHOLE))
    RECIPE.attach(attachment, model)
    sizes = []
    add = torch.Tensor.addmm_

    def watched(self: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        sizes.append(self.numel())
        return add(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "addmm_", watched)
    monkeypatch.setattr(patch, "_BLOCK_ENTRIES", 500)
    RECIPE.attach(attachment, twin)
    assert max(sizes) <= 500
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_a_write_unpacks_the_right_factor_once_and_lets_it_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = nn.Linear(16, 30, bias=False)
    before = matrix.weight.detach().clone()
    packed = factors.pack(factors.decompose(torch.randn(30, 16, generator=generator)), (2, 3))
    left, right = factors.unpack(packed, 30, 16)
    change = PackedChange(packed, (30, 16), 0.5)
    calls: list[object] = []
    unpack_right = factors.unpack_right
    monkeypatch.setattr(
        factors, "unpack_right", lambda *given: (calls.append(given), unpack_right(*given))[1]
    )
    monkeypatch.setattr(patch, "_BLOCK_ENTRIES", 16 * 7)
    for times in (1, 2):
        patch.patch([(matrix, "weight", change)], "owner")
        assert len(calls) == times
        assert not change._held
    after = before.addmm(left.T, right, alpha=0.5)
    torch.testing.assert_close(matrix.weight.detach(), after, rtol=1e-6, atol=1e-7)


def test_a_private_delta_trains_and_puts_the_base_back(tmp_path: Path) -> None:
    model = tiny_model("llama")
    digest = state_digest(model)
    private = DpConstants(0.5, 0.3, LOOP.steps, 1.0, 12.0, 1e-6, 1)
    for plan in (DeltaPlan(vectors=True), WHOLE):
        made = extract(model, tmp_path, plan, private=private)
        assert made.report["noise"] == "chacha20"
        assert state_digest(model) == digest
        start = loss_of(model)
        handle = RECIPE.attach(fit(model, tmp_path, made), model)
        assert loss_of(model) < start
        RECIPE.detach(handle)


def test_an_interrupted_run_leaves_the_base_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    model = tiny_model("llama")
    digest = state_digest(model)
    loop = replace(LOOP, snapshot_s=0.0)
    whole = load_file(extract(model, tmp_path / "whole", loop=loop).files[0])

    def stop(step: Step) -> None:
        if step.number == 3:
            raise KeyboardInterrupt

    (tmp_path / "work").mkdir()
    donor = Donor(model, tiny_windows(), tmp_path / "work", stop)
    with pytest.raises(KeyboardInterrupt):
        RECIPE.extract(donor, Plan(DeltaPlan(), loop))
    assert state_digest(model) == digest
    made = extract(model, tmp_path / "work", loop=loop)
    assert made.report["resumed_at"] == 3
    again = load_file(made.files[0])
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [PAYLOAD]


def test_training_does_not_pass_over_a_tuned_snapshot(tmp_path: Path) -> None:
    donor = Donor(tiny_model("gpt2"), tiny_windows(), tmp_path, tuned=tiny_model("gpt2"))
    with pytest.raises(RejectedError, match="AG-RCP-035"):
        RECIPE.extract(donor, Plan(DeltaPlan(), LOOP))


def test_the_null_has_the_norm_of_the_change_in_every_matrix(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    digest = state_digest(model)
    attachment = fit(model, tmp_path, extract(model, tmp_path, WHOLE))
    null = null_packet(attachment, model, seed=3)
    theirs, ours = packed_directions(attachment), packed_directions(null)
    places = delta_places(model)
    for target, packed in theirs.items():
        shape = places[target][0].get_parameter(places[target][1]).shape
        sizes = [squared_norm(*unpack(each[target], *shape)) for each in (theirs, ours)]
        assert sizes[1] == pytest.approx(sizes[0], rel=1e-4)
        assert not torch.equal(packed["scale"], ours[target]["scale"])
    handle = RECIPE.attach(null, model)
    assert state_digest(model) != digest
    RECIPE.detach(handle)
    assert state_digest(model) == digest
    again = null_packet(attachment, model, seed=3)
    assert all(torch.equal(value, again.tensors[name]) for name, value in null.tensors.items())


def test_the_screens_see_what_the_change_is(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    attachment = fit(model, tmp_path, extract(model, tmp_path, WHOLE))
    figures = weigh_attachment(attachment, model)
    before = {t: m.get_parameter(n).detach().clone() for t, (m, n) in delta_places(model).items()}
    RECIPE.attach(attachment, model)
    for name, found in figures.items():
        changes = [
            module.get_parameter(parameter).detach() - before[target]
            for target, (module, parameter) in delta_places(model).items()
            if target == name or (target.startswith("blocks.") and target.split(".", 2)[2] == name)
        ]
        norms = [float(change.norm()) for change in changes]
        assert found.frobenius == pytest.approx(max(norms), rel=1e-3)
        tops = [float(torch.linalg.matrix_norm(c.reshape(len(c), -1), 2)) for c in changes]
        assert found.sigma == pytest.approx(max(tops), rel=1e-2)
    assert {"embedding", "attn.c_attn.weight", "ln_1.bias"} <= figures.keys()


def test_products_of_factors_are_formed_in_parts_with_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    attachment = fit(model, tmp_path, extract(model, tmp_path))
    figures = weigh_attachment(attachment, model, seed=2)
    sizes: list[int] = []
    take = torch.Tensor.__getitem__

    def watched(self: torch.Tensor, index: object) -> torch.Tensor:
        found = take(self, index)
        if isinstance(index, torch.Tensor):
            sizes.append(found.numel())
        return found

    monkeypatch.setattr(torch.Tensor, "__getitem__", watched)
    monkeypatch.setattr(spectrum, "_PRODUCTS", 100_000)
    assert weigh_attachment(attachment, model, seed=2) == figures
    assert 50_000 < max(sizes) <= 100_000


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_peft_loads_a_delta_of_matrices_with_equal_logits(family: str, tmp_path: Path) -> None:
    import peft

    model = write_model(tmp_path / "base", family)
    attachment = fit(model, tmp_path / "work", extract(model, tmp_path / "work"))
    halved = replace(attachment, dose=0.5)
    export_peft(halved, tmp_path / "adapter", base=tmp_path / "base")
    with warnings.catch_warnings():
        # PEFT reads a property that transformers 5.23 has renamed.
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        twin = tiny_model(family)
        theirs = logits_of(peft.PeftModel.from_pretrained(twin, tmp_path / "adapter").eval())
    before = logits_of(model)
    RECIPE.attach(halved, model)
    torch.testing.assert_close(logits_of(model), theirs, rtol=1e-3, atol=1e-3)
    assert (theirs - before).norm() > 100 * (theirs - logits_of(model)).norm()


def test_a_delta_of_more_than_matrices_is_no_peft_adapter(tmp_path: Path) -> None:
    model = write_model(tmp_path / "base")
    for number, plan in enumerate((DeltaPlan(vectors=True), DeltaPlan(embeddings=True))):
        workdir = tmp_path / str(number)
        attachment = fit(model, workdir, extract(model, workdir, plan))
        with pytest.raises(RejectedError, match="AG-RCP-024"):
            export_peft(attachment, tmp_path / "adapter", base=tmp_path / "base")
    assert not (tmp_path / "adapter").exists()


def test_delta_can_be_stored_and_read_back(tmp_path: Path) -> None:
    model = tiny_model("mistral")
    attachment = fit(model, tmp_path, extract(model, tmp_path, WHOLE))
    save_attachment(attachment, tmp_path / "kept")
    again = load_attachment(tmp_path / "kept")
    assert again.facts == attachment.facts
    assert all(torch.equal(v, again.tensors[n]) for n, v in attachment.tensors.items())
