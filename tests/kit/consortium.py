# SPDX-License-Identifier: Apache-2.0
"""Sites with real stores, keys, policies and pipelines; no Flower, no tensor library, no log.

A `Consortium` moves items between the sites' boxes as a coordinator would, and can be told to
tamper on the way. Workers are replaced by a script that writes what a worker would have written.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from allograft.crypto import keystore
from allograft.crypto.keys import SealingKey, SigningKey
from allograft.errors import RejectedError
from allograft.evaluate.bootstrap import Interval
from allograft.evaluate.gate import Decision, DosePoint, Outcome, Reason
from allograft.evaluate.report import DocumentCounts, TrialReport
from allograft.evaluate.screen import ModuleFigures, ScreenReport, ScreenResult, Verdict
from allograft.log.event import verify_event
from allograft.privacy.dossier import GateResult, GateVerdict, write_gate
from allograft.provenance.ancestry import FILE_NAME, Ancestry, read_ancestors, write_ancestors
from allograft.provenance.lineage import describe_base
from allograft.provenance.statement import write_base
from allograft.recipes.base import ModelShape
from allograft.recipes.facts import OrganFacts
from allograft.recipes.plan import OrganPlan
from allograft.relay.item import describe_item, inline_files
from allograft.relay.poll import Announcement
from allograft.roster.records import CoordinatorRecord, Revocation, Roster, SiteRecord
from allograft.routing.offer import verify_offer
from allograft.routing.route import Proposal, Route, sign_route
from allograft_client import jobs
from allograft_client.inbox import Inbox
from allograft_client.outbox import Outbox
from allograft_client.plan import DonationPlan
from allograft_client.rows import ModelRow
from allograft_client.settings import Home, Settings
from allograft_client.site import Site
from allograft_client.store import Store

COORDINATOR = "consortium"
PROOF = b"a log proof"
SHAPE = ModelShape("llama", 32, 3, 64, 4, 4, 8, 48, "{}", (), 0)

POLICY = """
version = 1
[donate]
modes = ["open"]
kinds = ["organ"]
recipients = ["*"]
approvals = []
[receive]
donors = ["*"]
kinds = ["organ"]
modes = ["open"]
automatic_trial = true
automatic_keep = true
"""


@dataclass
class Belief:
    """A roster that tests change, in place of what TUF would have verified."""

    roster_now: Roster
    site: str
    coordinator: str = COORDINATOR

    def roster(self):
        self.roster_now.check_fresh(datetime.now(UTC))
        return self.roster_now

    def latest_roster(self):
        return self.roster_now

    def verify_logged(self, entry, proof, now):
        if proof != PROOF:
            raise RejectedError("AG-LOG-002", "the proof does not hold")
        return verify_event(entry, self.roster_now, now)


@dataclass
class ScriptedRunner:
    """Answers each kind of task as a worker would; keeps the tasks it was given."""

    outcome: Outcome = Outcome.KEEP
    tasks: list = field(default_factory=list)
    errors: dict = field(default_factory=dict)
    verdicts: dict = field(default_factory=dict)
    figures: dict = field(default_factory=dict)
    alarms: tuple = ()

    def run(self, name, task, progress):
        self.tasks.append(dict(task))
        progress({"stage": task["task"], "network": "none"})
        if task["task"] in self.errors:
            raise self.errors[task["task"]]
        return {"network": "none", **getattr(self, f"_{task['task']}")(task)}

    def done(self, kind):
        return [task for task in self.tasks if task["task"] == kind]

    def _train(self, task):
        names = {"a": np.ones((32, 32), np.float32), "b": np.full(32, 0.5, np.float32)}
        tensors = {f"blocks.0.{n}": v for n, v in names.items()}
        save_file(tensors, Path(task["workdir"]) / "organ.safetensors")
        facts = OrganFacts(SHAPE, 1, 1, 2, (), "float32")
        report = {"steps": 3, "noise": "chacha20" if task["plan"]["private"] else ""}
        return {"files": ["organ.safetensors"], "facts": facts.to_json(), "report": report}

    def _audit(self, task):
        gates = [GateResult(name, "1", self.verdicts.get(name, GateVerdict.PASS),
                            self.figures.get(name, ()))
                 for name in ("G3", "G4", "G5", "G7")]  # fmt: skip
        return {
            "gates": [write_gate(gate) for gate in gates],
            "figures": {"G5": {"tpr": 0.0123456, "tpr_low": 0.01, "tpr_high": 0.02}},
            "exposure": [[1, 0.9], [16, 2.5]],
            "roc": [[0.0, 0.0], [0.01, 0.0123456]],
            "exposed": [["patient-7", 0.25, 0, False]],
        }

    def _evaluate(self, task):
        gain = {"value": 0.3, "low": 0.2, "high": 0.4}
        change = {"value": -0.01, "low": -0.02, "high": 0.0}
        curve = [{"dose": d, "gain": gain, "retention_change": change} for d in (0.5, 1.0)]
        return {"curve": curve, "documents": 30, "retention": 30}

    def _try(self, task):
        screens = [screen_report(self.alarms, 1.0).to_json()]
        if self.alarms and not task["despite_alarm"]:
            return {"screens": screens, "report": None}
        Path(task["attachment"]).mkdir(parents=True, exist_ok=True)
        if self.outcome is Outcome.KEEP:
            screens.append(screen_report(self.alarms, 0.5).to_json())
        report = trial_report(task["packet_id"], self.outcome)
        return {"screens": screens, "report": report.to_json(), "fit": {}}

    def _screen(self, task):
        return {"screen": screen_report(self.alarms, 1.0).to_json()}

    def _scale(self, task):
        return {"doses": {}}

    def _route(self, task):
        return {}

    def _describe(self, task):
        base = describe_base(Path(task["model"]))
        record = Path(task["model"]) / FILE_NAME
        parents = Ancestry.from_bytes(record.read_bytes()).ancestors if record.exists() else ()
        return {
            "base": write_base(base),
            "shape": SHAPE.to_json(),
            "documents": 60,
            "retention_documents": 60,
            "parents": write_ancestors(parents),
        }

    def _export(self, task):
        out = write_model(Path(task["out"]), seed=9)
        ancestry = Ancestry(task["model_digest"], read_ancestors(task["parents"]))
        (out / FILE_NAME).write_bytes(ancestry.to_bytes())
        return {"out": str(out), "weights_digest": describe_base(out).weights_digest}

    def _revert(self, task):
        return {"bit_exact": True, "state_digest": "0" * 64}


def screen_report(alarms, dose):
    """A report as the screens would have written it."""
    results = tuple(
        ScreenResult(name, Verdict.ALARM if name in alarms else Verdict.PASS, "as scripted")
        for name in ("spectrum", "templates", "triggers")
    )
    spectrum = {"a": ModuleFigures(1.0, 2.0, 0.3, 0.2, 3.0)}
    return ScreenReport(1, dose, results, spectrum, 0.1)


def trial_report(packet_id, outcome):
    """A report as a trial would have written it."""
    reason = Reason.GAIN_CONFIRMED if outcome is Outcome.KEEP else Reason.NO_GAIN
    interval = Interval(0.3, 0.2, 0.4)
    fields = {name: 0.0 for name in DosePoint.__dataclass_fields__}
    return TrialReport(
        attachment_id=packet_id,
        kind="organ",
        decision=Decision(
            outcome=outcome,
            reason=reason,
            dose=0.5,
            gain=interval,
            retention_change=interval,
            null_gain=interval,
            null_spread=0.01,
            excess=interval,
        ),
        curve=(DosePoint(**fields),),
        documents=DocumentCounts(30, 30, 30, 30),
        bits_per_byte_before=2.0,
        bits_per_byte_after=1.5,
        state_digest="0" * 64,
        removals=4,
        seed=0,
        device="cpu",
        seconds=1.0,
    )


def write_model(directory: Path, seed: int = 1, drift: float = 0.0) -> Path:
    """A base of three small blocks; `drift` makes a descendant of the seed's base."""
    directory.mkdir(parents=True)
    generator, drifting = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    tensors = {"model.embed_tokens.weight": (64, 32)}
    for layer in range(3):
        tensors[f"model.layers.{layer}.a"] = (32, 32)
        tensors[f"model.layers.{layer}.b"] = (32,)
    weights = {
        name: (
            generator.standard_normal(shape) + drift * drifting.standard_normal(shape)
        ).astype(np.float32)
        for name, shape in tensors.items()
    }  # fmt: skip
    save_file(weights, directory / "model.safetensors")
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 64}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE"}}))
    return directory


class Member:
    """One site of the consortium."""

    def __init__(self, root: Path, name: str, policy: str | None = POLICY):
        self.name = name
        self.home = Home(root)
        self.home.make_directories()
        self.keys = {"signing": SigningKey.generate(), "sealing": SealingKey.generate()}
        keystore.write_sealing_key(self.home.path("keys", "sealing.key"), self.keys["sealing"])
        if policy is not None:
            self.home.policy_file.write_text(policy)
        self.runner = ScriptedRunner()
        self.identifiers = ""  # as in site.toml
        self.site: Site | None = None

    def record(self, now) -> SiteRecord:
        return SiteRecord(
            site_id=self.name,
            signing_keys=(self.keys["signing"].public,),
            sealing_key=self.keys["sealing"].public,
            witness_vkey="",
            node_key="",
            roles=("donor", "recipient", "witness"),
            not_before=now - timedelta(days=1),
            not_after=now + timedelta(days=100),
        )

    def open(self, roster: Roster) -> None:
        """Open the site afresh, as a restarted daemon does."""
        store = Store.create(self.home.database)
        store.requeue_jobs()
        trust = Belief(roster, self.name)
        self.site = Site(
            home=self.home,
            settings=Settings(site=self.name, reserve_bytes=0, identifiers=self.identifiers),
            store=store,
            key=self.keys["signing"],
            trust=trust,
            outbox=Outbox(self.home.path("outbox"), store, self.name, COORDINATOR),
            inbox=Inbox(self.home.path("inbox"), store, self.name, 0),
            runner=self.runner,
        )

    def add_model(self, name: str, path: Path) -> None:
        facts = {
            "base": write_base(describe_base(path)),
            "shape": SHAPE.to_json(),
            "documents": 60,
            "retention_documents": 60,
        }
        self.site.store.put_model(
            ModelRow(name, path, path / "data.txt", path / "general.txt", facts, "t")
        )

    def plan(self, **changes) -> DonationPlan:
        data = self.home.path("private.txt")
        data.write_text("private text")
        plan = DonationPlan(
            "base",
            "organ",
            data,
            "open",
            "synthetic",
            "data-steward",
            "discharge letters",
            OrganPlan(),
        )
        return replace(plan, **changes)

    def work(self) -> list:
        """Do every queued job; returns the jobs done."""
        done = []
        while True:
            job = self.site.store.next_job("light") or self.site.store.next_job("heavy")
            if job is None:
                return done
            assert jobs.run_job(self.site, job), self.site.store.job(job.number)
            done.append(self.site.store.job(job.number))


class Consortium:
    """Members and a coordinator that only moves things."""

    def __init__(self, root: Path, names=("hospital-a", "hospital-b"), **policies):
        self.root = root
        self.key = SigningKey.generate()
        self.members = {
            name: Member(root / name, name, policies.get(name.replace("-", "_"), POLICY))
            for name in names
        }
        now = datetime.now(UTC).replace(microsecond=0)
        self.roster = Roster(
            version=1,
            sites={name: member.record(now) for name, member in self.members.items()},
            revoked={},
            coordinator=CoordinatorRecord(
                COORDINATOR, (self.key.public,), "", b"", "127.0.0.1:1", ""
            ),
            witness_quorum=1,
            expires=now + timedelta(days=2),
            digest="0" * 64,
        )
        self.reopen()
        self.base = write_model(root / "base")
        for member in self.members.values():
            member.add_model("base", self.base)
        self.sent = []

    def __getitem__(self, name) -> Member:
        return self.members[name]

    def close(self) -> None:
        for member in self.members.values():
            member.site.store.close()

    def reopen(self) -> None:
        for member in self.members.values():
            if member.site is not None:
                member.site.store.close()
            member.open(self.roster)

    def revoke(self, name) -> None:
        now = datetime.now(UTC)
        sites = {n: r for n, r in self.roster.sites.items() if n != name}
        self.change(sites=sites, revoked={name: Revocation(name, "lost keys", now)})

    def change(self, **fields) -> None:
        self.roster = replace(self.roster, **fields)
        for member in self.members.values():
            member.site.trust.roster_now = self.roster

    # --- the coordinator ---

    def relay(self, tamper=None) -> None:
        """Take every outgoing item and deliver what follows from it."""
        for member in list(self.members.values()):
            for row in member.site.store.items("out", "waiting"):
                source = member.home.path("outbox", row.item_id)
                files = {f.name: (source / f.name).read_bytes() for f in row.item.files}
                member.site.outbox.settle([row.item_id], [])
                self.sent.append((member.name, row.item.kind, files))
                self._forward(row.item.kind, files, tamper)

    def _forward(self, kind, files, tamper) -> None:
        if kind == "offer":
            self._route(files["offer.json"])
        elif kind == "dispatch":
            packet = {**files, "dispatch.proof": PROOF}
            audience = json.loads(files["header.json"])["audience"]
            for name in audience:
                self.deliver(name, "packet", tamper(dict(packet)) if tamper else packet)
        elif kind in {"receipt", "withdrawal"}:
            for name in self.members:
                if kind == "withdrawal" or self._is_donor(name):
                    self.deliver(name, kind, files)

    def _is_donor(self, name) -> bool:
        return any(row.role == "donor" for row in self.members[name].site.store.packets())

    def _route(self, envelope) -> None:
        offer = verify_offer(envelope, self.roster, datetime.now(UTC))
        proposals = tuple(
            Proposal(name, "exact", "the same base") for name in self.members if name != offer.donor
        )
        route = Route(
            offer.packet_id,
            hashlib.sha256(envelope).hexdigest(),
            COORDINATOR,
            proposals,
            datetime.now(UTC).replace(microsecond=0),
        )
        self.deliver(offer.donor, "route", {"route.json": sign_route(route, self.key)})

    def deliver(self, name, kind, files) -> str:
        """Put an item into a member's inbox, part by part; returns its id."""
        directory = self.root / "coordinator"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        for file, content in files.items():
            (directory / file).write_bytes(content)
        item = describe_item(kind, COORDINATOR, name, [directory / file for file in files])
        inbox = self.members[name].site.inbox
        inbox.take_announcements([Announcement(item, inline_files(item, directory))])
        for number in range(item.part_count):
            part = item.part(number)
            content = files[part.file.name][part.offset : part.offset + part.size_bytes]
            inbox.put_part(item.item_id, number, content)
        return item.item_id

    def step(self, tamper=None) -> None:
        """Relay and work until nothing moves."""
        for _ in range(12):
            self.relay(tamper)
            if not any([member.work() for member in self.members.values()]):
                return
        raise AssertionError("the consortium does not come to rest")
