# SPDX-License-Identifier: Apache-2.0
"""Block surgery on every family: each trap of inserting layers has its claim here."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
)

from allograft.errors import RejectedError
from allograft.recipes import blocks
from allograft.recipes.snapshot import state_digest
from kit.tiny import FAMILIES, LAYERS, generate, logits_of, tiny_model, tiny_tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shaken(model: PreTrainedModel, source: int, count: int) -> list[torch.nn.Module]:
    """Copies of blocks with other weights, so that running them changes the logits."""
    made = blocks.copy_blocks(model, source, count)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for block in made:
            for value in block.parameters():
                value.add_(0.05 * torch.randn(value.shape, generator=generator))
    return made


def insert(model: PreTrainedModel, position: int = 2, source: int = 1, count: int = 2) -> None:
    made = shaken(model, source, count)
    blocks.insert_blocks(model, made, source, position, "organ-a")


@pytest.mark.parametrize("family", FAMILIES)
def test_inserted_blocks_run_cache_and_leave_without_a_trace(family: str) -> None:
    model = tiny_model(family)
    digest, before = state_digest(model), logits_of(model)
    config = model.config.to_dict()
    insert(model)
    assert blocks.count_blocks_run(model, tiny_tokens()) == LAYERS + 2
    assert not torch.equal(logits_of(model), before)
    assert generate(model, use_cache=True) == generate(model, use_cache=False)
    blocks.remove_blocks(model, "organ-a")
    assert state_digest(model) == digest
    assert torch.equal(logits_of(model), before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("family", FAMILIES)
def test_forgetting_the_depth_would_be_noticed(family: str) -> None:
    """The count of blocks run is what tells: cache and no-cache agree on the wrong answer."""
    model = tiny_model(family)
    insert(model)
    model.config.num_hidden_layers = LAYERS
    if family == "gpt2":  # it runs whatever is in its list
        assert blocks.count_blocks_run(model, tiny_tokens()) == LAYERS + 2
    else:
        assert blocks.count_blocks_run(model, tiny_tokens()) == LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_deeper_model_saves_and_loads(family: str, tmp_path) -> None:
    model = tiny_model(family)
    insert(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == LAYERS + 2
    assert torch.equal(logits_of(again), logits_of(model))
    assert generate(again, use_cache=True) == generate(model, use_cache=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_static_cache_holds_the_inserted_blocks(family: str) -> None:
    model = tiny_model(family)
    insert(model)
    static = generate(model, True, cache_implementation="static", disable_compile=True)
    assert static == generate(model, use_cache=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_types_travel_with_their_blocks(family: str) -> None:
    model = tiny_model(family)
    insert(model, position=1, source=2, count=2)  # one sliding and one full block
    types = blocks.layer_types(model)
    if types is None:
        assert family in {"gpt2", "llama", "mistral"}
        return
    assert len(types) == LAYERS + 2
    if family != "qwen3":
        assert types[1:3] == ["sliding_attention", "full_attention"]
    for block, kind in zip(blocks.model_blocks(model), types, strict=True):
        assert (block.self_attn.sliding_window is not None) == (kind == "sliding_attention")


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    model = tiny_model(family, **({} if family != "gpt2" else {"resid_pdrop": 0.1}))
    model.requires_grad_(False)
    insert(model)
    organ = [b for b in blocks.model_blocks(model) if b not in blocks.base_blocks(model)]
    for block in organ:
        block.requires_grad_(True)

    def gradients(recompute: bool) -> list[torch.Tensor]:
        model.zero_grad()
        runs = []
        hook = organ[0].register_forward_pre_hook(lambda *_: runs.append(1))
        inner = next(organ[0].children()).register_forward_hook(lambda *_: runs.append(2))
        with blocks.checkpointed(model, recompute):
            model(input_ids=tiny_tokens(), use_cache=False).logits.logsumexp(-1).sum().backward()
        hook.remove()
        inner.remove()
        assert runs.count(2) == (2 if recompute else 1)  # it did recompute
        return [value.grad.clone() for block in organ for value in block.parameters()]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, recomputed)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_dose_zero_is_the_exact_identity(family: str) -> None:
    model = tiny_model(family)
    before = logits_of(model)
    made = shaken(model, 1, 2)
    for block in made:
        blocks.silence(blocks.find_family(model.config), block)
    blocks.insert_blocks(model, made, 1, 2, "organ-a")
    assert torch.equal(logits_of(model), before)
    assert blocks.count_blocks_run(model, tiny_tokens()) == LAYERS + 2


@pytest.mark.parametrize("family", FAMILIES)
def test_dose_scales_both_residual_branches(family: str) -> None:
    """Including Gemma, whose norm after the projection would divide a projection's scale out."""
    model = tiny_model(family)
    layout = blocks.find_family(model.config)
    (block,) = shaken(model, 1, 1)
    full = {name: value.detach().clone() for name, value in block.named_parameters()}
    for branch in layout.branches:
        module = block.get_submodule(branch)
        seen: dict[float, torch.Tensor] = {}
        width = 48 if branch == "mlp.down_proj" else 128 if branch == "mlp.c_proj" else 32
        inputs = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
        for dose in (0.0, 0.5, 1.0):
            blocks.write_dose(layout, block, full, dose)
            seen[dose] = module(inputs)
        assert torch.count_nonzero(seen[0.0]) == 0
        torch.testing.assert_close(seen[0.5], 0.5 * seen[1.0])
    blocks.write_dose(layout, block, full, 1.0)
    assert all(torch.equal(v, full[n]) for n, v in block.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_dosed_block_is_the_block_with_both_branches_gated(family: str) -> None:
    """An explicit gate h + dose * branch(h), whatever norm stands in the branch."""
    model = tiny_model(family)
    layout = blocks.find_family(model.config)
    (block,) = shaken(model, 1, 1)
    full = {name: value.detach().clone() for name, value in block.named_parameters()}
    blocks.insert_blocks(model, [block], 1, 2, "organ-a")
    hooks = [
        block.get_submodule(branch).register_forward_hook(lambda _m, _i, output: 0.3 * output)
        for branch in layout.branches
    ]
    gated = logits_of(model)
    for hook in hooks:
        hook.remove()
    assert not torch.allclose(logits_of(model), gated, rtol=1e-3, atol=1e-3)
    blocks.write_dose(layout, block, full, 0.3)
    torch.testing.assert_close(logits_of(model), gated, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_scaling_projections_would_do_nothing_on_gemma(family: str) -> None:
    model = tiny_model(family)
    (block,) = blocks.copy_blocks(model, 1, 1)
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    full = block.post_feedforward_layernorm(block.mlp(hidden))
    with torch.no_grad():
        block.mlp.down_proj.weight.mul_(0.5)
    half = block.post_feedforward_layernorm(block.mlp(hidden))
    torch.testing.assert_close(half, full, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_silent_blocks_learn_without_exploding(family: str) -> None:
    model = tiny_model(family)
    model.requires_grad_(False)
    (block,) = blocks.copy_blocks(model, 1, 1)
    blocks.silence(blocks.find_family(model.config), block)
    block.requires_grad_(True)
    blocks.insert_blocks(model, [block], 1, 2, "organ-a")
    tokens = tiny_tokens()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    norms = {name: float(value.grad.norm()) for name, value in block.named_parameters()}
    silenced = blocks.dosed_names(blocks.find_family(model.config), block)
    assert all(norms[name] > 0 for name in silenced)
    assert max(norms.values()) < 50
    assert all(value.grad is None for b in blocks.base_blocks(model) for value in b.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_new_blocks_share_no_tensor_but_share_the_config(family: str) -> None:
    model = tiny_model(family)
    own = {value.data_ptr() for value in model.parameters()}
    for block in blocks.copy_blocks(model, 1, 2):
        assert not own & {value.data_ptr() for value in block.parameters()}
        configs = [m.config for m in block.modules() if hasattr(m, "config")]
        assert configs
        assert all(config is model.config for config in configs)


@pytest.mark.parametrize("family", FAMILIES)
def test_later_blocks_report_their_hidden_states_too(family: str) -> None:
    """transformers hooks the blocks that exist at the first request, and no others."""
    model = tiny_model(family)
    ids = tiny_tokens()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, output_hidden_states=True)
        insert(model)
        states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    assert len(states) == LAYERS + 2 + 1


def test_attention_back_end_can_be_changed_after_insertion() -> None:
    model = tiny_model("llama")
    insert(model)
    fused = logits_of(model)
    model.set_attn_implementation("eager")
    attentions = model(input_ids=tiny_tokens(), output_attentions=True, use_cache=False).attentions
    assert sum(a is not None for a in attentions) == LAYERS + 2
    torch.testing.assert_close(logits_of(model), fused, rtol=1e-4, atol=1e-4)


def test_tied_embeddings_stay_tied() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    insert(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.get_input_embeddings().weight
    assert torch.equal(logits_of(twin), logits_of(model))
    blocks.remove_blocks(twin, "organ-a")
    assert len(blocks.model_blocks(model)) == LAYERS + 2  # a deep copy is independent


def test_positions_count_the_bases_own_blocks() -> None:
    model = tiny_model("gemma3_text")
    first, last = blocks.base_blocks(model)[0], blocks.base_blocks(model)[-1]
    blocks.insert_blocks(model, blocks.copy_blocks(model, 0, 2), 0, 1, "organ-a")
    blocks.insert_blocks(model, blocks.copy_blocks(model, 3, 1), 3, 4, "organ-b")
    blocks.insert_blocks(model, blocks.copy_blocks(model, 0, 1), 0, 0, "organ-c")
    present = blocks.model_blocks(model)
    assert present[1] is first
    assert present[-2] is last
    assert len(present) == LAYERS + 4
    assert blocks.base_shape(model) == blocks.describe_model(tiny_model("gemma3_text").config)


def test_order_of_insertion_at_one_position_does_not_matter() -> None:
    digests = []
    for order in (("a", "b"), ("b", "a")):
        model = tiny_model("qwen2")
        for owner in order:
            made = shaken(model, 1, 1) if owner == "a" else blocks.copy_blocks(model, 3, 1)
            blocks.insert_blocks(model, made, 1 if owner == "a" else 3, 2, owner)
        digests.append(state_digest(model))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("position", [-1, LAYERS + 1])
def test_refuses_positions_outside_the_base(position: int) -> None:
    model = tiny_model("llama")
    with pytest.raises(RejectedError, match="AG-RCP-021"):
        insert(model, position=position)
    assert len(blocks.model_blocks(model)) == LAYERS


@pytest.mark.parametrize(("source", "count"), [(0, 0), (3, 2), (-1, 1)])
def test_refuses_source_blocks_outside_the_base(source: int, count: int) -> None:
    with pytest.raises(RejectedError, match="AG-RCP-021"):
        blocks.new_blocks(tiny_model("llama"), source, count)


@pytest.mark.parametrize("dose", [-0.1, 1.1, float("nan")])
def test_refuses_doses_out_of_range(dose: float) -> None:
    model = tiny_model("llama")
    (block,) = blocks.copy_blocks(model, 0, 1)
    with pytest.raises(RejectedError, match="AG-RCP-021"):
        blocks.write_dose(blocks.find_family(model.config), block, dict(block.state_dict()), dose)


def test_refuses_an_owner_twice_and_an_unknown_owner() -> None:
    model = tiny_model("llama")
    insert(model)
    with pytest.raises(RejectedError, match="AG-RCP-023"):
        insert(model)
    with pytest.raises(RejectedError, match="AG-RCP-023"):
        blocks.remove_blocks(model, "organ-b")


def test_refuses_unknown_families() -> None:
    with pytest.raises(RejectedError, match="AG-RCP-020"):
        blocks.find_family(GPTNeoXConfig())


def test_refuses_families_that_share_caches_between_blocks() -> None:
    with pytest.raises(RejectedError, match="AG-RCP-020"):
        blocks.find_family(Gemma3nTextConfig())
    config = LlamaConfig(num_kv_shared_layers=2)
    with pytest.raises(RejectedError, match="num_kv_shared_layers"):
        blocks.find_family(config)


def test_refuses_blocks_whose_scale_depends_on_their_index() -> None:
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(RejectedError, match="scale_attn_by_inverse_layer_idx"):
        blocks.model_blocks(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_shape_survives_json(family: str) -> None:
    shape = blocks.describe_model(tiny_model(family).config)
    assert type(shape).from_json(shape.to_json()) == shape
    assert (shape.layers, shape.hidden, shape.family) == (LAYERS, 32, family)
    assert bool(shape.rope) == (family != "gpt2")
    assert shape.sliding_window == (8 if family not in {"gpt2", "llama", "qwen3"} else 0)
