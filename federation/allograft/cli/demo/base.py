# SPDX-License-Identifier: Apache-2.0
"""What the demo's sites start with: three related models, private text, and text to stay good at.

A base; a descendant, which is the base trained further on general text; and a stranger of the same
shape and tokenizer with its own beginning. Each can be replaced by a person's own files. Models
train in two processes, the stranger beside the other two, which are ended with this one.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from allograft.cli.demo import text as demo_text
from allograft.cli.demo.processes import Reporter, reporting
from allograft.crypto import canonical
from allograft.errors import RejectedError, UnavailableError
from allograft.recipes.documents import drop_near_duplicates, read_documents
from allograft.recipes.shape import PretrainJob, write_shape

#: Distinct documents that a trial wants of each sort; see `evaluate.gate.GateRules`.
_TRIAL_DOCUMENTS = 60
_RETENTION_CHARS = 600  # enough to judge by; every trial measures these texts eight times
_LARGE_BYTES = 200 << 20  # about 50 million weights; larger models want a gentler rate
_LOOK_S = 0.3
_STILL_S = 300.0
# Peak learning rates: of a made model, of its descendant, and of a descendant of a person's own.
_FRESH_RATE, _FURTHER_RATE, _OWN_RATE = 5e-3, 1e-3, 1e-4


@dataclass(frozen=True, slots=True)
class WorldOptions:
    """Files of the person's own, and sizes of what is made.

    Attributes:
        base: Directory of a causal model to use as the base.
        data: The donor's domain documents; some are set aside for the recipients.
        general: General documents, to train on and to stay good at.
        seed: Of models and patients.
        base_steps: Training steps of the base.
        descendant_steps: Further steps of the descendant.
        stranger_steps: Training steps of the stranger.
        donor_notes: Notes of the donor.
        own_notes: Notes of each recipient.
        retention_documents: General documents of each recipient.
        replay: General training documents that the donor mixes into its own, per own document.
            Measured on this text: a quarter cuts the harm to general text by ten and keeps the
            gain.
    """

    base: Path | None = None
    data: Path | None = None
    general: Path | None = None
    seed: int = 0
    base_steps: int = 120
    descendant_steps: int = 20
    stranger_steps: int = 60
    donor_notes: int = 1500
    own_notes: int = 100
    retention_documents: int = 80
    replay: float = 0.25


@dataclass(frozen=True, slots=True)
class OwnFiles:
    """Where one recipient's own text lies."""

    domain: Path
    retention: Path


@dataclass(frozen=True, slots=True)
class World:
    """Everything the sites start with.

    Attributes:
        base: Model directory of the donor and of the recipient that keeps.
        descendant: Model directory of the further-trained relative.
        stranger: Model directory of the independently trained model of the same shape.
        donor_data: What the donor trains on (JSONL): its private text, with some general text.
        donor_retention: General text that the donor evaluates on.
        same_files: Own text of the recipient with the same base.
        descendant_files: Own text of the recipient with the descendant.
        stranger_files: Own text of the recipient with the stranger.
        nature: What the donor may truthfully declare its data to be; empty for a person's own.
        domain: The domain in a few words, for the offer.
        learning_rate: The donor's peak rate, which depends on the size of the base.
    """

    base: Path
    descendant: Path
    stranger: Path
    donor_data: Path
    donor_retention: Path
    same_files: OwnFiles
    descendant_files: OwnFiles
    stranger_files: OwnFiles
    nature: str
    domain: str
    learning_rate: float


#: Told what is being made and how much of it is done, 0 to 1.
Progress = Callable[[str, float], None]


def check_own_files(options: WorldOptions) -> None:
    """Refuse a person's files that cannot be used, before anything is made for them.

    Raises:
        RejectedError: AG-DEM-010 or AG-RCP-03x for unusable text, AG-DEM-011 for an unusable base.
    """
    if options.base is not None:
        _check_base(options.base)
    for name, path in (("data", options.data), ("general", options.general)):
        if path is None:
            continue
        if not path.is_file():
            raise RejectedError("AG-DEM-010", f"--{name}: there is no file {path}")
        _require(len(read_documents(path)), _TRIAL_DOCUMENTS, f"documents in --{name}")


def _check_base(base: Path) -> None:
    if not (base / "config.json").is_file():
        raise RejectedError("AG-DEM-011", f"there is no config.json in the base directory {base}")


def make_world(directory: Path, options: WorldOptions, progress: Progress) -> World:
    """Make or take everything the sites start with.

    Raises:
        RejectedError: AG-DEM-010 or AG-RCP-03x for unusable text, AG-DEM-011 or AG-RCP-03x for an
            unusable base.
        UnavailableError: AG-DEM-012 if a training process failed.
    """
    return _Maker(directory, options, progress).make()


class _Maker:
    """Makes one world; holds what the phases share."""

    def __init__(self, directory: Path, options: WorldOptions, progress: Progress) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._options = options
        self._progress = progress
        self._threads = max(1, min(4, (os.cpu_count() or 2) // 2))

    def make(self) -> World:
        self._progress("text", 0.0)
        general = self._general_text()
        same, descendant, stranger = self._domain_text(general)
        base, relative, alien = self._models(general)
        return World(
            base=base,
            descendant=relative,
            stranger=alien,
            donor_data=self._directory / "donor.jsonl",
            donor_retention=self._directory / "retention-donor.jsonl",
            same_files=OwnFiles(same, self._directory / "retention-same.jsonl"),
            descendant_files=OwnFiles(descendant, self._directory / "retention-descendant.jsonl"),
            stranger_files=OwnFiles(stranger, self._directory / "retention-stranger.jsonl"),
            nature="synthetic" if self._options.data is None else "",
            domain="synthetic clinical notes" if self._options.data is None else "own documents",
            learning_rate=3e-3 if _weight_bytes(base) < _LARGE_BYTES else 1e-4,
        )

    def _general_text(self) -> Path:
        """Write training and retention text; returns the training file."""
        if self._options.general is None:
            found = demo_text.read_python_text()
            training, retention = found.training, found.retention
        else:
            training, retention = _split(_read_texts(self._options.general), 0.8)
        _require(len(retention), _TRIAL_DOCUMENTS, "general documents set aside")
        retention = tuple(
            text[:_RETENTION_CHARS] for text in retention[: self._options.retention_documents]
        )
        for name in ("donor", "same", "descendant", "stranger"):
            demo_text.save_texts(self._directory / f"retention-{name}.jsonl", retention)
        path = self._directory / "general.jsonl"
        demo_text.save_texts(path, training)
        return path

    def _domain_text(self, general: Path) -> tuple[Path, Path, Path]:
        """Write the donor's notes and those of the three recipients, all of other patients."""
        names = ("donor", "same", "descendant", "stranger")
        paths = [self._directory / f"notes-{name}.jsonl" for name in names]
        if self._options.data is None:
            medicine = demo_text.invent_medicine()
            for number, path in enumerate(paths):
                count = self._options.own_notes if number else self._options.donor_notes
                seed = 1000 * self._options.seed + number
                demo_text.save_notes(path, demo_text.write_notes(medicine, count, seed))
        else:
            donor, own = _split(_read_texts(self._options.data), 0.6)
            half = len(own) // 2
            _require(half, _TRIAL_DOCUMENTS, "documents for each recipient")
            # The stranger refuses before it needs text, so it may share the descendant's.
            for path, texts in zip(paths, (donor, own[:half], own[half:], own[half:]), strict=True):
                demo_text.save_texts(path, texts)
        self._mix(paths[0], general)
        return paths[1], paths[2], paths[3]

    def _mix(self, notes: Path, general: Path) -> None:
        """Write what the donor trains on: its notes with some general text among them."""
        own = _read_texts(notes)
        replayed = demo_text.shuffle_texts(_read_texts(general))
        chosen = replayed[: int(self._options.replay * len(own))]
        mixed = demo_text.shuffle_texts([*own, *chosen])
        demo_text.save_texts(self._directory / "donor.jsonl", mixed)

    def _models(self, general: Path) -> tuple[Path, Path, Path]:
        options = self._options
        shape = options.base or self._directory / "shape"
        if options.base is None:
            self._progress("tokenizer", 0.0)
            write_shape(shape, _read_texts(general))
        else:
            _check_base(options.base)
        base = options.base or self._directory / "base"
        descendant, stranger = self._directory / "descendant", self._directory / "stranger"
        made, text, threads = options.base is None, str(general), self._threads
        seed = 1000 * options.seed
        alien = PretrainJob(
            str(shape), text, str(stranger), True, options.stranger_steps if made else 0,
            _FRESH_RATE, seed + 3, threads,
        )  # fmt: skip
        line = {
            "further-trained descendant": PretrainJob(
                str(base), text, str(descendant), False, options.descendant_steps,
                _FURTHER_RATE if made else _OWN_RATE, seed + 2, threads,
            )
        }  # fmt: skip
        if made:
            job = PretrainJob(
                str(shape), text, str(base), True, options.base_steps, _FRESH_RATE, seed + 1,
                threads,
            )  # fmt: skip
            line = {"base model": job} | line
        with self._training([alien]) as aside, self._training(list(line.values())) as child:
            self._finish(tuple(line), child)
            self._finish(("independent model",), aside)
        return base, descendant, stranger

    @contextlib.contextmanager
    def _training(self, jobs: Sequence[PretrainJob]) -> Iterator[Reporter]:
        """Train models one after another in a process, which never outlives the block."""
        written = json.dumps([asdict(job) for job in jobs])
        command = [sys.executable, "-m", "allograft.recipes.pretrain", written]
        with reporting(command, Path(jobs[0].out).with_suffix(".log")) as child:
            yield child

    def _finish(self, names: Sequence[str], child: Reporter) -> None:
        """Wait for a training process, as long as it moves.

        Args:
            names: What its models are, in order.
            child: The process.

        Raises:
            RejectedError: The code that the process refused with.
            UnavailableError: AG-DEM-012 if it died or stands still.
        """
        last, since_s = child.last(), time.monotonic()
        while child.process.poll() is None:
            time.sleep(_LOOK_S)
            said = child.last()
            if said != last:
                last, since_s = said, time.monotonic()
                if "of" in said:
                    done, of = canonical.as_int(said["done"]), canonical.as_int(said["of"])
                    self._progress(names[canonical.as_int(said["model"])], done / of)
            if time.monotonic() - since_s > _STILL_S:
                raise UnavailableError("AG-DEM-012", f"training the {names[-1]} stands still")
        if child.process.returncode:
            if "error" in (said := child.last()):
                error = canonical.as_mapping(said["error"])
                raise RejectedError(
                    canonical.as_text(error["code"]), canonical.as_text(error["cause"])
                )
            status = child.process.returncode
            raise UnavailableError("AG-DEM-012", f"training the {names[-1]} ended with {status}")


def _weight_bytes(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def _read_texts(path: Path) -> list[str]:
    return [document.text for document in drop_near_duplicates(read_documents(path))]


def _split(texts: Sequence[str], first: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Two disjoint sets of documents, by digest: same file, same split."""
    ordered = demo_text.shuffle_texts(texts)
    cut = int(first * len(ordered))
    return tuple(ordered[:cut]), tuple(ordered[cut:])


def _require(count: int, least: int, what: str) -> None:
    if count < least:
        raise RejectedError("AG-DEM-010", f"{count} {what}, at least {least} needed")
