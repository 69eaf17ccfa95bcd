# SPDX-License-Identifier: Apache-2.0
"""The worker's side of the screens: an alarm ends a trial, and a snapshot says what is in it."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from allograft.errors import RejectedError
from allograft.evaluate.behaviour import TEMPLATES
from allograft.evaluate.screen import ScreenReport
from allograft.evaluate.spectrum import weigh_attachment
from allograft.provenance.ancestry import FILE_NAME
from allograft.provenance.lineage import digest_weights
from allograft.recipes.attachment import load_attachment, rewrite_dose, save_attachment
from allograft.recipes.base import Donor, Payload, Plan, Recipient, load_recipe
from allograft.recipes.export import CONTENTS_NAME
from allograft.recipes.plan import LoopPlan, LoraPlan
from allograft.recipes.shape import train_tokenizer
from allograft.recipes.snapshot import load_model
from allograft_client import tasks
from kit.tiny import tiny_model, tiny_windows

pytestmark = pytest.mark.usefixtures("one_thread")

PACKET = "3" * 32
PARENT = {
    "packet_id": "7" * 32,
    "statement_sha256": "8" * 64,
    "licence": {"merge": True, "distil": False, "redonate": False},
}


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def work(tmp_path_factory, one_thread):
    """A model, own text and a payload in one directory."""
    root = tmp_path_factory.mktemp("work")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(list(TEMPLATES), vocabulary=300),
        eos_token="<|endoftext|>",
    )
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=128)
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    draw = np.random.default_rng(0)
    for name in ("data", "retention"):
        words = [" ".join(draw.choice(" ".join(TEMPLATES).split(), 6)) for _ in range(62)]
        (root / f"{name}.txt").write_text("\n\n".join(words))
    (root / "payload").mkdir()
    loop = LoopPlan(steps=1, learning_rate=1e-4)
    extract = load_recipe("lora").extract(
        Donor(model, tiny_windows(), root / "payload"), Plan(LoraPlan(2), loop)
    )
    return root, extract.facts.to_json()


def task_of(work, name, **more):
    root, facts = work
    return {
        "task": name, "model": str(root / "model"), "device": "cpu", "stack": [], "kind": "lora",
        "payload": str(root / "payload"), "facts": facts, "packet_id": PACKET,
        "base_digest": "0" * 64, "apply": False,
        "data": str(root / "data.txt"), "retention": str(root / "retention.txt"),
        "max_documents": 240, "min_gain": 0.0, "max_retention_loss": 0.1,
        "attachment": str(root / "attachment"), "despite_alarm": False, "bank": [],
        "templates": ["One of our own beginnings of a letter"], "screen_seed": 4, **more,
    }  # fmt: skip


def bank_of(work, factor: float):
    """A bank of eight packets whose every figure is the payload's, times a factor in size."""
    root, facts = work
    model = load_model(root / "model")
    payload = Payload("lora", PACKET, root / "payload", facts)
    own = weigh_attachment(load_recipe("lora").fit(payload, Recipient(model)), model)
    names = ("sigma", "frobenius", "share", "focus", "kurtosis")
    entry = {
        module: {
            name: getattr(figures, name) * (factor if name in names[:2] else 1.0) for name in names
        }
        for module, figures in own.items()
    }
    return [entry] * 8


@pytest.fixture
def strong(work):
    """The payload with B matrices that are not zero."""
    root, _ = work
    path = root / "payload" / "adapter_model.safetensors"
    before = path.read_bytes()
    draw = torch.Generator().manual_seed(1)
    tensors = {
        name: value if "lora_A" in name else 1e-3 * torch.randn(value.shape, generator=draw)
        for name, value in load_file(path).items()
    }
    save_file(tensors, path)
    yield
    path.write_bytes(before)


def test_an_alarm_ends_the_task_before_the_trial(work, strong) -> None:
    found = tasks.perform(task_of(work, "try", bank=bank_of(work, 1e-3)), lambda _: None)
    (screen,) = [ScreenReport.from_json(entry) for entry in found["screens"]]
    assert screen.alarms == ("spectrum",)
    assert found["report"] is None


def test_goes_on_where_a_person_said_so(work, strong) -> None:
    stages = []
    task = task_of(work, "try", bank=bank_of(work, 1e-3), despite_alarm=True)
    found = tasks.perform(task, stages.append)
    assert found["report"]["decision"]["outcome"] in {"keep", "revert"}
    results = {result["name"]: result["verdict"] for result in found["screens"][0]["results"]}
    assert list(results) == ["spectrum", "templates", "triggers"]
    assert results["spectrum"] == "ALARM"
    assert stages[1] == {"stage": "screens: the plain base"}


def test_screens_a_stack_and_writes_what_a_snapshot_holds(work, strong, tmp_path) -> None:
    root, facts = work
    model = load_model(root / "model")
    payload = Payload("lora", PACKET, root / "payload", facts)
    save_attachment(load_recipe("lora").fit(payload, Recipient(model)), tmp_path / "kept")
    stack = {"stack": [str(tmp_path / "kept")]}
    found = tasks.perform(task_of(work, "screen", **stack), lambda _: None)
    report = ScreenReport.from_json(found["screen"])
    assert [result.name for result in report.results] == ["templates", "triggers"]
    out = {"out": str(tmp_path / "merged"), "format": "merged"}
    base = digest_weights(work[0] / "model")
    more = {"parents": [PARENT], "donors": {PACKET: "hospital-a"}, "model_digest": base}
    tasks.perform(task_of(work, "export", **stack, **out, **more), lambda _: None)
    assert (tmp_path / "merged" / FILE_NAME).is_file()
    contents = json.loads((tmp_path / "merged" / CONTENTS_NAME).read_bytes())
    (inside,) = contents["inside"]
    assert contents["base"] == base
    assert inside == {"packet_id": PACKET, "kind": "lora", "dose": 1.0, "donor": "hospital-a"}
    described = tasks.perform(
        {**task_of(work, "describe"), "model": str(tmp_path / "merged")}, lambda _: None
    )
    assert described["parents"] == [PARENT]


def test_learns_doses_together_and_stores_only_what_is_accepted(work, strong, tmp_path) -> None:
    """A change that nobody trained helps nobody: its dose stays, in the file too."""
    root, facts = work
    payload = Payload("lora", PACKET, root / "payload", facts)
    attachment = load_recipe("lora").fit(payload, Recipient(load_model(root / "model")))
    save_attachment(attachment, tmp_path / "kept")
    stack = {"stack": [str(tmp_path / "kept")], "apply": True}
    found = tasks.perform(task_of(work, "scale", **stack), lambda _: None)
    report = found["report"]
    assert report["selection_learnt"] <= report["selection_present"]
    kept = report["learnt"] if report["accepted"] else report["present"]
    assert found["doses"] == kept
    assert load_attachment(tmp_path / "kept").dose == kept[PACKET]


def test_shows_who_would_answer_the_sites_own_text(work, strong, tmp_path) -> None:
    root, facts = work
    payload = Payload("lora", PACKET, root / "payload", facts)
    attachment = load_recipe("lora").fit(payload, Recipient(load_model(root / "model")))
    save_attachment(attachment, tmp_path / "kept")
    long = "\n\n".join(" ".join(TEMPLATES[n:] + TEMPLATES[:n]) for n in range(4))
    (tmp_path / "long.txt").write_text(long)
    task = {"stack": [str(tmp_path / "kept")], "data": str(tmp_path / "long.txt")}
    found = tasks.perform(task_of(work, "route", **task), lambda _: None)
    domain = found["domain"]
    assert domain["base"] + domain["chosen"][PACKET] == domain["documents"] == 4
    if domain["base"] == 4:
        assert domain["loss_routed"] == domain["loss_base"]
    assert found["retention"] == {"documents": 0}


def test_stored_dose_changes_without_the_tensors(work, tmp_path) -> None:
    root, facts = work
    payload = Payload("lora", PACKET, root / "payload", facts)
    attachment = load_recipe("lora").fit(payload, Recipient(load_model(root / "model")))
    save_attachment(attachment, tmp_path / "kept")
    before = (tmp_path / "kept" / "tensors.safetensors").read_bytes()
    rewrite_dose(tmp_path / "kept", 0.25)
    assert load_attachment(tmp_path / "kept").dose == 0.25
    assert (tmp_path / "kept" / "tensors.safetensors").read_bytes() == before
    with pytest.raises(RejectedError, match="AG-RCP-004"):
        rewrite_dose(tmp_path / "gone", 0.25)
