# SPDX-License-Identifier: Apache-2.0
"""Small language models from nothing: a byte-BPE tokenizer and a Llama of about a million weights.

The same loop trains them as trains organs. Run as a program (`python -m`), it makes one model in a
process of its own, so that two cores train two models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from allograft.recipes.loop import train
from allograft.recipes.plan import LoopPlan, Step
from allograft.recipes.snapshot import load_model, load_tokenizer
from allograft.recipes.text import Document, make_windows, read_documents

_END = "<|endoftext|>"
_WINDOW = 128

#: Models above this size are further trained in their last blocks only, to stay within a demo.
SMALL_PARAMETERS = 50_000_000

Progress = Callable[[Step], None]


@dataclass(frozen=True, slots=True)
class PretrainJob:
    """One model to make.

    Attributes:
        start: Directory of the model to begin with: its weights for `fresh` false, and its shape
            only for `fresh` true.
        text: Training documents.
        out: Where the model and its tokenizer are written.
        fresh: Begin with random weights.
        steps: Training steps; 0 only saves.
        learning_rate: Peak rate.
        seed: Of weights and batches.
        threads: CPU threads.
    """

    start: str
    text: str
    out: str
    fresh: bool
    steps: int
    learning_rate: float
    seed: int
    threads: int


def train_tokenizer(texts: Sequence[str], vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; every text can be written in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)


def small_config(vocabulary: int) -> LlamaConfig:
    """A Llama of about a million weights: small enough for a minute on one core."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=112,
        intermediate_size=304,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def write_shape(directory: Path, texts: Sequence[str]) -> None:
    """Write a tokenizer and the configuration of a small model, without weights."""
    tokenizer = train_tokenizer(texts)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    small_config(len(tokenizer)).save_pretrained(directory)


def run_job(job: PretrainJob, progress: Progress | None = None) -> None:
    """Make one model and write it with its tokenizer."""
    # The demo shows its own progress; this library's bars would write over it.
    logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        tokenizer = load_tokenizer(Path(job.start))
        model = _fresh_model(job) if job.fresh else load_model(Path(job.start))
        if job.steps:
            _train_model(model, tokenizer, read_documents(Path(job.text)), job, progress)
        model.save_pretrained(job.out)
        tokenizer.save_pretrained(job.out)
    finally:
        torch.set_num_threads(threads)


def _fresh_model(job: PretrainJob) -> PreTrainedModel:
    """A model of the shape at `start` with its own random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(job.start, local_files_only=True, trust_remote_code=False)
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(job.seed)
        if isinstance(config, LlamaConfig):
            model: PreTrainedModel = LlamaForCausalLM(config)
        else:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    finally:
        torch.random.set_rng_state(state)
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
        steps=job.steps, learning_rate=job.learning_rate, weight_decay=0.05, seed=job.seed
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


def job_to_text(job: PretrainJob) -> str:
    """A job as an argument for this module run as a program."""
    return json.dumps(asdict(job))


def main() -> None:
    """Run the job given as the one argument."""
    run_job(PretrainJob(**json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
