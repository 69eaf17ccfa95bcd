# SPDX-License-Identifier: Apache-2.0
"""The worker's side of the screens: an alarm ends a trial, and a snapshot says what is in it."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from allograft.evaluate.behaviour import TEMPLATES
from allograft.evaluate.screen import ScreenReport
from allograft.evaluate.spectrum import weigh_attachment
from allograft.provenance.ancestry import FILE_NAME
from allograft.recipes.attachment import save_attachment
from allograft.recipes.base import Donor, Payload, Plan, Recipient, load_recipe
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
    more = {"base_digest": "0" * 64, "parents": [PARENT]}
    tasks.perform(task_of(work, "export", **stack, **out, **more), lambda _: None)
    assert (tmp_path / "merged" / FILE_NAME).is_file()
    described = tasks.perform(
        {**task_of(work, "describe"), "model": str(tmp_path / "merged")}, lambda _: None
    )
    assert described["parents"] == [PARENT]
