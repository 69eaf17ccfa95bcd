# SPDX-License-Identifier: Apache-2.0
"""Every kind of packet from a donor to a recipient: real training, real trials, real files.

Stores, keys, pipelines and policies are the sites' own, and so is the work on tensors, which is
done here instead of in worker processes. Between the sites stands a coordinator that only moves
items; packets over real Flower processes are in `test_site_real_data`.
"""

import json
import random
from dataclasses import dataclass, field

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from allograft.recipes.attachment import load_attachment
from allograft.recipes.export import CONTENTS_NAME
from allograft.recipes.plan import (
    DeltaPlan,
    ExpertPlan,
    LoraPlan,
    ModuleGraftPlan,
    OrganPlan,
    PromptPlan,
)
from allograft.recipes.shape import train_tokenizer
from allograft.recipes.snapshot import load_model, state_digest
from allograft.recipes.stack import Stack
from allograft_client import dispatcher, donor, tasks
from kit.consortium import POLICY, Consortium
from kit.tiny import logits_of, tiny_model, tiny_tokens

A, B = "hospital-a", "hospital-b"
WARD = ["fever", "pulse", "nurse", "drug", "dose", "scan", "ward", "blood", "chart", "pain"]
STREET = ["road", "tree", "house", "rain", "door", "bread", "window", "garden", "dog", "light"]

KINDS = {
    "organ replaced": ("organ", OrganPlan(blocks=1, mode="replace")),
    "organ of 8 bits": ("organ", OrganPlan(blocks=1, wire_bits=8)),
    "lora": ("lora", LoraPlan(rank=4)),
    "dora": ("lora", LoraPlan(rank=4, dora=True, rslora=True)),
    "frozen a": ("lora", LoraPlan(rank=4, frozen_a="consortium-2026")),
    "delta": ("delta", DeltaPlan()),
    "module graft": ("module_graft", ModuleGraftPlan()),
    "prompt": ("prompt", PromptPlan(virtual_tokens=8)),
    "expert": ("expert", ExpertPlan()),
}


#: Kinds that are no part of any weight.
NOT_MERGED = {"prompt", "expert"}


@dataclass
class Worker:
    """Does a worker's tasks here, with its code."""

    done: list = field(default_factory=list)

    def run(self, _name, task, progress):
        self.done.append(task["task"])
        task = json.loads(json.dumps(dict(task)))
        return {"network": "none", **tasks.perform(task, progress)}


def write_text(path, words, seed: int) -> None:
    """Documents in which each word is followed by the same one, nine times of ten."""
    draw, documents = random.Random(seed), []
    for number in range(90):
        place, said = draw.randrange(len(words)), [f"case {number}"]
        for _ in range(24):
            place = (place + 1 if draw.random() < 0.9 else draw.randrange(99)) % len(words)
            said.append(words[place])
        documents.append(" ".join(said))
    path.write_text("\n\n".join(documents))


def write_base(root, seed: int = 1):
    """A model with a tokenizer, and a site's two kinds of text beside it."""
    root.mkdir(exist_ok=True)
    texts = [" ".join([*WARD, *STREET, "case", *map(str, range(99))])] * 3
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(texts, vocabulary=320), eos_token="<|endoftext|>"
    )
    changes = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    tiny_model("llama", seed, **changes).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    write_text(root / "data.txt", WARD, seed)
    write_text(root / "general.txt", STREET, seed + 1)
    return root


def work_of(two, name: str, kind: str, subject: str, **arguments):
    """Have a site do a job; the job as it ended."""
    store = two[name].site.store
    lane = "light" if kind == "keep" else "heavy"
    number = store.add_job(lane, kind, subject, arguments)
    two.step()
    job = store.job(number)
    assert job.state == "done", (kind, job.code, job.result)
    return job


def found(root, kind: str, bases) -> Consortium:
    """Two sites that accept a kind, each with its base under the name `tiny`."""
    accept = POLICY.replace('kinds = ["organ"]', f'kinds = ["{kind}"]')
    # Models of this size forget whatever they are not taught.
    accept += "max_retention_loss = 5.0\n"
    two = Consortium(root, hospital_a=accept, hospital_b=accept)
    for name in (A, B):
        two[name].runner = Worker()
    two.reopen()
    for name, base in zip((A, B), bases, strict=True):
        work_of(
            two, name, "add-model", "tiny",
            path=str(base / "model"), data=str(base / "data.txt"),
            retention=str(base / "general.txt"),
        )  # fmt: skip
    return two


def send(two, kind: str, recipe, base, **changes) -> str:
    """Donate and dispatch; the packet's id."""
    plan = two[A].plan(
        model="tiny", kind=kind, recipe=recipe, data=base / "data.txt", steps=60,
        learning_rate=2e-2, batch_windows=8, window_tokens=32, merge=True, **changes,
    )  # fmt: skip
    packet_id, _ = donor.plan_donation(two[A].site, plan)
    two.step()
    dispatcher.queue_dispatch(two[A].site, packet_id, [B])
    two.step()
    return packet_id


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield write_base(tmp_path_factory.mktemp("base"))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", KINDS)
def test_a_packet_of_each_kind_is_tried_kept_composed_and_taken_back(name, base, tmp_path) -> None:
    kind, recipe = KINDS[name]
    two = found(tmp_path, kind, (base, base))
    packet_id = send(two, kind, recipe, base)
    row = two[B].site.store.packet(packet_id)
    assert (row.state, row.code) == ("kept", ""), row.reason
    (receipt,) = two[A].site.store.receipts(packet_id)
    assert receipt.state == "kept"
    # What was kept changes what the recipient's model says, and comes off to the bit.
    model = load_model(base / "model")
    plain, before = state_digest(model), logits_of(model, tiny_tokens())
    stack = Stack(model)
    stack.attach(load_attachment(two[B].site.packet_path(packet_id, "attachment")))
    after = logits_of(model, tiny_tokens())
    assert not torch.equal(after, before)
    stack.detach(packet_id)
    assert state_digest(model) == plain
    if kind not in NOT_MERGED:
        work_of(two, B, "export", "tiny", format="merged", out=str(tmp_path / "merged"))
        merged = load_model(tmp_path / "merged")
        torch.testing.assert_close(logits_of(merged, tiny_tokens()), after, rtol=1e-4, atol=1e-4)
        contents = json.loads((tmp_path / "merged" / CONTENTS_NAME).read_bytes())
        assert [(each["packet_id"], each["kind"]) for each in contents["inside"]] == [
            (packet_id, kind)
        ]
    reverted = work_of(two, B, "revert", packet_id)
    assert reverted.result["bit_exact"] is True
    assert two[B].site.store.packet(packet_id).state == "reverted"
    assert two[B].site.store.attachments("tiny") == ()
    two.close()


@pytest.mark.parametrize("name", ["organ replaced", "lora", "delta", "module graft", "prompt"])
def test_weights_are_refused_by_a_model_of_another_beginning(name, base, tmp_path) -> None:
    kind, recipe = KINDS[name]
    stranger = write_base(tmp_path / "stranger", seed=9)
    two = found(tmp_path, kind, (base, stranger))
    packet_id = send(two, kind, recipe, base)
    row = two[B].site.store.packet(packet_id)
    assert row.state == "refused"
    assert row.code in {"AG-RCP-013", "AG-RCP-036"}
    assert "try" not in two[B].runner.done
    two.close()


def test_an_expert_helps_a_model_of_another_beginning(base, tmp_path) -> None:
    stranger = write_base(tmp_path / "stranger", seed=9)
    two = found(tmp_path, "expert", (base, stranger))
    packet_id = send(two, "expert", ExpertPlan(), base)
    row = two[B].site.store.packet(packet_id)
    assert (row.state, row.code) == ("kept", ""), row.reason
    two.close()
