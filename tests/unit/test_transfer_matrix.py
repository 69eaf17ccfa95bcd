# SPDX-License-Identifier: Apache-2.0
"""A whole matrix on tiny models: verdicts, controls, a killed run, and the command."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from allograft.cli import evaluate as command, main as cli, shell
from allograft.evaluate.transfer import run as runs
from allograft.evaluate.transfer.arms import biased, train_bias
from allograft.evaluate.transfer.bench import Bench, Lab
from allograft.evaluate.transfer.cell import Cell, Role
from allograft.evaluate.transfer.figures import make_figures
from allograft.evaluate.transfer.plan import MatrixPlan
from allograft.evaluate.transfer.report import RunReport
from allograft.evaluate.transfer.run import Progress, run_matrix
from allograft.evaluate.transfer.schedule import WRAPPER
from allograft.evaluate.transfer.text import make_texts
from allograft.evaluate.transfer.world import OwnModels
from allograft.recipes.plan import LoopPlan
from kit.tiny import VOCAB, logits_of, tiny_model, tiny_windows
from kit.transfer import TINY, TINY_ARMS, tiny_sources

PLAN = MatrixPlan(TINY, TINY_ARMS)
#: Cells of these are among those of the whole plan.
LEAN = replace(
    PLAN,
    arms=tuple(arm for arm in TINY_ARMS if arm.kind in {"organ", "lora"}),
    size=replace(TINY, seeds=1),
    controls=False,
)
TEXTS = make_texts(tiny_sources(), TINY.amounts)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """What a bench sets is undone."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def quiet(_step: Progress) -> None:
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Cell]]:
    """A run that nobody disturbed."""
    cache = tmp_path_factory.mktemp("whole")
    return cache, run_matrix(cache, TEXTS, PLAN, OwnModels(), 1, quiet)


def of(cells: list[Cell], arm: str, recipient: str) -> list[Cell]:
    return [cell for cell in cells if (cell.arm, cell.recipient) == (arm, recipient)]


def nats(cell: Cell) -> list[list[float]]:
    return [point.measured.test.nats.tolist() for point in cell.points]


@pytest.mark.parametrize("arm", ["organ", "lora r8", "delta", "module graft"])
def test_each_recipient_gets_its_verdict(whole: tuple[Path, list[Cell]], arm: str) -> None:
    verdicts = {
        name: {(cell.verdict, cell.code) for cell in of(whole[1], arm, name)}
        for name in ("base", "relative", "stranger", "wide", "foreign")
    }
    assert verdicts == {
        "base": {("exact", "")},
        "relative": {("lineage", "")},
        "stranger": {("refuse", "AG-RCP-013")},
        "wide": {("refuse", "AG-RCP-010")},
        "foreign": {("refuse", "AG-RCP-010")},
    }


def test_a_prompt_is_for_its_own_base_alone(whole: tuple[Path, list[Cell]]) -> None:
    verdicts = {
        name: {(cell.verdict, cell.code) for cell in of(whole[1], "prompt", name)}
        for name in ("base", "relative", "stranger")
    }
    others = {name: {("refuse", "AG-RCP-036")} for name in ("relative", "stranger")}
    assert verdicts == {"base": {("exact", "")}, **others}


def test_an_expert_is_refused_only_by_who_reads_other_tokens(
    whole: tuple[Path, list[Cell]],
) -> None:
    verdicts = {
        name: {(cell.verdict, cell.code) for cell in of(whole[1], "expert", name)}
        for name in ("base", "stranger", "wide", "foreign")
    }
    assert verdicts == {
        "base": {("behavioural", "")},
        "stranger": {("behavioural", "")},
        "wide": {("behavioural", "")},
        "foreign": {("refuse", "AG-RCP-011")},
    }
    assert all(cell.points for cell in of(whole[1], "expert", "wide"))


def test_modules_of_a_graft_are_tried_in_its_order_and_in_any(
    whole: tuple[Path, list[Cell]],
) -> None:
    (first,) = of(whole[1], "module graft, first modules", "base")
    (drawn,) = of(whole[1], "module graft, random modules", "base")
    labels = [point.label for point in first.points]
    assert labels == [point.label for point in drawn.points]
    assert nats(first) != nats(drawn)
    graft = of(whole[1], "module graft", "base")[0]
    assert nats(graft)[-1] not in nats(first)  # which has all of them


def test_a_refused_stranger_is_forced_and_measured(whole: tuple[Path, list[Cell]]) -> None:
    for arm in ("organ", "lora r8"):
        stranger, wide = (of(whole[1], arm, name)[0] for name in ("stranger", "wide"))
        assert [point.dose for point in stranger.points] == [0.25, 0.5, 1.0]
        assert stranger.forced
        assert not wide.points  # tensors of another width fit nowhere


def test_doses_seeds_and_controls_all_differ_from_the_untouched_model(
    whole: tuple[Path, list[Cell]],
) -> None:
    cells = whole[1]
    (zero,) = of(cells, "zero-shot", "base")
    changed = [cell for cell in cells if cell.recipient == "base" and cell is not zero]
    for cell in changed:
        assert all(values != nats(zero)[0] for values in nats(cell))
    first, second = of(cells, "lora r8", "base")
    assert nats(first) != nats(second)
    assert {cell.role for cell in changed} == set(Role) - {Role.ZERO_SHOT}


def test_the_wrapper_is_tried_at_every_position(whole: tuple[Path, list[Cell]]) -> None:
    (cell,) = of(whole[1], WRAPPER, "base")
    layers = TINY.shape.layers
    assert [point.label for point in cell.points] == [f"position {n}" for n in range(layers + 1)]
    assert len({tuple(values) for values in nats(cell)}) == layers + 1


def test_the_label_of_lowest_loss_counts(whole: tuple[Path, list[Cell]]) -> None:
    made = {path.name.split("-")[0]: path for path in (whole[0] / "models").iterdir()}
    bench = Bench(Lab(whole[0], PLAN, TEXTS, {"base": made["base"]}))
    model, tokenizer = bench.model("base"), bench.tokenizer("base")
    drug, road = ({*tokenizer.encode(label)} for label in TEXTS.labels)
    bias = torch.zeros(model.config.vocab_size)
    bias[list(drug - road)], bias[list(road - drug)] = 20.0, -20.0
    for sign, answer in ((1, 0), (-1, 1)):
        with biased(model, sign * bias):
            correct = bench.held("base").measure(model).correct
        assert correct == tuple(float(question.right == answer) for question in TEXTS.questions)


def test_costs_are_told(whole: tuple[Path, list[Cell]]) -> None:
    for cell in (of(whole[1], arm, "base")[0] for arm in ("organ", "full fine-tuning")):
        assert cell.payload_bytes > 1000
        assert cell.seconds > 0
    (equal,) = [cell for cell in whole[1] if cell.arm.endswith("bytes of organ")]
    organ = of(whole[1], "organ", "base")[0]
    # At this size a file's header weighs as much as two ranks.
    assert equal.payload_bytes == pytest.approx(organ.payload_bytes, rel=0.5)


def test_a_killed_run_goes_on_and_ends_with_the_same_figures(
    whole: tuple[Path, list[Cell]], tmp_path: Path
) -> None:
    told: list[Progress] = []

    def interrupt(step: Progress) -> None:
        if step.phase == "packets" and step.what == "full fine-tuning on wide":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_matrix(tmp_path, TEXTS, LEAN, OwnModels(), 1, interrupt)
    finished = len(list((tmp_path / "cells").glob("*.json")))
    again = run_matrix(tmp_path, TEXTS, LEAN, OwnModels(), 1, told.append)
    assert 0 < finished < len(again)
    assert any(step.what == "found in the cache" for step in told)
    undisturbed = {(cell.arm, cell.recipient, cell.seed): nats(cell) for cell in whole[1]}
    for cell in again:
        assert nats(cell) == undisturbed[cell.arm, cell.recipient, cell.seed]


def test_a_second_run_measures_nothing(
    whole: tuple[Path, list[Cell]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Cell:
        raise AssertionError("a finished cell was measured again")

    monkeypatch.setattr(runs, "run_task", fail)
    again = run_matrix(whole[0], TEXTS, PLAN, OwnModels(), 1, quiet)
    assert [cell.to_json() for cell in again] == [cell.to_json() for cell in whole[1]]


def test_other_text_or_another_budget_finds_no_old_cell(
    whole: tuple[Path, list[Cell]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class NotCachedError(Exception):
        pass

    def fail(*_: object) -> Cell:
        raise NotCachedError

    monkeypatch.setattr(runs, "run_task", fail)
    other = replace(TEXTS, test=TEXTS.test[1:])
    longer = replace(PLAN, size=replace(TINY, steps=TINY.steps + 1))
    for texts, plan in ((other, PLAN), (TEXTS, longer)):
        with pytest.raises(NotCachedError):
            run_matrix(whole[0], texts, plan, OwnModels(), 1, quiet)


def test_the_table_tells_overlap_and_the_rule_before_any_row(
    whole: tuple[Path, list[Cell]], tmp_path: Path
) -> None:
    figures = make_figures(whole[1], "lora r8")
    sound = replace(figures, sanity=replace(figures.sanity, holds=True))
    report = RunReport(sound, TEXTS, PLAN, 1.0)
    page = report.to_markdown()
    assert page.index("passages stand in training text") < page.index("Sanity rule")
    assert page.index("Sanity rule") < page.index("| organ")
    for words in ("5-gram of the donor's text", "unigram logit bias", "*forced*", "AG-RCP-010"):
        assert words in page
    assert {path.name for path in report.write(tmp_path, "t")} == {
        "t.json", "t.md", "t-doses.svg", "t-bytes.svg",
    }  # fmt: skip


def test_a_persons_own_base_gets_a_relative_and_a_stranger(
    whole: tuple[Path, list[Cell]], tmp_path: Path
) -> None:
    made = {path.name.split("-")[0]: path for path in (whole[0] / "models").iterdir()}
    own = OwnModels(made["base"], {"ward": made["relative"]})
    cells = run_matrix(tmp_path, TEXTS, LEAN, own, 1, quiet)
    assert {cell.recipient for cell in cells} == {"base", "relative", "stranger", "ward"}
    assert of(cells, "organ", "ward")[0].verdict == "lineage"
    assert of(cells, "organ", "stranger")[0].code == "AG-RCP-013"


def test_the_bias_on_a_flat_model_is_the_frequency_of_tokens() -> None:
    windows = tiny_windows(rows=12, length=16)
    bench = SimpleNamespace(
        model=lambda _name: tiny_model("llama"),
        windows=lambda _name, _text: windows,
        loop=lambda rate, seed: LoopPlan(
            steps=150, batch_windows=12, learning_rate=rate, seed=seed, warmup_steps=0
        ),
    )
    flat = tiny_model("llama")
    with torch.no_grad():
        flat.get_output_embeddings().weight.zero_()
    bench.model = lambda _name: flat
    bias = train_bias(bench, 0)
    real = torch.arange(windows.tokens.shape[1])[None, 1:] < windows.lengths[:, None]
    seen = torch.bincount(windows.tokens[:, 1:][real], minlength=VOCAB).double()
    shares = seen / seen.sum()
    floor = -float((shares[shares > 0] * shares[shares > 0].log()).sum())
    reached = -float((shares * torch.log_softmax(bias.double(), dim=0)).sum())
    assert floor <= reached < floor + 0.02


def test_a_bias_is_added_to_logits_and_leaves_no_trace() -> None:
    model = tiny_model("llama")
    before, bias = logits_of(model), torch.linspace(-1, 1, VOCAB)
    with biased(model, bias):
        torch.testing.assert_close(logits_of(model), before + bias)
    assert torch.equal(logits_of(model), before)


def test_the_command_refuses_to_compare_broken_baselines(
    monkeypatch: pytest.MonkeyPatch,
    whole: tuple[Path, list[Cell]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = make_figures(whole[1], "lora r8")
    broken = replace(figures, sanity=replace(figures.sanity, holds=False, reason="LoRA is worse"))
    report = RunReport(broken, TEXTS, PLAN, 1.0)
    monkeypatch.setattr(command, "run_report", lambda *_: report)
    monkeypatch.setattr(command, "_read_sources", lambda *_: tiny_sources())
    monkeypatch.setattr(command, "make_texts", lambda *_: TEXTS)
    arguments = ["evaluate", "--quick", "--cache", str(tmp_path)]
    assert shell.invoke(cli.app, "allograft", arguments) == shell.EXIT_REJECTED
    said = capsys.readouterr()
    assert "AG-EVA-006: LoRA is worse" in said.err
    assert "no comparison is shown" in said.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "evaluation.md"]


def test_the_command_takes_named_recipients(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "--quick", "--recipient", "nameless"]
    assert shell.invoke(cli.app, "allograft", arguments) == shell.EXIT_USAGE
    assert "NAME=DIRECTORY" in capsys.readouterr().err


def test_losses_of_a_mixture_are_those_of_its_parts(whole: tuple[Path, list[Cell]]) -> None:
    (cell,) = [c for c in whole[1] if c.arm.startswith("5-gram") and c.recipient == "base"]
    (zero,) = of(whole[1], "zero-shot", "base")
    slight = cell.points[0].measured.test
    # With a tenth of the weight on counts a token loses at most -ln(.9) against the model.
    assert (slight.nats <= zero.points[0].measured.test.nats - slight.tokens * np.log(0.9)).all()
