# SPDX-License-Identifier: Apache-2.0
"""What workers do with models and text: describe, train, evaluate, try, compose, revert, export.

The only module of the site that loads tensor libraries. Invariant: a task writes below the work
directory it was given and nowhere else, and every result is a small JSON object.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.evaluate.audit import (
    AUDITED_WINDOWS,
    AuditedPersons,
    Readings,
    judge,
    read_all,
)
from allograft.evaluate.behaviour import Baseline, screen_behaviour, watch_base
from allograft.evaluate.bootstrap import paired_gain
from allograft.evaluate.gate import GateRules, Outcome
from allograft.evaluate.loss import Scoring, measure, prepare
from allograft.evaluate.scales import ScalePlan, learn_scales
from allograft.evaluate.screen import (
    ScreenReport,
    ScreenResult,
    ScreenRules,
    Spectrum,
    judge_spectrum,
    read_spectrum,
)
from allograft.evaluate.spectrum import weigh_attachment
from allograft.evaluate.trial import (
    OwnText,
    StateSeal,
    Subject,
    TrialPlan,
    TrialStep,
    attached,
    run_trial,
    seal_state,
)
from allograft.limits import LIMITS
from allograft.plainfile import read_plain
from allograft.privacy.dossier import write_gate
from allograft.privacy.dp import DpConstants
from allograft.privacy.memorisation import DpClaim
from allograft.privacy.people import People, read_people
from allograft.privacy.report import Exposed
from allograft.privacy.thresholds import AuditThresholds
from allograft.provenance.ancestry import (
    FILE_NAME,
    Ancestor,
    Ancestry,
    read_ancestors,
    write_ancestors,
)
from allograft.provenance.lineage import describe_base, digest_weights
from allograft.provenance.statement import write_base
from allograft.recipes import export
from allograft.recipes.attachment import load_attachment, rewrite_dose, save_attachment
from allograft.recipes.base import (
    Attachment,
    Donor,
    Payload,
    Plan,
    Recipient,
    load_recipe,
)
from allograft.recipes.blocks import describe_model
from allograft.recipes.delta import extract_difference
from allograft.recipes.documents import (
    Document,
    drop_near_duplicates,
    group_persons,
    read_documents,
    split_documents,
)
from allograft.recipes.facts import ExpertFacts
from allograft.recipes.plan import DeltaPlan, LoopPlan, Step, read_recipe_plan
from allograft.recipes.router import BASE, Router
from allograft.recipes.snapshot import load_model, load_tokenizer
from allograft.recipes.stack import Stack
from allograft.recipes.windows import Windows, make_person_windows, make_windows

Tell = Callable[[Mapping[str, Any]], None]
Task = Mapping[str, canonical.Json]

_HELD_OUT = 0.1
_PROMPT_CHARS = 200  # of a document, by which it is routed


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model with its tokenizer."""

    path: Path
    model: Any
    tokenizer: Any


def perform(task: Task, tell: Tell) -> dict[str, Any]:
    """Do one task.

    Raises:
        RejectedError: Whatever the task's parts refuse.
        UnavailableError: AG-STO-001 when the disk is full.
    """
    # One seed for everything that a library draws by itself.
    torch.manual_seed(0)
    return _TASKS[_text(task, "task")](task, tell)


def _describe(task: Task, tell: Tell) -> dict[str, Any]:
    tell({"stage": "reading weights"})
    path = Path(_text(task, "model"))
    base = describe_base(path)
    parents = _read_parents(path)
    tell({"stage": "loading model"})
    loaded = _load(task)
    counts = {
        name: len(drop_near_duplicates(read_documents(Path(_text(task, name)))))
        for name in ("data", "retention")
    }
    return {
        "base": write_base(base),
        "shape": describe_model(loaded.model.config).to_json(),
        "parameters": sum(value.numel() for value in loaded.model.parameters()),
        "documents": counts["data"],
        "retention_documents": counts["retention"],
        "parents": write_ancestors(parents),
    }


def _read_parents(model: Path) -> tuple[Ancestor, ...]:
    """The packets inside a model, by the record beside its weights."""
    try:
        content = read_plain(model / FILE_NAME, LIMITS.json_document_bytes)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise RejectedError("AG-PRO-012", f"{FILE_NAME}: {type(error).__name__}") from error
    return Ancestry.from_bytes(content).ancestors


def _train(task: Task, tell: Tell) -> dict[str, Any]:
    tell({"stage": "loading model"})
    workdir = Path(_text(task, "workdir"))
    plan = _read_plan(canonical.as_mapping(task["plan"]))
    tuned = Path(_text(task, "tuned")) if "tuned" in task else None
    if tuned is not None:
        _check_weights(tuned, canonical.as_sha256(task["tuned_digest"]))
    if tuned is not None and isinstance(plan.recipe, DeltaPlan):
        return _compare(task, workdir, plan.recipe, tuned)
    loaded = _load(task)
    if task["people"]:
        windows = _person_windows(task, loaded)
    else:
        documents, _ = _donor_split(task)
        windows = make_windows(documents, loaded.tokenizer, _window(task, loaded), packed=True)

    def progress(step: Step) -> None:
        tell({"stage": "training", "done": step.number, "of": step.steps, "loss": step.loss})

    other = load_model(tuned, str(loaded.model.device)) if tuned is not None else None
    donor = Donor(loaded.model, windows, workdir, progress, tuned=other)
    extract = load_recipe(_text(task, "kind")).extract(donor, plan)
    return {
        "files": [path.name for path in extract.files],
        "facts": extract.facts.to_json(),
        "report": dict(extract.report),
        "windows": len(windows),
        "device": str(loaded.model.device),
    }


def _compare(task: Task, workdir: Path, plan: DeltaPlan, tuned: Path) -> dict[str, Any]:
    """A delta of two snapshots, in the form of a training's result."""
    anchor = Path(_text(task, "model"))
    digest, stage = canonical.as_sha256(task["base_digest"]), _text(task, "stage")
    extract = extract_difference(anchor, tuned, plan, workdir, digest, stage)
    return {
        "files": [path.name for path in extract.files],
        "facts": extract.facts.to_json(),
        "report": dict(extract.report),
        "windows": 0,
        "device": "cpu",
    }


def _person_windows(task: Task, loaded: _Loaded) -> Windows:
    """Training text by person: those drawn for training, and the planted canaries.

    Nothing is deduplicated: whether one person's record stays must not depend on another's.
    """
    people = read_people(Path(_text(task, "people")))
    persons = _Persons(task)
    texts = [persons.documents(person) for person in people.split.train]
    texts += [[Document(planted.text)] for planted in people.planted]
    most = canonical.as_int(task["windows_per_person"])
    return make_person_windows(texts, loaded.tokenizer, _window(task, loaded), most)


class _Persons:
    """The records of private data by whom they are about."""

    def __init__(self, task: Task) -> None:
        data, field = Path(_text(task, "data")), _text(task, "person_field")
        self._documents = group_persons(read_documents(data, field))

    def documents(self, person: str) -> list[Document]:
        """One person's records.

        Raises:
            RejectedError: AG-RCP-034 if they were there when the coins were tossed.
        """
        if person not in self._documents:
            raise RejectedError("AG-RCP-034", "people vanished from the data since it was planned")
        return self._documents[person]

    def text(self, person: str) -> str:
        """All text of one person."""
        return "\n\n".join(document.text for document in self.documents(person))


def _evaluate(task: Task, tell: Tell) -> dict[str, Any]:
    """What the donor itself finds with the very bytes that will leave."""
    tell({"stage": "loading model"})
    loaded = _load(task)
    held_out = _held_out(task)
    scoring = Scoring()
    domain = prepare(_texts(held_out, task), loaded.tokenizer, loaded.model, scoring)
    retention = prepare(
        _texts(drop_near_duplicates(read_documents(Path(_text(task, "retention")))), task),
        loaded.tokenizer,
        loaded.model,
        scoring,
    )
    recipe, attachment = _fit(task, loaded)
    before, kept_before = measure(loaded.model, domain), measure(loaded.model, retention)
    points = []
    doses = attachment.doses
    for number, dose in enumerate(doses):
        tell({"stage": "evaluating", "done": number, "of": len(doses)})
        handle = recipe.attach(replace(attachment, dose=dose), loaded.model)
        try:
            after, kept = measure(loaded.model, domain), measure(loaded.model, retention)
        finally:
            recipe.detach(handle)
        gain, change = paired_gain(before, after), paired_gain(kept_before, kept)
        points.append({"dose": dose, "gain": asdict(gain), "retention_change": asdict(change)})
    return {"curve": points, "documents": before.documents, "retention": kept_before.documents}


def _held_out(task: Task) -> list[Document]:
    """What the donor did not train on: documents, or in a protected mode whole persons."""
    if not task["people"]:
        return _donor_split(task)[1]
    people = read_people(Path(_text(task, "people")))
    persons = _Persons(task)
    return [each for person in people.split.holdout for each in persons.documents(person)]


def _audit(task: Task, tell: Tell) -> dict[str, Any]:
    """Try to make the very bytes that would leave tell about people, and judge what came of it."""
    tell({"stage": "loading model"})
    loaded = _load(task)
    people = read_people(Path(_text(task, "people")))
    claimed = _read_claim(task["claim"])
    audited = _audited(task, loaded, people)
    recipe, attachment = _fit(task, loaded)
    tell({"stage": "auditing: the base"})
    before = read_all(loaded.model, loaded.tokenizer, audited, people.canaries)
    handle = recipe.attach(_as_an_attacker_would(attachment), loaded.model)
    try:
        tell({"stage": "auditing: the packet"})
        after = read_all(loaded.model, loaded.tokenizer, audited, people.canaries)
    finally:
        recipe.detach(handle)
    tell({"stage": "auditing: judging"})
    audit = judge(
        Readings(audited, people.canaries, before, after),
        trained=len(people.split.train),
        claimed=claimed,
        thresholds=AuditThresholds.from_json(task["thresholds"]),
    )
    return {
        "gates": [write_gate(gate) for gate in audit.gates],
        "figures": {gate: dict(named) for gate, named in audit.figures.items()},
        "exposure": [list(point) for point in audit.exposure],
        "roc": [list(point) for point in audit.roc],
        "exposed": [
            Exposed(
                people.audited_members[each.number], each.saved, each.extractable, each.recognised
            ).to_json()
            for each in audit.exposed
        ],
    }


def _as_an_attacker_would(attachment: Attachment) -> Attachment:
    """An attachment at full dose, of an expert its own words alone.

    Whoever holds an expert's payload runs it without the gate and without a recipient's words, so
    what these would hide has left the site all the same.
    """
    facts = attachment.facts
    if isinstance(facts, ExpertFacts):
        facts = replace(facts, mixing="ensemble", gate=0.0)
    return replace(attachment, dose=1.0, facts=facts)


def _audited(task: Task, loaded: _Loaded, people: People) -> AuditedPersons:
    """Whom the audits look at, in the very windows that training saw or would have seen."""
    persons = _Persons(task)
    chosen = [*people.audited_members, *people.audited_others]
    rest = sorted({*people.split.train, *people.split.holdout} - set(chosen))
    most, window = canonical.as_int(task["windows_per_person"]), _window(task, loaded)

    def cut(some: Sequence[str], most: int) -> Windows:
        documents = [persons.documents(person) for person in some]
        return make_person_windows(documents, loaded.tokenizer, window, most)

    try:
        elsewhere = cut(rest, most)
    except RejectedError:
        elsewhere = None  # there is nobody else, or nobody with two tokens
    return AuditedPersons(
        texts=tuple(persons.text(person) for person in chosen),
        windows=cut(chosen, min(most, AUDITED_WINDOWS)),
        members=len(people.audited_members),
        elsewhere=elsewhere,
    )


def _read_claim(value: canonical.Json) -> DpClaim | None:
    if value is None:
        return None
    fields = canonical.as_object(value, {"epsilon", "delta"})
    return DpClaim(canonical.as_number(fields["epsilon"]), canonical.as_number(fields["delta"]))


def _try(task: Task, tell: Tell) -> dict[str, Any]:
    """Screens, then a recipient's trial; on a good outcome the attachment is saved at its dose.

    An alarm ends it before the trial, unless a person said to go on. What a dose changes need not
    grow with it, so a packet is screened at full dose first and again at the dose it would keep.
    """
    tell({"stage": "loading model"})
    loaded = _load(task)
    baseline = _watch_base(task, loaded, tell)
    _load_stack(task, loaded)
    recipe, attachment = _fit(task, loaded)
    screens = [_screen_packet(task, loaded, baseline, (recipe, attachment))]
    if screens[0].alarms and not canonical.as_bool(task["despite_alarm"]):
        return {"screens": [screens[0].to_json()], "report": None}
    report = run_trial(
        Subject(recipe, attachment, loaded.model, loaded.tokenizer),
        _own_text(task),
        TrialPlan(rules=_rules(task)),
        _trial_progress(tell),
    )
    if report.decision.outcome is Outcome.KEEP:
        kept = replace(attachment, dose=report.decision.dose)
        if kept.dose != screens[0].dose:
            tell({"stage": f"screens: dose {kept.dose:g}"})
            screens.append(_screen_packet(task, loaded, baseline, (recipe, kept)))
        target = Path(_text(task, "attachment"))
        shutil.rmtree(target, ignore_errors=True)
        save_attachment(kept, target)
    return {
        "screens": [screen.to_json() for screen in screens],
        "report": report.to_json(),
        "fit": dict(attachment.report),
    }


def _own_text(task: Task) -> OwnText:
    """The site's own documents that packets are tried on."""
    domain, retention = (
        _texts(drop_near_duplicates(read_documents(Path(_text(task, name)))), task)
        for name in ("data", "retention")
    )
    return OwnText(domain, retention)


def _rules(task: Task) -> GateRules:
    return GateRules(
        min_gain=canonical.as_number(task["min_gain"]),
        max_retention_loss=canonical.as_number(task["max_retention_loss"]),
    )


def _trial_progress(tell: Tell) -> Callable[[TrialStep], None]:
    return lambda step: tell({"stage": f"trial: {step.what}", "done": step.done, "of": step.steps})


def _screen(task: Task, tell: Tell) -> dict[str, Any]:
    """Screen what is kept on a model, as it is composed now."""
    tell({"stage": "loading model"})
    loaded = _load(task)
    baseline = _watch_base(task, loaded, tell)
    _load_stack(task, loaded)
    tell({"stage": "screens: kept attachments"})
    started = time.monotonic()
    results = screen_behaviour(loaded.model, baseline)
    return {"screen": _report(loaded, 1.0, results, {}, started).to_json()}


def _watch_base(task: Task, loaded: _Loaded, tell: Tell) -> Baseline:
    tell({"stage": "screens: the plain base"})
    own = [canonical.as_text(line) for line in canonical.as_list(task["templates"])]
    return watch_base(
        loaded.model, loaded.tokenizer, templates=own, seed=canonical.as_int(task["screen_seed"])
    )


def _screen_packet(
    task: Task, loaded: _Loaded, baseline: Baseline, packet: tuple[Any, Attachment]
) -> ScreenReport:
    """Screen a packet on the composed model; the model is left bit-exactly as it was."""
    started = time.monotonic()
    recipe, attachment = packet
    spectrum = weigh_attachment(attachment, loaded.model)
    bank = [read_spectrum(entry) for entry in canonical.as_list(task["bank"])]
    seal = StateSeal(loaded.model, [baseline.head + row for row in baseline.prompts])
    with attached(recipe, attachment, loaded.model, seal):
        behaviour = screen_behaviour(loaded.model, baseline)
    results = (judge_spectrum(spectrum, bank), *behaviour)
    return _report(loaded, attachment.dose, results, spectrum, started)


def _report(
    loaded: _Loaded,
    dose: float,
    results: tuple[ScreenResult, ...],
    spectrum: Spectrum,
    started: float,
) -> ScreenReport:
    return ScreenReport(
        version=ScreenRules().version,
        dose=dose,
        results=results,
        spectrum=spectrum,
        seconds=time.monotonic() - started,
        device=str(loaded.model.device),
    )


def _revert(task: Task, tell: Tell) -> dict[str, Any]:
    """Show that a kept attachment leaves no bit behind.

    The model is loaded with the rest of its stack and remembered; the attachment goes on and comes
    off again, beside and above the others; state digest and logits must be what they were.
    """
    tell({"stage": "loading model"})
    loaded = _load(task)
    stack = _load_stack(task, loaded)
    attachment = load_attachment(Path(_text(task, "attachment")))
    documents = _texts(read_documents(Path(_text(task, "data"))), task)[:16]
    tell({"stage": "comparing states"})
    seal = seal_state(loaded.model, prepare(documents, loaded.tokenizer, loaded.model))
    stack.attach(attachment)
    stack.detach(attachment.attachment_id)
    seal.check(loaded.model)
    return {"bit_exact": True, "state_digest": seal.digest}


def _export(task: Task, tell: Tell) -> dict[str, Any]:
    out = Path(_text(task, "out"))
    base = canonical.as_sha256(task["model_digest"])
    donors = canonical.as_mapping(task["donors"])
    source = export.Source(base, {key: canonical.as_text(name) for key, name in donors.items()})
    if _text(task, "format") == "peft":
        paths = _paths(task)
        if len(paths) != 1:
            raise RejectedError(
                "AG-RCP-024", f"{len(paths)} attachments kept; a PEFT directory holds one"
            )
        model = Path(_text(task, "model"))
        export.export_peft(load_attachment(paths[0]), out, str(model), model, source)
    else:
        tell({"stage": "loading model"})
        loaded = _load(task)
        stack = _load_stack(task, loaded)
        tell({"stage": "writing"})
        ancestry = Ancestry(base, read_ancestors(task["parents"]))
        export.export_merged(stack, loaded.tokenizer, out, source, ancestry)
        return {"out": str(out), "weights_digest": describe_base(out).weights_digest}
    return {"out": str(out)}


def _scale(task: Task, tell: Tell) -> dict[str, Any]:
    """Learn the doses of what is kept together; if told to, store those that are accepted."""
    tell({"stage": "loading model"})
    loaded = _load(task)
    stack = _load_stack(task, loaded)
    plan = ScalePlan(rules=_rules(task))
    found = learn_scales(stack, loaded.tokenizer, _own_text(task), plan, _trial_progress(tell))
    apply = canonical.as_bool(task["apply"]) and found.accepted
    for path in _paths(task) if apply else ():
        rewrite_dose(path, found.learnt[load_attachment(path).attachment_id])
    doses = found.learnt if apply else found.present
    return {"report": found.to_json(), "doses": dict(doses)}


def _route(task: Task, tell: Tell) -> dict[str, Any]:
    """Which attachment each of the site's own documents would be answered by, and how well."""
    tell({"stage": "loading model"})
    loaded = _load(task)
    attachments = [load_attachment(path) for path in _paths(task)]
    text = _own_text(task)
    result: dict[str, Any] = {}
    for what, documents in (("domain", text.domain), ("retention", text.retention)):
        tell({"stage": f"routing: {what}"})
        long = [document for document in documents if len(document) >= 2 * _PROMPT_CHARS]
        if not long:
            result[what] = {"documents": 0}
            continue
        prompts = [document[:_PROMPT_CHARS] for document in long]
        rests = [document[_PROMPT_CHARS : 3 * _PROMPT_CHARS] for document in long]
        router = Router(loaded.model, loaded.tokenizer, attachments)
        chosen = Counter(choice.attachment_id for choice in router.choose(prompts))
        base = Router(loaded.model, loaded.tokenizer, ()).score(prompts, rests)
        result[what] = {
            "documents": len(long),
            "base": chosen[BASE],
            "chosen": {entry.attachment_id: chosen[entry.attachment_id] for entry in attachments},
            "loss_base": sum(base) / len(long),
            "loss_routed": sum(router.score(prompts, rests)) / len(long),
        }
    return result


_TASKS: dict[str, Callable[[Task, Tell], dict[str, Any]]] = {
    "describe": _describe,
    "train": _train,
    "evaluate": _evaluate,
    "audit": _audit,
    "try": _try,
    "screen": _screen,
    "revert": _revert,
    "export": _export,
    "scale": _scale,
    "route": _route,
}


def _text(task: Task, name: str) -> str:
    return canonical.as_text(task[name])


def _load(task: Task) -> _Loaded:
    """Load the model of a task, if it still is the one that was added.

    Raises:
        RejectedError: AG-RCP-028 if its weights changed since: what was signed of it, and every
            packet on it, would be of another model. Those of `load_model` and `load_tokenizer`.
    """
    path = Path(_text(task, "model"))
    added = task.get("model_digest")  # a model that is being added has none yet
    if added is not None:
        _check_weights(path, canonical.as_sha256(added))
    device = _text(task, "device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return _Loaded(path, load_model(path, device), load_tokenizer(path))


def _check_weights(path: Path, added: str) -> None:
    """Refuse a model that is no longer the one that was added.

    Raises:
        RejectedError: AG-RCP-028.
    """
    if digest_weights(path) != added:
        raise RejectedError("AG-RCP-028", path.name)


def _load_stack(task: Task, loaded: _Loaded) -> Stack:
    stack = Stack(loaded.model)
    stack.attach_all(load_attachment(path) for path in _paths(task))
    return stack


def _paths(task: Task) -> list[Path]:
    """Where the attachments of a model's stack are stored."""
    return [Path(canonical.as_text(path)) for path in canonical.as_list(task["stack"])]


def _fit(task: Task, loaded: _Loaded) -> tuple[Any, Attachment]:
    recipe = load_recipe(_text(task, "kind"))
    payload = Payload(
        kind=recipe.kind,
        directory=Path(_text(task, "payload")),
        facts=canonical.as_mapping(task["facts"]),
        packet_id=_text(task, "packet_id"),
        base_digest=canonical.as_text(task.get("base_digest", "")),
    )
    # Only a packet that names one of the site's other models asks for them.
    bases = canonical.as_mapping(task.get("bases", {}))
    paths = {digest: Path(canonical.as_text(path)) for digest, path in bases.items()}
    return recipe, recipe.fit(payload, Recipient(loaded.model, bases=paths))


def _donor_split(task: Task) -> tuple[list[Document], list[Document]]:
    documents = read_documents(Path(_text(task, "data")))
    return split_documents(documents, _HELD_OUT, canonical.as_int(task["seed"]))


def _window(task: Task, loaded: _Loaded) -> int:
    wanted = canonical.as_int(task["window_tokens"])
    context = getattr(loaded.model.config, "max_position_embeddings", wanted)
    return min(wanted, int(context))


def _texts(documents: Sequence[Document], task: Task) -> list[str]:
    """The documents' texts, at most so many of them; which ones follows from their content."""
    texts = sorted(
        (document.text for document in documents),
        key=lambda text: hashlib.sha256(text.encode("utf-8")).digest(),
    )
    limit = canonical.as_int(task["max_documents"])
    chosen = random.Random(0).sample(texts, limit) if len(texts) > limit else texts  # noqa: S311
    return [text for text in chosen if len(text.strip()) > 1]


def _read_plan(fields: Mapping[str, canonical.Json]) -> Plan:
    recipe = read_recipe_plan(canonical.as_text(fields["kind"]), fields["recipe"])
    loop = canonical.as_mapping(fields["loop"])
    plan = LoopPlan(
        steps=canonical.as_int(loop["steps"]),
        batch_windows=canonical.as_int(loop["batch_windows"]),
        accumulation=canonical.as_int(loop["accumulation"]),
        learning_rate=canonical.as_number(loop["learning_rate"]),
        seed=canonical.as_int(loop["seed"]),
        checkpointing=canonical.as_bool(loop["checkpointing"]),
        snapshot_s=canonical.as_number(loop["snapshot_s"]),
    )
    private = fields["private"]
    return Plan(recipe, plan, None if private is None else DpConstants.from_json(private))
