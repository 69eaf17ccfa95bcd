# SPDX-License-Identifier: Apache-2.0
"""Medical questions moved under differential privacy: what epsilon costs, and what leaks.

One organ, made from MedQuAD on the stories260K model by the same workers as at a site: trained,
evaluated and audited. A person is everything about one disease (MedQuAD's `focus`), so that nobody
is both trained on and held out. Mode `measured` trains without noise; mode `strict` at epsilon 8
and 3 (delta = 1e-5). Canaries are made of TinyStories, on which the model has to stay good too.

The constants were chosen on persons set apart (`--tune`), a seventh of all, who are in no
reported figure. Three seeds draw who is held out, which canaries are planted, and what is sampled.
Seconds are those of the processor, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from allograft.privacy.accountant import epsilon_of, propose_noise
from allograft.privacy.canaries import CanaryPlan
from allograft.privacy.dp import DpConstants
from allograft.privacy.people import draw_people
from allograft.privacy.thresholds import AuditThresholds
from allograft.recipes.plan import LoopPlan, OrganPlan
from allograft_client import tasks
from benchmarks.report import Figure, Options, publish

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
_MODEL = _SHARED / "models/stories260K/hf"
_MEDQUAD = _SHARED / "medical/medquad.jsonl.gz"
_STORIES = _SHARED / "general/tinystories_sample.txt"

_DELTA = 1e-5
_HOLDOUT = 0.25
_WINDOW = 128
_CUT = 500  # characters of a story
# This vocabulary of 512 has 1.6 bytes to a token: so many are what 16 tokens are elsewhere.
_SUFFIX_TOKENS = 40

_SEEDS = (0, 1, 2)
_TUNING_SEED = 100
_TUNING_SHARE = 7  # one person in so many chooses constants and is never reported


@dataclass(frozen=True, slots=True)
class Setting:
    """The public constants of a run.

    Attributes:
        epsilon: What the noise is chosen for; 0 trains without noise.
        sampling_rate: Chance of a person to be in a step.
        steps: Steps.
        clip_norm: Largest norm of one person's gradient.
        learning_rate: Peak rate.
        windows_per_person: Most windows of a person.
        batch_windows: Windows in a step without noise.
        blocks: Blocks of the organ.
    """

    epsilon: float
    sampling_rate: float = 0.1
    steps: int = 25
    clip_norm: float = 0.1
    learning_rate: float = 1e-2
    windows_per_person: int = 2
    batch_windows: int = 64
    blocks: int = 1

    @property
    def name(self) -> str:
        """Short name of the arm."""
        return f"strict_{self.epsilon:g}" if self.epsilon else "measured"

    def constants(self) -> DpConstants | None:
        """Those of the private step; None without noise."""
        if not self.epsilon:
            return None
        noise = propose_noise(self.epsilon, _DELTA, self.sampling_rate, self.steps)
        expected = float(f"{self.sampling_rate * 3500:.1g}")  # of about 3,500 persons and canaries
        return DpConstants(
            self.sampling_rate, noise, self.steps, self.clip_norm, expected, _DELTA,
            self.windows_per_person,
        ).check()  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one arm came to with one seed."""

    gain: float
    low: float
    high: float
    retention: float
    train_s: float
    audit_s: float
    verdicts: Mapping[str, str]
    figures: Mapping[str, Mapping[str, float]] = field(repr=False)


@dataclass(frozen=True, slots=True)
class World:
    """The files that the workers read."""

    folder: Path
    reported: tuple[str, ...]
    tuning: tuple[str, ...]
    stories: tuple[str, ...]


def make_world(folder: Path) -> World:
    """Write MedQuAD by person, and the stories."""
    lines, persons = [], []
    with gzip.open(_MEDQUAD, "rt", encoding="utf-8") as handle:
        for line in handle:
            record = json.loads(line)
            person = re.sub(r"\W+", "-", record["focus"].lower()).strip("-")
            if person and len(record["answer"]) > 40:
                persons.append(person)
                text = f"{record['question']}\n{record['answer']}"
                lines.append(json.dumps({"person": person, "text": text}))
    (folder / "medquad.jsonl").write_text("\n".join(lines), "utf-8")
    parts = re.split(r"\n\s*\n", _STORIES.read_text("utf-8"))
    stories = tuple(" ".join(part.split())[:_CUT] for part in parts if len(part) > 150)
    kept = "\n".join(json.dumps({"text": story}) for story in stories[:400])
    (folder / "stories.jsonl").write_text(kept, "utf-8")
    known = sorted(set(persons))
    tuning = {p for p in known if hashlib.sha256(p.encode()).digest()[0] % _TUNING_SHARE == 0}
    return World(folder, tuple(p for p in known if p not in tuning), tuple(sorted(tuning)), stories)


def toss_coins(world: World, seed: int, canaries: CanaryPlan) -> Path:
    """Draw who is held out and what is planted."""
    path = world.folder / f"people-{seed}.json"
    coins = random.Random(seed)  # noqa: S311  (so that the run can be repeated; no patient is here)
    people = draw_people(world.reported, world.stories, _HOLDOUT, canaries, coins)
    if seed == _TUNING_SEED:
        # Judged on the persons set apart; the others held out stay unseen.
        split = replace(people.split, holdout=world.tuning)
        people = replace(people, split=split, audited_others=world.tuning)
    people.save(path)
    return path


def run(world: World, people: Path, setting: Setting, seed: int, audited: bool) -> Outcome:
    """Train, evaluate and audit one organ."""
    constants = setting.constants()
    name = f"{people.stem}-{setting.name}"
    workdir = Path(tempfile.mkdtemp(prefix=name, dir=world.folder))
    common = {
        "model": str(_MODEL), "device": "auto", "kind": "organ", "seed": seed,
        "data": str(world.folder / "medquad.jsonl"), "person_field": "person",
        "window_tokens": _WINDOW, "max_documents": 400, "people": str(people),
        "windows_per_person": setting.windows_per_person,
    }  # fmt: skip
    loop = LoopPlan(
        steps=setting.steps, batch_windows=setting.batch_windows,
        learning_rate=setting.learning_rate, seed=seed, snapshot_s=3600.0,
    )  # fmt: skip
    plan = {
        "kind": "organ",
        "recipe": OrganPlan(blocks=setting.blocks).to_json(),
        "loop": asdict(loop),
        "private": constants.to_json() if constants else None,
    }
    started = time.process_time()
    made = _perform({**common, "task": "train", "workdir": str(workdir), "plan": plan})
    train_s = time.process_time() - started
    opened = {**common, "payload": str(workdir), "facts": made["facts"], "packet_id": "0" * 32}
    retention = str(world.folder / "stories.jsonl")
    evaluated = _perform({**opened, "task": "evaluate", "retention": retention})
    full = evaluated["curve"][-1]
    gates: Mapping[str, Any] = {"gates": [], "figures": {}}
    started = time.process_time()
    if audited:
        claim = {"epsilon": epsilon_of(constants), "delta": _DELTA} if constants else None
        thresholds = replace(AuditThresholds(), extraction_suffix_tokens=_SUFFIX_TOKENS)
        task = {"task": "audit", "claim": claim, "thresholds": thresholds.to_json()}
        gates = _perform({**opened, **task})
    return Outcome(
        full["gain"]["value"],
        full["gain"]["low"],
        full["gain"]["high"],
        full["retention_change"]["value"],
        train_s,
        time.process_time() - started,
        {gate["name"]: f"{gate['verdict']} {gate['reason']}".strip() for gate in gates["gates"]},
        gates["figures"],
    )


def _perform(task: Mapping[str, Any]) -> dict[str, Any]:
    return tasks.perform(task, lambda _: None)


# Chosen on the persons set apart: at epsilon 3 and 40 steps, a rate of 1e-2 gained 0.92 nats per
# token, and 3e-2 gained 0.94 at twice the harm to stories.
_ARMS = (Setting(0, steps=250), Setting(8), Setting(3))


def compare(options: Options) -> list[Figure]:
    """Every arm with every seed; means over the seeds, and the range where it says most."""
    seeds = _SEEDS[:1] if options.quick else _SEEDS
    arms = list(_ARMS)
    if options.quick:
        arms = [replace(arm, steps=4) for arm in (_ARMS[0], _ARMS[2])]
    found: dict[str, list[Outcome]] = {arm.name: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        canaries = CanaryPlan()
        if options.quick:
            world = replace(world, reported=world.reported[:600])
            canaries = CanaryPlan(coins=100, per_level=2)
        for seed in seeds:
            people = toss_coins(world, seed, canaries)
            for arm in arms:
                outcome = run(world, people, arm, seed, audited=True)
                found[arm.name].append(outcome)
                print(_tell(arm, seed, outcome), file=sys.stderr, flush=True)
    figures = [Figure("persons", len(world.reported), ""), Figure("seeds", len(seeds), "")]
    plain = statistics.mean(outcome.gain for outcome in found[_ARMS[0].name])
    for arm in arms:
        figures += _figures(arm, found[arm.name], plain)
    return figures


def _figures(arm: Setting, outcomes: Sequence[Outcome], plain: float) -> list[Figure]:
    gains = [outcome.gain for outcome in outcomes]
    train_s = statistics.mean(outcome.train_s for outcome in outcomes)
    audit_s = statistics.mean(outcome.audit_s for outcome in outcomes)
    name = arm.name
    figures = [
        Figure(f"{name}_gain", statistics.mean(gains), "nats/token"),
        Figure(f"{name}_gain_least", min(gains), "nats/token"),
        Figure(f"{name}_gain_most", max(gains), "nats/token"),
        Figure(f"{name}_gain_recovered", statistics.mean(gains) / plain, "of measured"),
        Figure(f"{name}_retention", _mean(outcomes, lambda o: o.retention), "nats/token"),
        Figure(f"{name}_recognised", _mean(outcomes, lambda o: _of(o, "G5", "tpr")), "at 1 %"),
        Figure(f"{name}_auc", _mean(outcomes, lambda o: _of(o, "G5", "auc")), ""),
        Figure(f"{name}_exposure_once", _mean(outcomes, lambda o: _of(o, "G4", "exposure.1")),
               "bits"),
        Figure(f"{name}_exposure_most", _mean(outcomes, lambda o: _of(o, "G4", "exposure.16")),
               "bits"),
        Figure(f"{name}_epsilon_low", _mean(outcomes, lambda o: _of(o, "G4", "epsilon_low")), ""),
        Figure(f"{name}_extractable", _mean(outcomes, lambda o: _of(o, "G3", "extractable")),
               "passages"),
        Figure(f"{name}_gates_passed", sum(_passes(o) for o in outcomes), f"of {len(outcomes)}"),
        Figure(f"{name}_training", train_s, "s"),
        Figure(f"{name}_gates_over_training", audit_s / train_s, "x", "<= 0.25"),
    ]  # fmt: skip
    constants = arm.constants()
    if constants is not None:
        figures.insert(0, Figure(f"{name}_noise_multiplier", constants.noise_multiplier, ""))
        figures.insert(0, Figure(f"{name}_epsilon", epsilon_of(constants), ""))
    return figures


def _mean(outcomes: Sequence[Outcome], read: Callable[[Outcome], float]) -> float:
    return statistics.mean(map(read, outcomes))


def _of(outcome: Outcome, gate: str, figure: str) -> float:
    return outcome.figures[gate].get(figure, float("nan"))


def _passes(outcome: Outcome) -> bool:
    return set(outcome.verdicts.values()) == {"PASS"}


def _tell(arm: Setting, seed: int, outcome: Outcome) -> str:
    return (
        f"{arm.name} seed {seed}: gain {outcome.gain:.3f} [{outcome.low:.3f}, {outcome.high:.3f}], "
        f"{outcome.train_s:.0f} s, gates {outcome.audit_s:.0f} s: "
        + "; ".join(f"{gate} {verdict}" for gate, verdict in outcome.verdicts.items())
    )


def tune(rates: Sequence[float]) -> None:
    """Try learning rates at epsilon 3 and without noise, on the persons set apart."""
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        people = toss_coins(world, _TUNING_SEED, CanaryPlan())
        for arm in (_ARMS[0], _ARMS[2]):
            for rate in rates:
                tried = replace(arm, learning_rate=rate)
                outcome = run(world, people, tried, _TUNING_SEED, audited=False)
                print(f"{arm.name} at {rate:g}: gain {outcome.gain:.3f}", flush=True)


def main() -> None:
    """Measure and tell, or choose constants."""
    parser = argparse.ArgumentParser(description="a medical organ under differential privacy")
    parser.add_argument("--quick", action="store_true", help="two arms of a few steps, one seed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--tune", type=float, nargs="+", help="learning rates to compare instead")
    chosen = parser.parse_args()
    if not _MEDQUAD.exists() or not _MODEL.exists():
        print("skipped: the shared data is not here", file=sys.stderr)
        return
    logging.disable_progress_bar()
    # One thread: these models are so small that a second one only waits.
    torch.set_num_threads(1)
    if chosen.tune:
        tune(chosen.tune)
        return
    options = Options(chosen.quick, chosen.json)
    publish("private_medquad", compare(options), options)


if __name__ == "__main__":
    main()
