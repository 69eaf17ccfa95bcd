# SPDX-License-Identifier: Apache-2.0
"""Small language models from nothing, and further training of a person's own.

The same loop trains them as trains organs. It runs as a program (`python -m`), so that two cores
train two models and the process that tells the story never loads tensors. It says how far it is in
lines of JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from allograft.errors import AllograftError
from allograft.recipes.documents import Document, read_documents
from allograft.recipes.loop import train
from allograft.recipes.plan import LoopPlan, Step
from allograft.recipes.shape import PretrainJob
from allograft.recipes.snapshot import load_model, load_tokenizer
from allograft.recipes.windows import make_windows

_WINDOW = 128

#: Models above this size are further trained in their last blocks only, to stay within a demo.
SMALL_PARAMETERS = 50_000_000

Progress = Callable[[Step], None]


def run_job(job: PretrainJob, progress: Progress | None = None) -> None:
    """Make one model and write it with its tokenizer."""
    logging.disable_progress_bar()  # only our own lines are for the one who reads them
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    tokenizer = load_tokenizer(Path(job.start))
    model = (
        _fresh_model(job.start).to(job.device)
        if job.fresh
        else load_model(Path(job.start), job.device)
    )
    if job.steps:
        _train_model(model, tokenizer, read_documents(Path(job.text)), job, progress)
    model.save_pretrained(job.out)
    tokenizer.save_pretrained(job.out)


def _fresh_model(start: str) -> PreTrainedModel:
    """A model of the shape at `start` with random weights of its own."""
    config = AutoConfig.from_pretrained(start, local_files_only=True, trust_remote_code=False)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def _train_model(
    model: PreTrainedModel,
    tokenizer: Any,
    documents: Sequence[Document],
    job: PretrainJob,
    progress: Progress | None,
) -> None:
    windows = make_windows(documents, tokenizer, _WINDOW, packed=True)
    plan = LoopPlan(
        steps=job.steps,
        batch_windows=job.batch_windows,
        learning_rate=job.learning_rate,
        weight_decay=0.05,
        seed=job.seed,
    )

    def forward(_numbers: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits

    model.train()
    train(forward, _learning(model), windows, plan, progress=progress)
    model.eval()


def _learning(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """All parameters of a small model, the last two blocks of a large one."""
    named = dict(model.named_parameters())
    if sum(value.numel() for value in named.values()) <= SMALL_PARAMETERS:
        return named
    from allograft.recipes.blocks import model_blocks

    chosen = {id(v) for block in model_blocks(model)[-2:] for v in block.parameters()}
    for value in named.values():
        value.requires_grad_(id(value) in chosen)
    return {name: value for name, value in named.items() if id(value) in chosen}


def main() -> None:
    """Run the jobs given as the one argument, one after another."""
    try:
        for number, fields in enumerate(json.loads(sys.argv[1])):
            run_job(PretrainJob(**fields), partial(_tell, number))
    except AllograftError as error:
        print(json.dumps({"error": {"code": error.code, "cause": error.cause}}), flush=True)
        sys.exit(1)


def _tell(model: int, step: Step) -> None:
    said = {"model": model, "done": step.number, "of": step.steps}
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
