# SPDX-License-Identifier: Apache-2.0
"""What a model remembers of texts: measurements for the gates of `privacy.memorisation`.

Every score compares two models, the public base and the base with the packet attached: the base is
public, so this is what an attacker has, and what the base knew already cancels. Each model is read
once, so that one model can be read before and after an attachment.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from allograft.errors import RejectedError
from allograft.evaluate.bootstrap import Losses
from allograft.evaluate.loss import (
    Scoring,
    context_tokens,
    encode_all,
    evaluating,
    measure,
    measure_tokens,
    pad_batch,
    predicted_tokens,
    prepare,
    prepare_windows,
)
from allograft.privacy.audit import column_aucs
from allograft.privacy.canaries import CanaryRecord, Style
from allograft.privacy.memorisation import CanaryEvidence, ExtractionEvidence, RepeatedEvidence
from allograft.recipes.windows import Windows

#: A suffix is asked for after at least so many tokens.
PROMPT_TOKENS = 16

_WORD = re.compile(r"\w+")
_BLIND_WORDS = 1000
_RIDGE = 1.0

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class TextReading:
    """Texts as one model reads them.

    Attributes:
        nats: Loss of each predicted token, one array per text.
        tokens: Those tokens.
    """

    nats: tuple[Numbers, ...]
    tokens: tuple[npt.NDArray[np.int64], ...]

    @property
    def totals(self) -> Numbers:
        """Loss of each text in nats, summed over its tokens [texts]."""
        return np.array([document.sum() for document in self.nats], dtype=np.float64)

    @property
    def counts(self) -> Numbers:
        """Predicted tokens of each text [texts]."""
        return np.array([len(document) for document in self.nats], dtype=np.float64)


def read_windows(model: Any, windows: Windows, scoring: Scoring | None = None) -> TextReading:
    """Read windows with a model as it is now, each as a text of its own.

    Raises:
        RejectedError: AG-EVA-002 if a loss is not finite.
    """
    prepared = prepare_windows(windows, scoring)
    return TextReading(measure_tokens(model, prepared), predicted_tokens(prepared))


def person_scores(
    persons: Sequence[int], base: TextReading, donated: TextReading
) -> dict[int, float]:
    """One score per person: nats saved over all tokens of the person's texts.

    Args:
        persons: Whose each text is, in the order of the texts.
        base: The texts read by the base.
        donated: The same read with the packet attached.
    """
    _check_pair(base, donated)
    saved: dict[int, float] = defaultdict(float)
    tokens: dict[int, float] = defaultdict(float)
    differences = base.totals - donated.totals
    for person, nats, count in zip(persons, differences, base.counts, strict=True):
        saved[person] += float(nats)
        tokens[person] += float(count)
    return {person: saved[person] / tokens[person] for person in saved}


def cut_suffixes(
    persons: Sequence[int],
    base: TextReading,
    donated: TextReading,
    length: int = 16,
    elsewhere: Sequence[npt.NDArray[np.int64]] = (),
) -> ExtractionEvidence:
    """Every run of `length` tokens after a prompt of at least `PROMPT_TOKENS`, with its chances.

    One reading by teacher forcing gives the probability of every suffix, wherever it begins
    (Hayes et al., arXiv 2410.19482); nothing is generated. A suffix is telling if at least an
    eighth of its tokens are the person's own, see `_own_tokens`. Without that a template with a
    name copied from the prompt counts as a leak: MedQuAD's "signs and symptoms for Akesson" came
    back as readily of persons that the packet had never seen (33 suffixes) as of others (41).

    Args:
        persons: Whose each text is.
        base: The texts read by the base.
        donated: The same read with the packet attached.
        length: Tokens of a suffix.
        elsewhere: Tokens of texts of persons that were not read; what they have too is no secret
            of those that were.
    """
    _check_pair(base, donated)
    own = _own_tokens(base.tokens, persons, elsewhere, length)
    logs: tuple[list[Numbers], list[Numbers]] = ([], [])
    telling, owners = [], []
    for index, tokens in enumerate(base.tokens):
        # One token less than a prompt has: a text's first token is never predicted.
        begins = np.arange(PROMPT_TOKENS - 1, len(tokens) - length + 1)
        for reading, found in zip((base, donated), logs, strict=True):
            found.append(-_run_sums(reading.nats[index], length)[begins])
        telling.append(8 * _run_sums(own[index], length)[begins] >= length)
        owners.append(np.full(len(begins), persons[index], dtype=np.int64))
    if not owners:
        empty = np.zeros(0, dtype=np.float64)
        return ExtractionEvidence(empty, empty, empty.astype(np.bool_), empty.astype(np.int64))
    return ExtractionEvidence(
        np.concatenate(logs[0]),
        np.concatenate(logs[1]),
        np.concatenate(telling),
        np.concatenate(owners),
    )


def _run_sums(values: npt.NDArray[Any], length: int) -> Numbers:
    """Sums of every run of values; none if there are fewer."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return np.asarray(sums[length:] - sums[:-length], dtype=np.float64)


def _own_tokens(
    texts: Sequence[npt.NDArray[np.int64]],
    owners: Sequence[int],
    elsewhere: Sequence[npt.NDArray[np.int64]],
    length: int,
) -> list[npt.NDArray[np.bool_]]:
    """Which tokens of each text nothing but the person's own text tells.

    Not those in a run of half a suffix that any other person's text holds too: that is a template.
    Nor those in a run of a fifth of a suffix that stood before in the same text: whoever gives the
    prompt has it already.
    """
    half, fifth = max(length // 2, 1), max(length // 5, 3)
    grams = [_hash_runs(text, half) for text in texts]
    ends = np.cumsum([0, *map(len, grams)])
    joined = np.concatenate([np.zeros(0, dtype=np.uint64), *grams])
    known = [_hash_runs(text, half) for text in elsewhere]
    shared = ~_own_runs(joined, np.repeat(np.asarray(owners, dtype=np.int64), np.diff(ends)))
    shared |= np.isin(joined, np.concatenate([np.zeros(0, dtype=np.uint64), *known]))
    own = []
    for text, begin, end in zip(texts, ends, ends[1:], strict=False):
        runs = _hash_runs(text, fifth)
        _, first, which = np.unique(runs, return_index=True, return_inverse=True)
        told = _covered(shared[begin:end], half, len(text))
        told |= _covered(first[which] < np.arange(len(runs)), fifth, len(text))
        own.append(~told)
    return own


def _covered(runs: npt.NDArray[np.bool_], length: int, size: int) -> npt.NDArray[np.bool_]:
    """Which of so many tokens lie in one of the marked runs."""
    steps = np.zeros(size + 1, dtype=np.int64)
    begins = np.flatnonzero(runs)
    steps[begins] += 1
    steps[begins + length] -= 1
    return np.asarray(np.cumsum(steps)[:size] > 0, dtype=np.bool_)


def _hash_runs(tokens: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.uint64]:
    """A 64-bit multilinear hash of every run of tokens; runs that collide are 1 in 2^60 or so."""
    factors = np.random.Generator(np.random.PCG64(0)).integers(
        1, 1 << 63, size=length, dtype=np.uint64
    )
    count = max(len(tokens) - length + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        hashes += (tokens[offset : offset + count].astype(np.uint64) + 1) * factors[offset]
    return hashes


def _own_runs(
    grams: npt.NDArray[np.uint64], owners: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Whether a run occurs with one owner only."""
    if not len(grams):
        return np.zeros(0, dtype=np.bool_)
    order = np.lexsort((owners, grams))
    sorted_grams, sorted_owners = grams[order], owners[order]
    starts = np.concatenate([[True], sorted_grams[1:] != sorted_grams[:-1]])
    groups = np.cumsum(starts) - 1
    first = np.flatnonzero(starts)
    last = np.concatenate([first[1:], [len(grams)]]) - 1
    # Owners are sorted inside a group, so its ends are equal only if all are.
    own = sorted_owners[first] == sorted_owners[last]
    result = np.zeros(len(grams), dtype=np.bool_)
    result[order] = own[groups]
    return result


@torch.no_grad()
def suffix_logs(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_tokens: int = 8192,
) -> Numbers:
    """Natural log of the probability of each suffix after its prompt, by teacher forcing [pairs].

    For canaries, whose suffix is known. Prompt and suffix are tokenised
    together, as they stand in a text; a token that spans both counts as the suffix's.

    Args:
        model: The model as it is now.
        tokenizer: Its tokenizer.
        pairs: Prompts and suffixes as text that follows each other.
        batch_tokens: Tokens per forward pass, padding included.

    Raises:
        RejectedError: AG-EVA-001 if a pair has fewer than two tokens or a suffix is longer than
            the model sees, AG-EVA-002 if the model's output is not finite.
    """
    limit = context_tokens(model)
    rows = _split_pairs(tokenizer, pairs, limit)
    logs = np.zeros(len(rows), dtype=np.float64)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    with evaluating(model):
        while order:
            # The longest of those left decides how many fit.
            size = max(batch_tokens // len(rows[order[-1]][0]), 1)
            batch, order = order[-size:], order[:-size]
            ids, _ = pad_batch([rows[index][0] for index in batch], model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            chances = _log_chances(logits.float(), ids[:, 1:])
            for index, row in zip(batch, chances, strict=True):
                tokens, begin = rows[index]
                logs[index] = float(row[begin - 1 : len(tokens) - 1].sum())
    if np.isnan(logs).any():
        raise RejectedError("AG-EVA-002", "a suffix has no probability")
    return logs


@torch.no_grad()
def sibling_logs(model: Any, tokenizer: Any, prompt: str, suffixes: Sequence[str]) -> Numbers:
    """As `suffix_logs` for several suffixes of one prompt, which the model reads once [suffixes].

    A canary and its hundred alternatives share most of their tokens. The model's cache of the
    shared ones is copied for each of them.

    Raises:
        RejectedError: AG-EVA-001 or -002 as `suffix_logs`.
    """
    limit = context_tokens(model)
    rows = _split_pairs(tokenizer, [(prompt, suffix) for suffix in suffixes], limit)
    shared = _shared_prefix([tokens for tokens, _ in rows])
    shared = min([shared, *(begin for _, begin in rows), *(len(tokens) - 1 for tokens, _ in rows)])
    if shared < 1:
        # A prompt near the end of the context is cut at another place for each suffix.
        return suffix_logs(model, tokenizer, [(prompt, suffix) for suffix in suffixes])
    rest, _ = pad_batch([tokens[shared:] for tokens, _ in rows], model.device)
    with evaluating(model):
        prefix = torch.tensor([rows[0][0][:shared]], device=model.device)
        read = model(input_ids=prefix, use_cache=True)
        cache = read.past_key_values
        cache.batch_repeat_interleave(len(rows))
        logits = model(input_ids=rest, use_cache=True, **{_cache_name(model): cache}).logits
    first = read.logits[:, -1:].expand(len(rows), -1, -1)
    chances = _log_chances(torch.cat([first, logits[:, :-1]], dim=1).float(), rest)
    logs = np.array(
        [
            float(row[begin - shared : len(tokens) - shared].sum())
            for row, (tokens, begin) in zip(chances, rows, strict=True)
        ]
    )
    if np.isnan(logs).any():
        raise RejectedError("AG-EVA-002", "a suffix has no probability")
    return logs


def _cache_name(model: Any) -> str:
    """What a family's forward calls a cache: the name changes within transformers 5."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def _shared_prefix(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with alike."""
    first, last = min(rows), max(rows)  # whatever lies between shares at least as much
    length = min(len(first), len(last))
    return next((i for i in range(length) if first[i] != last[i]), length)


def _split_pairs(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], limit: int
) -> list[tuple[list[int], int]]:
    """Tokens of each pair, cut at their start to fit, and where its suffix begins, at least 1."""
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    heads = dict(zip(prompts, encode_all(tokenizer, prompts), strict=True))
    wholes = encode_all(tokenizer, [prompt + suffix for prompt, suffix in pairs])
    return [
        _split(heads[prompt], whole, limit)
        for (prompt, _), whole in zip(pairs, wholes, strict=True)
    ]


def _split(head: list[int], whole: list[int], limit: int) -> tuple[list[int], int]:
    if len(whole) < 2:
        raise RejectedError("AG-EVA-001", "a prompt with its suffix has fewer than two tokens")
    begin = 0
    for left, right in zip(head, whole, strict=False):
        if left != right:
            break
        begin += 1
    begin = min(max(begin, 1), len(whole) - 1)
    cut = max(len(whole) - limit, 0)
    if cut >= begin:
        raise RejectedError("AG-EVA-001", "a suffix is longer than the model can see")
    return whole[cut:], begin - cut


def _log_chances(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Natural log of each label's probability in 64 bits, [rows, tokens]."""
    logs = torch.log_softmax(logits, dim=-1)
    return logs.gather(-1, labels.unsqueeze(-1)).squeeze(-1).double()


@dataclass(frozen=True, slots=True, eq=False)
class CanaryReading:
    """Canaries as one model reads them.

    Attributes:
        coins: Loss of each coin canary in nats.
        secrets: For each repeated canary, ln p of its secret and then of its alternatives.
    """

    coins: Numbers
    secrets: tuple[Numbers, ...]


def read_canaries(
    model: Any, tokenizer: Any, record: CanaryRecord, scoring: Scoring | None = None
) -> CanaryReading:
    """Read canaries and alternatives with a model as it is now.

    Raises:
        RejectedError: AG-EVA-001 or -002 for a text without two tokens or
            a loss that is not finite.
    """
    coins = np.zeros(0, dtype=np.float64)
    if record.coins:
        prepared = prepare([canary.text for canary in record.coins], tokenizer, model, scoring)
        coins = _per_token(measure(model, prepared))
    secrets = []
    for canary in record.repeated:
        suffixes = [f" {secret}" for secret in (canary.suffix, *canary.alternatives)]
        secrets.append(sibling_logs(model, tokenizer, canary.prompt, suffixes))
    return CanaryReading(coins, tuple(secrets))


def _per_token(losses: Losses) -> Numbers:
    return np.asarray(losses.nats / losses.tokens, dtype=np.float64)


def compare_canaries(
    record: CanaryRecord, base: CanaryReading, donated: CanaryReading
) -> CanaryEvidence:
    """Scores of canaries by what the packet saves on them."""
    styles = list(Style)
    repeated = []
    for canary, before, after in zip(record.repeated, base.secrets, donated.secrets, strict=True):
        gained = after - before
        repeated.append(RepeatedEvidence(canary.repeats, float(gained[0]), gained[1:]))
    return CanaryEvidence(
        base.coins - donated.coins,
        np.array([canary.included for canary in record.coins], dtype=np.bool_),
        np.array([styles.index(canary.style) for canary in record.coins], dtype=np.int64),
        tuple(repeated),
    )


@dataclass(frozen=True, slots=True)
class BlindComparison:
    """How well two groups can be told apart by someone who never saw the model.

    Attributes:
        auc: 0.5 is chance.
        p_value: Chance of an AUC at least as large if a coin had decided who is in which group.
    """

    auc: float
    p_value: float


def compare_blindly(
    inside: Sequence[str],
    outside: Sequence[str],
    *,
    folds: int = 5,
    shuffles: int = 999,
    seed: int = 0,
) -> BlindComparison:
    """How well word counts alone tell who was trained on (arXiv 2406.17975).

    Ridge regression on bags of words, cross-validated, mean AUC over the folds. A random split
    cannot be told apart; a split by date or ward can, and then a membership score is about that.

    Its p-value is that of a permutation test (Ojala and Garriga, JMLR 11, 2010, test 1) that
    shuffles who is in which group within each fold. Folds share their training texts, so the AUC
    of 500 and 240 persons spreads by 0.03 under chance, and the formulas for a single AUC
    (Hanley and McNeil) say 0.023.

    Args:
        inside: Text of each person trained on, one string per person.
        outside: Text of each person held out.
        folds: Parts of the cross-validation.
        shuffles: How often the groups are shuffled; the least p-value is one in `shuffles + 1`.
        seed: Decides the parts and the shuffles; they are no secret.

    Raises:
        RejectedError: AG-EVA-001 with fewer than two persons per fold on a side.
    """
    if min(len(inside), len(outside)) < 2 * folds:
        raise RejectedError("AG-EVA-001", f"fewer than {2 * folds} persons on a side")
    features = _word_counts([*inside, *outside])
    sides = np.concatenate([np.ones(len(inside)), np.zeros(len(outside))])
    generator = np.random.Generator(np.random.PCG64(seed))
    parts = np.empty(len(sides), dtype=np.int64)
    for side in (0.0, 1.0):
        places = np.flatnonzero(sides == side)
        parts[places] = generator.permutation(len(places)) % folds
    # The true groups, then shuffled ones, [persons, 1 + shuffles]. Within a fold, so that each
    # keeps its numbers and one decomposition serves all columns.
    labels = np.repeat(sides[:, None], shuffles + 1, axis=1)
    for part in range(folds):
        places = np.flatnonzero(parts == part)
        labels[places, 1:] = generator.permuted(labels[places, 1:], axis=0)
    values = np.zeros(shuffles + 1)
    for part in range(folds):
        learn, test = parts != part, parts == part
        scores = _ridge_scores(features[learn], labels[learn], features[test])
        values += column_aucs(scores, labels[test] == 1.0) / folds
    # Equal up to rounding counts as reached: texts without words are all alike.
    reached = int((values[1:] >= values[0] - 1e-9).sum())
    return BlindComparison(float(values[0]), (1 + reached) / (1 + shuffles))


def _word_counts(texts: Sequence[str]) -> Numbers:
    """Log counts of the commonest words, rows of length 1 [texts, words]."""
    counted = [Counter(_WORD.findall(text.lower())) for text in texts]
    spread = Counter(word for words in counted for word in words)
    columns = {word: place for place, (word, _) in enumerate(spread.most_common(_BLIND_WORDS))}
    features = np.zeros((len(texts), max(len(columns), 1)), dtype=np.float64)
    for row, words in enumerate(counted):
        for word, count in words.items():
            if word in columns:
                features[row, columns[word]] = np.log1p(count)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.maximum(norms, 1e-12), dtype=np.float64)


def _ridge_scores(features: Numbers, labels: Numbers, unseen: Numbers) -> Numbers:
    """Scores of unseen persons for each column of labels [unseen, columns]."""
    mean, middle = features.mean(axis=0), labels.mean(axis=0)
    centred = features - mean
    gram = centred.T @ centred + _RIDGE * np.eye(features.shape[1])
    weights = np.linalg.solve(gram, centred.T @ (labels - middle))
    return np.asarray((unseen - mean) @ weights, dtype=np.float64)


def _check_pair(base: TextReading, donated: TextReading) -> None:
    same = len(base.tokens) == len(donated.tokens) and all(
        np.array_equal(left, right) for left, right in zip(base.tokens, donated.tokens, strict=True)
    )
    if not same:
        raise ValueError("the two readings are not of the same texts")
