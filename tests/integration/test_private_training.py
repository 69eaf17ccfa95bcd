# SPDX-License-Identifier: Apache-2.0
"""What workers do with private data: train by person, audit, and never pass idly."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace

import pytest

from allograft.cli.demo import text as demo_text
from allograft.errors import RejectedError
from allograft.privacy.canaries import CanaryPlan
from allograft.privacy.dp import DpConstants
from allograft.privacy.people import draw_people, read_people
from allograft.privacy.thresholds import AuditThresholds
from allograft.recipes.plan import LoopPlan, OrganPlan
from allograft.recipes.shape import train_tokenizer
from allograft_client import tasks
from kit.tiny import tiny_model

CONSTANTS = DpConstants(0.2, 2.0, 4, 0.5, 8.0, 1e-5, 2)
CANARIES = CanaryPlan(coins=40, per_level=2, references=8)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    root = tmp_path_factory.mktemp("private")
    tiny_model("llama", vocab_size=320).save_pretrained(root / "model")
    notes = demo_text.write_notes(demo_text.invent_medicine(), 90, 7)
    train_tokenizer([note.text for note in notes], 320).save(str(root / "model" / "tokenizer.json"))
    demo_text.save_notes(root / "notes.jsonl", notes)
    public = [note.text for note in demo_text.write_notes(demo_text.invent_medicine(), 60, 8)]
    demo_text.save_texts(root / "public.jsonl", public)
    ids = sorted({str(note.patient) for note in notes})
    draw_people(ids, public, 0.4, CANARIES, random.Random(1)).save(root / "people.json")
    return root


def task_of(site, kind, **more):
    return {
        "task": kind, "model": str(site / "model"), "device": "cpu", "kind": "organ",
        "data": str(site / "notes.jsonl"), "seed": 0, "window_tokens": 48, "max_documents": 40,
        "people": str(site / "people.json"), "person_field": "patient",
        "windows_per_person": CONSTANTS.windows_per_person, **more,
    }  # fmt: skip


def train(site, tmp_path, private):
    loop = LoopPlan(steps=4, batch_windows=4, warmup_steps=1)
    plan = {
        "kind": "organ",
        "recipe": OrganPlan(blocks=1).to_json(),
        "loop": asdict(loop),
        "private": private.to_json() if private else None,
    }
    task = task_of(site, "train", workdir=str(tmp_path), plan=plan)
    return tasks.perform(task, lambda _: None)


@pytest.mark.parametrize("private", [CONSTANTS, None], ids=["strict", "measured"])
def test_a_run_ends_in_audits_that_so_few_people_cannot_pass(site, tmp_path, private) -> None:
    made = train(site, tmp_path, private)
    assert made["report"]["noise"] == ("chacha20" if private else "")
    opened = {"payload": str(tmp_path), "facts": made["facts"], "packet_id": "0" * 32}
    retention = str(site / "public.jsonl")
    evaluated = tasks.perform(
        task_of(site, "evaluate", retention=retention, **opened), lambda _: None
    )
    assert len(evaluated["curve"]) == 3
    claim = {"epsilon": 2.0, "delta": 1e-5} if private else None
    audited = tasks.perform(
        task_of(
            site, "audit", claim=claim, thresholds=AuditThresholds().to_json(), **opened
        ),
        lambda _: None,
    )  # fmt: skip
    verdicts = {gate["name"]: gate["verdict"] for gate in audited["gates"]}
    assert set(verdicts) == {"G3", "G4", "G5", "G7"}
    assert verdicts["G4"] == verdicts["G5"] == "INVALID"
    assert verdicts["G7"] == "FAIL"
    json.dumps(audited, allow_nan=False)
    if private:
        public = {gate["name"]: gate["figures"] for gate in audited["gates"]}
        # With differential privacy no figure on real people is published.
        assert public["G3"] == public["G5"] == {}


def test_training_reads_nobody_who_is_held_out(site, tmp_path) -> None:
    people = read_people(site / "people.json")
    held_out = set(people.split.holdout)
    lines = (site / "notes.jsonl").read_text("utf-8").splitlines()
    kept = [line for line in lines if str(json.loads(line)["patient"]) not in held_out]
    (tmp_path / "without.jsonl").write_text("\n".join(kept), "utf-8")
    losses = []
    for data in (site / "notes.jsonl", tmp_path / "without.jsonl"):
        plan = {"kind": "organ", "recipe": OrganPlan(blocks=1).to_json(),
                "loop": asdict(LoopPlan(steps=3, batch_windows=4)), "private": None}  # fmt: skip
        (tmp_path / data.stem).mkdir()
        task = task_of(site, "train", workdir=str(tmp_path / data.stem), plan=plan)
        losses.append(
            tasks.perform(task | {"data": str(data)}, lambda _: None)["report"]["last_loss"]
        )
    assert losses[0] == losses[1]


def test_people_who_vanish_from_the_data_are_noticed(site, tmp_path) -> None:
    lines = (site / "notes.jsonl").read_text("utf-8").splitlines()
    gone = read_people(site / "people.json").split.train[0]
    kept = [line for line in lines if str(json.loads(line)["patient"]) != gone]
    (tmp_path / "cut.jsonl").write_text("\n".join(kept), "utf-8")
    plan = {"kind": "organ", "recipe": OrganPlan(blocks=1).to_json(),
            "loop": asdict(LoopPlan(steps=4)), "private": CONSTANTS.to_json()}  # fmt: skip
    task = task_of(site, "train", workdir=str(tmp_path), plan=plan)
    with pytest.raises(RejectedError) as refused:
        tasks.perform(task | {"data": str(tmp_path / "cut.jsonl")}, lambda _: None)
    assert refused.value.code == "AG-RCP-034"


def test_constants_that_differ_from_the_loop_are_refused(site, tmp_path) -> None:
    with pytest.raises(RejectedError) as refused:
        train(site, tmp_path, replace(CONSTANTS, steps=5))
    assert refused.value.code == "AG-RCP-035"
