# SPDX-License-Identifier: Apache-2.0
"""Run a matrix: models, cells, figures; several processes; a stopped run goes on where it was."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from allograft.evaluate.transfer.arms import Task, run_task
from allograft.evaluate.transfer.bench import Bench, Lab
from allograft.evaluate.transfer.cell import Cell, Role
from allograft.evaluate.transfer.plan import MatrixPlan
from allograft.evaluate.transfer.schedule import choose_rates, plan_cells, rate_tasks
from allograft.evaluate.transfer.store import Store, content_key
from allograft.evaluate.transfer.text import Texts
from allograft.evaluate.transfer.world import BASE, ModelJob, OwnModels, plan_world

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Progress:
    """What the progress callback is told.

    Attributes:
        phase: `models`, `rates`, `packets` or `cells`.
        done: Of this phase, found in the cache or made.
        of: In this phase.
        what: What was finished last.
    """

    phase: str
    done: int
    of: int
    what: str


Tell = Callable[[Progress], None]


def run_matrix(
    cache: Path, texts: Texts, plan: MatrixPlan, own: OwnModels, workers: int, tell: Tell
) -> list[Cell]:
    """All cells of a run; those that an earlier run finished are read.

    Args:
        cache: Directory of models, packets and cells.
        texts: What is read.
        plan: What is run.
        own: A person's own models.
        workers: Processes; 1 stays in this one.
        tell: Called after each model and cell.

    Raises:
        RejectedError: AG-RCP-*, AG-EVA-* for models or text that cannot be used.
    """
    world = plan_world(cache, texts, plan, own)
    lab = Lab(cache, plan, texts, world.models)
    with _Crew(lab, workers) as crew:
        for number, wave in enumerate(world.waves):
            missing = [job for job in wave if not job.is_made()]
            for done, job in enumerate(crew.each(_make_model, missing), 1):
                tell(
                    Progress(
                        f"models {number + 1}/{len(world.waves)}", done, len(missing), job.name
                    )
                )
        return _Matrix(lab, crew, tell).run()


class _Matrix:
    """The cells of one run."""

    def __init__(self, lab: Lab, crew: _Crew, tell: Tell) -> None:
        self._lab = lab
        self._crew = crew
        self._tell = tell
        self._store = _cells(lab)
        self._bench = Bench(lab)
        self._texts = lab.texts.digest()

    def run(self) -> list[Cell]:
        plan = self._lab.plan
        trials = rate_tasks(plan)
        tried = self._fill("rates", trials)
        chosen = choose_rates(list(zip(trials, tried, strict=True)))
        sizes = {cell.arm: cell.payload_bytes for cell in tried if cell.role is Role.RECIPE}
        packets, cells = plan_cells(
            plan, tuple(self._lab.models), chosen, sizes, bool(self._lab.texts.wrong)
        )
        return [*self._fill("packets", packets), *self._fill("cells", cells)]

    def _fill(self, phase: str, tasks: Sequence[Task]) -> list[Cell]:
        """The cells of some tasks, in their order."""
        keys = [self._key(task) for task in tasks]
        missing = {
            key: task for key, task in zip(keys, tasks, strict=True) if not self._store.has(key)
        }
        done = len(set(keys)) - len(missing)
        of = done + len(missing)
        if done:
            self._tell(Progress(phase, done, of, "found in the cache"))
        for key, task in self._crew.each(_fill_cell, list(missing.items())):
            done += 1
            self._tell(Progress(phase, done, of, f"{task.name} on {task.recipient}"))
            assert self._store.has(key)
        return [Cell.from_json(self._store.load(key)) for key in keys]

    def _key(self, task: Task) -> str:
        """What a cell follows from."""
        lab, base = self._lab, self._bench.describe(BASE)
        theirs = self._bench.describe(task.recipient)
        size = lab.plan.size
        return content_key(
            {
                "task": task.to_json(),
                "texts": self._texts,
                "base": [base.weights_digest, base.tokenizer_digest],
                "recipient": [theirs.weights_digest, theirs.tokenizer_digest],
                "budget": [size.steps, size.batch, size.window],
                "device": lab.plan.device,
            }
        )


class _Crew:
    """Works through items in worker processes, or here if there is to be one only."""

    def __init__(self, lab: Lab, workers: int) -> None:
        self._lab = lab
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Crew:
        if self._workers > 1:
            self._pool = ProcessPoolExecutor(
                self._workers,
                # A fork would share locks and threads that tensor libraries hold.
                multiprocessing.get_context("spawn"),
                _open_bench,
                (self._lab,),
            )
        return self

    def __exit__(self, *_error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def each(self, work: Callable[[Bench, _T], None], items: Sequence[_T]) -> Iterator[_T]:
        """Work on all items; yields each when it is done."""
        if self._pool is None:
            bench = Bench(self._lab)
            for item in items:
                work(bench, item)
                yield item
            return
        waiting = {self._pool.submit(_in_worker, work, item): item for item in items}
        for future in as_completed(waiting):
            future.result()
            yield waiting[future]


#: The bench of a worker process.
_bench: Bench | None = None


def _open_bench(lab: Lab) -> None:
    global _bench
    _bench = Bench(lab)


def _in_worker(work: Callable[[Bench, _T], None], item: _T) -> None:
    assert _bench is not None
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)  # it was killed, and what is left in the queue is nobody's any more
    work(_bench, item)


def _make_model(_own: Bench, job: ModelJob) -> None:
    job.run()


def _fill_cell(bench: Bench, item: tuple[str, Task]) -> None:
    key, task = item
    _cells(bench.lab).save(key, run_task(bench, task).to_json())


def _cells(lab: Lab) -> Store:
    return Store(lab.cache / "cells")
