# SPDX-License-Identifier: Apache-2.0
"""The reference models of a run, made from text or taken from a person's own directories.

- `base`: what donors train on.
- `relative`: the base, trained further on general text.
- `stranger`: the base's shape and tokenizer, with a beginning of its own.
- `wide`: another width and depth, the same tokenizer.
- `foreign`: another tokenizer.

Models are kept by a digest of everything that decides them, and made once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from allograft.crypto import canonical
from allograft.durable import durable_write
from allograft.errors import RejectedError
from allograft.evaluate.transfer.plan import MatrixPlan
from allograft.evaluate.transfer.store import content_key
from allograft.evaluate.transfer.text import Texts
from allograft.provenance.lineage import digest_weights
from allograft.recipes.pretrain import SMALL_PARAMETERS, run_job
from allograft.recipes.shape import PretrainJob, Shape, write_shape

BASE = "base"
_MADE = "made.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class OwnModels:
    """A person's own models.

    Attributes:
        base: Takes the place of the base that would be made; nothing of another width or tokenizer
            is made then.
        recipients: More models to try packets on, by name.
    """

    base: Path | None = None
    recipients: Mapping[str, Path] | None = None


@dataclass(frozen=True, slots=True)
class ModelJob:
    """One model to make, once what it begins with is there."""

    name: str
    job: PretrainJob

    def is_made(self) -> bool:
        """Whether it is there, whole."""
        return (Path(self.job.out) / _MADE).exists()

    def run(self) -> None:
        """Make it."""
        out = Path(self.job.out)
        shutil.rmtree(out, ignore_errors=True)
        run_job(self.job)
        durable_write(out / _MADE, json.dumps(asdict(self.job)).encode(), mode=0o644)


@dataclass(frozen=True, slots=True)
class World:
    """Models by name, the base first, and the jobs that make those that are made.

    `waves` are run one after another; the jobs of a wave do not depend on each other.
    """

    models: dict[str, Path]
    waves: tuple[tuple[ModelJob, ...], ...]


def plan_world(cache: Path, texts: Texts, plan: MatrixPlan, own: OwnModels) -> World:
    """Where every model lies or will lie, and what has to be trained.

    Raises:
        RejectedError: AG-RCP-032 if a person's directory holds no model.
    """
    planner = _Planner(cache, texts, plan)
    return planner.plan_own(own) if own.base else planner.plan_made(own)


class _Planner:
    def __init__(self, cache: Path, texts: Texts, plan: MatrixPlan) -> None:
        self._cache = cache.resolve() / "models"
        self._plan = plan
        self._texts = texts
        key = content_key({"general": list(texts.general_training)})
        self._general = cache / "text" / f"{key}.jsonl"
        if not self._general.exists():
            self._general.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"text": text}) for text in texts.general_training]
            durable_write(self._general, ("\n".join(lines) + "\n").encode(), mode=0o644)

    def plan_made(self, own: OwnModels) -> World:
        size = self._plan.size
        shape = self._shape("shape", size.shape, None)
        wide = self._shape("wide", size.wide, shape)
        fewer = replace(size.shape, vocabulary=3 * size.shape.vocabulary // 4)
        foreign = self._shape("foreign", fewer, None)
        base = self._fresh(BASE, shape, seed=1)
        first = (
            base,
            self._fresh("stranger", shape, seed=2),
            self._fresh("wide", wide, seed=3),
            self._fresh("foreign", foreign, seed=4),
        )
        relative = self._further(Path(base.job.out), size.pretrain_rate / 5)
        found = {job.name: Path(job.job.out) for job in first}
        models = {BASE: found.pop(BASE), "relative": Path(relative.job.out), **found}
        return World(models | _check_models(own.recipients or {}), (first, (relative,)))

    def plan_own(self, own: OwnModels) -> World:
        assert own.base is not None
        given = _check_models({BASE: own.base, **(own.recipients or {})})
        large = is_large(own.base)
        relative = self._further(own.base, 1e-4 if large else self._plan.size.pretrain_rate / 5)
        # A large model from nothing takes days: its stranger stays as it was born.
        stranger = self._fresh("stranger", own.base, seed=2, steps=0 if large else None)
        models = {BASE: given.pop(BASE), "relative": Path(relative.job.out)}
        models["stranger"] = Path(stranger.job.out)
        return World(models | given, ((relative, stranger),))

    def _shape(self, name: str, shape: Shape, tokenizer: Path | None) -> Path:
        """A directory with a tokenizer and a configuration; another's tokenizer if it is given."""
        key = content_key({"shape": asdict(shape), "text": self._general.stem, "name": name})
        out = self._cache / f"{name}-{key[:12]}"
        if not (out / _MADE).exists():
            texts = self._texts.general_training
            # Merges of another half of the text differ also where the sizes agree.
            write_shape(out, texts[::2] if name == "foreign" else texts, shape)
            for file in _TOKENIZER_FILES if tokenizer else ():
                assert tokenizer is not None
                shutil.copyfile(tokenizer / file, out / file)
            durable_write(out / _MADE, b"{}\n", mode=0o644)
        return out

    def _fresh(self, name: str, start: Path, seed: int, steps: int | None = None) -> ModelJob:
        size = self._plan.size
        made = size.pretrain_steps if steps is None else steps
        return self._job(name, start, True, made, size.pretrain_rate, seed)

    def _further(self, base: Path, rate: float) -> ModelJob:
        return self._job("relative", base, False, self._plan.size.descend_steps, rate, 5)

    def _job(
        self, name: str, start: Path, fresh: bool, steps: int, rate: float, seed: int
    ) -> ModelJob:
        job = PretrainJob(
            start=str(start.resolve()),
            text=str(self._general.resolve()),
            out="",
            fresh=fresh,
            steps=steps,
            learning_rate=rate,
            seed=seed,
            threads=self._plan.threads,
            batch_windows=self._plan.size.pretrain_batch,
            device=self._plan.device,
        )
        named: dict[str, canonical.Json] = asdict(job) | {"text": self._general.stem}
        # Names of made directories follow from their content; a person's own may be overwritten.
        named["start"] = start.name if self._cache in start.parents else digest_weights(start)
        key = content_key(named)
        return ModelJob(name, replace(job, out=str(self._cache / f"{name}-{key[:12]}")))


def _check_models(models: Mapping[str, Path]) -> dict[str, Path]:
    for name, path in models.items():
        if not (path / "config.json").is_file():
            raise RejectedError("AG-RCP-032", f"{name}: there is no config.json in {path}")
    return dict(models)


def is_large(model: Path) -> bool:
    """Whether a model has more weights than a small machine trains at the rates of small ones."""
    return sum(path.stat().st_size for path in model.glob("*.safetensors")) > 4 * SMALL_PARAMETERS
