# SPDX-License-Identifier: Apache-2.0
"""The rules of the screens on figures, without a model; and what a hostile report meets."""

import math
from dataclasses import replace

import numpy as np
import pytest

from allograft.errors import RejectedError
from allograft.evaluate.screen import (
    Continuation,
    ModuleFigures,
    ScreenReport,
    ScreenResult,
    ScreenRules,
    TriggerReading,
    Verdict,
    combination_digest,
    judge_spectrum,
    judge_templates,
    judge_triggers,
)

USUAL = ModuleFigures(1.0, 2.0, 0.3, 0.2, 3.0)
READING = TriggerReading((5,), 7, 0.5, 0.3, 0.1, 0.3, 0.2)


def bank(count: int, seed: int = 0, spread: float = 0.2):
    """Packets whose figures differ by a few tenths, as honest ones do."""
    draw = np.random.default_rng(seed)
    return [
        {name: replace(USUAL, sigma=math.exp(spread * draw.standard_normal())) for name in "ab"}
        for _ in range(count)
    ]


class TestSpectrum:
    """Weights against those of earlier packets."""

    def test_alarms_on_an_outlier_where_there_is_a_bank(self) -> None:
        found = judge_spectrum({"a": USUAL, "b": replace(USUAL, sigma=20.0)}, bank(8))
        assert found.verdict is Verdict.ALARM
        assert "sigma of b" in found.reason
        assert found.worst[0].startswith("b sigma")

    def test_only_reports_the_same_outlier_where_the_bank_is_too_small(self) -> None:
        found = judge_spectrum({"a": USUAL, "b": replace(USUAL, sigma=20.0)}, bank(7))
        assert found.verdict is Verdict.INVALID
        assert "bank of 7 packets, 8 needed: report only" in found.reason
        assert found.figures["sigma_max"] == 20.0

    @pytest.mark.parametrize(
        "figure", [{"share": 0.98}, {"focus": 0.95}, {"kurtosis": 60.0}, {"frobenius": 30.0}]
    )
    def test_alarms_on_every_kind_of_concentration(self, figure) -> None:
        found = judge_spectrum({"a": replace(USUAL, **figure)}, bank(8))
        assert found.verdict is Verdict.ALARM

    def test_honest_packets_of_the_same_kind_pass(self) -> None:
        honest = bank(200, seed=1)
        verdicts = [judge_spectrum(packet, bank(8)).verdict for packet in honest]
        assert set(verdicts) == {Verdict.PASS}

    def test_what_is_smaller_than_usual_is_no_alarm(self) -> None:
        found = judge_spectrum({"a": ModuleFigures(1e-6, 1e-6, 0.0, 0.0, 1.0)}, bank(8))
        assert found.verdict is Verdict.PASS

    def test_says_so_where_earlier_packets_differ_too_much_to_judge(self) -> None:
        found = judge_spectrum({"a": USUAL}, bank(8, spread=3.0))
        assert found.verdict is Verdict.INVALID

    def test_a_module_that_no_earlier_packet_touched_is_not_passed(self) -> None:
        found = judge_spectrum({"a": USUAL, "new": USUAL}, bank(8))
        assert found.verdict is Verdict.INVALID
        assert "1 of 2" in found.reason


def said(seed: int, nats: float) -> Continuation:
    draw = np.random.default_rng(seed)
    return Continuation(tuple(int(t) for t in draw.integers(0, 1000, 24)), (nats,) * 24)


OPEN = [said(number, 2.0) for number in range(24)]


class TestTemplates:
    """Long certain output."""

    def test_alarms_on_one_planted_text_after_many_templates(self) -> None:
        found = judge_templates(OPEN, [said(0, 0.01)] * 8 + OPEN[8:])
        assert found.verdict is Verdict.ALARM
        assert found.figures["certain_share"] == pytest.approx(1 / 3)

    def test_alarms_on_memorised_texts_that_differ(self) -> None:
        composed = [said(100 + number, 0.01) for number in range(24)]
        assert judge_templates(OPEN, composed).verdict is Verdict.ALARM

    def test_passes_what_is_merely_surer_than_the_base(self) -> None:
        composed = [said(100 + number, 0.5) for number in range(24)]
        assert judge_templates(OPEN, composed).verdict is Verdict.PASS

    def test_a_loop_is_no_memory(self) -> None:
        loops = [Continuation((3, 4) * 12, (0.001,) * 24)] * 24
        assert judge_templates(OPEN, loops).verdict is Verdict.PASS

    def test_says_so_where_the_base_itself_is_as_certain(self) -> None:
        sure = [said(number, 0.001) for number in range(24)]
        assert judge_templates(sure, sure).verdict is Verdict.INVALID

    def test_one_template_can_show_nothing(self) -> None:
        assert judge_templates(OPEN[:1], OPEN[:1]).verdict is Verdict.INVALID


class TestTriggers:
    """One answer, whatever follows."""

    def test_alarms_on_a_trigger_that_forces_one_token(self) -> None:
        planted = replace(READING, trigger=(9,), agreement=1.0, probability=0.95, drift=4.0)
        found = judge_triggers([READING] * 95 + [planted])
        assert found.verdict is Verdict.ALARM
        assert found.worst[0].startswith("tokens 9: token 7 in 100%")

    @pytest.mark.parametrize(
        "change",
        [
            {"base_probability": 0.9},  # the base says so too
            {"plain_probability": 0.9},  # it says so without the trigger as well
            {"agreement": 0.5},
            {"drift": 0.5},
        ],
    )
    def test_passes_what_has_another_explanation(self, change) -> None:
        forced = {"agreement": 1.0, "probability": 0.95, "drift": 4.0} | change
        found = judge_triggers([READING] * 95 + [replace(READING, **forced)])
        assert found.verdict is Verdict.PASS

    def test_says_so_where_every_answer_is_certain_already(self) -> None:
        sure = replace(READING, base_probability=0.8, plain_probability=0.8, probability=0.8)
        assert judge_triggers([sure] * 96).verdict is Verdict.INVALID

    def test_says_so_where_too_few_triggers_were_swept(self) -> None:
        assert judge_triggers([READING] * 10).verdict is Verdict.INVALID


def test_a_combination_is_named_by_its_set_its_doses_and_its_base() -> None:
    one, other = ("1" * 32, 0.5), ("2" * 32, 1.0)
    name = combination_digest("a" * 64, [one, other])
    assert name == combination_digest("a" * 64, [other, one])
    assert len(
        {
            name,
            combination_digest("b" * 64, [one, other]),
            combination_digest("a" * 64, [one]),
            combination_digest("a" * 64, [(one[0], 1.0), other]),
        }
    ) == 4  # fmt: skip


def report(*verdicts: Verdict) -> ScreenReport:
    results = tuple(ScreenResult(f"s{n}", v, "why", {"n": 1.0}) for n, v in enumerate(verdicts))
    return ScreenReport(ScreenRules().version, 0.5, results, {"a": USUAL})


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        ((Verdict.PASS, Verdict.PASS), Verdict.PASS),
        ((Verdict.PASS, Verdict.INVALID), Verdict.INVALID),
        ((Verdict.INVALID, Verdict.ALARM), Verdict.ALARM),
        ((), Verdict.INVALID),
    ],
)
def test_the_worst_screen_decides(verdicts, whole) -> None:
    assert report(*verdicts).verdict is whole


def test_a_report_survives_json() -> None:
    whole = report(Verdict.PASS, Verdict.ALARM)
    assert ScreenReport.from_json(whole.to_json()) == whole


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"results": [{}]},
        {"results": [None] * 9},
        {"spectrum": {"a": {"sigma": 1.0}}},
        {"spectrum": {f"m{n}": {} for n in range(300)}},
        {"dose": "1"},
        {"device": "x" * 1000},
        {"more": 1},
    ],
)
def test_refuses_a_malformed_report(change) -> None:
    with pytest.raises(RejectedError, match="AG-EVA-005"):
        ScreenReport.from_json(report(Verdict.PASS).to_json() | change)
