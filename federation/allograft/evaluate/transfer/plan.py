# SPDX-License-Identifier: Apache-2.0
"""What is run, as data: sizes, recipe arms, seeds. A new kind is one more line in `ARMS`."""

from __future__ import annotations

from dataclasses import dataclass, field

from allograft.evaluate.transfer.text import Amounts
from allograft.recipes.plan import (
    DeltaPlan,
    ExpertPlan,
    LoraPlan,
    ModuleGraftPlan,
    OrganPlan,
    PromptPlan,
    RecipePlan,
)
from allograft.recipes.shape import Shape


@dataclass(frozen=True, slots=True)
class Arm:
    """One recipe as it is tried.

    Attributes:
        name: In tables and cells.
        kind: Key of the recipe registry.
        plan: The kind's own choices.
        rates: Peak learning rates; the best on validation documents with the first seed is used.
            Empty for those of full fine-tuning, where the base's own weights learn.
        reference: This is the LoRA of the sanity rule.
    """

    name: str
    kind: str
    plan: RecipePlan
    rates: tuple[float, ...] = ()
    reference: bool = False


_RATES = (3e-3, 1e-2, 2e-2)

#: What is tried. Models above 50 million weights want a tenth of these rates; see `rate_scale`.
ARMS: tuple[Arm, ...] = (
    Arm("organ", "organ", OrganPlan(blocks=1), _RATES),
    Arm("organ, 3 blocks", "organ", OrganPlan(blocks=3), _RATES[:2]),
    Arm("organ, 3 replaced", "organ", OrganPlan(blocks=3, mode="replace")),
    Arm("lora r8", "lora", LoraPlan(rank=8, alpha=16.0), _RATES, reference=True),
    Arm("delta", "delta", DeltaPlan()),
    Arm(
        "delta, all weights",
        "delta",
        DeltaPlan(bits=8, energy=0.99, vectors=True, embeddings=True),
    ),
    Arm("module graft", "module_graft", ModuleGraftPlan()),
    Arm("prompt", "prompt", PromptPlan(), (1e-2, 3e-2)),
    Arm("expert", "expert", ExpertPlan()),
)


@dataclass(frozen=True, slots=True)
class Size:
    """How large models, texts and trainings are.

    Attributes:
        name: As chosen on the command line.
        shape: Of the base, its relative, the stranger and the model with another tokenizer.
        wide: Of the model of another width.
        pretrain_steps: Of every independent reference model.
        descend_steps: Further steps of the relative.
        pretrain_rate: Peak rate of those trainings; the relative takes a fifth.
        pretrain_batch: Windows of 128 tokens per step.
        steps: Of each donor and each oracle.
        batch: Windows per step of those.
        window: Tokens per window of those.
        full_rates: Peak rates that full fine-tuning is tried with.
        amounts: Of text.
        seeds: Of donors; the first also chooses rates.
        control_seeds: Of controls that cost a training of their own, and of the oracles of
            recipients other than the base.
    """

    name: str
    shape: Shape
    wide: Shape
    pretrain_steps: int
    descend_steps: int
    pretrain_rate: float
    pretrain_batch: int
    steps: int
    batch: int
    window: int
    full_rates: tuple[float, ...]
    amounts: Amounts
    seeds: int = 3
    control_seeds: int = 1


#: `cpu`: 5.3 million weights; a step took 0.84 s on one core, so that the whole matrix fits into
#: 90 minutes on two. `quick` shows that everything works; its figures say little. `gpu` has not
#: been measured.
SIZES: dict[str, Size] = {
    size.name: size
    for size in (
        Size(
            name="quick",
            shape=Shape(512, 64, 176, 4, 2),
            wide=Shape(512, 96, 256, 4, 3),
            pretrain_steps=100,
            descend_steps=15,
            pretrain_rate=5e-3,
            pretrain_batch=8,
            steps=40,
            batch=8,
            window=96,
            full_rates=(1e-3, 3e-3),
            amounts=Amounts(150_000, 400_000, 30, 40, 300),
        ),
        Size(
            name="cpu",
            shape=Shape(2048, 256, 704, 6, 8),
            wide=Shape(2048, 320, 880, 5, 8),
            pretrain_steps=400,
            descend_steps=40,
            pretrain_rate=2e-3,
            pretrain_batch=8,
            steps=100,
            batch=8,
            window=128,
            full_rates=(3e-4, 1e-3, 3e-3),
            amounts=Amounts(600_000, 2_400_000, 40, 80, 400),
        ),
        Size(
            name="gpu",
            shape=Shape(8192, 512, 1408, 10, 8, 1024),
            wide=Shape(8192, 640, 1760, 8, 8, 1024),
            pretrain_steps=4000,
            descend_steps=300,
            pretrain_rate=1e-3,
            pretrain_batch=32,
            steps=400,
            batch=32,
            window=256,
            full_rates=(1e-4, 3e-4, 1e-3),
            amounts=Amounts(4_000_000, 16_000_000, 100, 300, 1500),
        ),
    )
}


@dataclass(frozen=True, slots=True)
class MatrixPlan:
    """One run of the referee.

    Attributes:
        size: Sizes of everything that is made.
        arms: Recipes to try.
        device: Where models run.
        threads: CPU threads of each worker.
        rate_scale: Factor on every candidate rate.
        controls: Whether controls, baselines and the papers' settings run beside the recipes.
    """

    size: Size
    arms: tuple[Arm, ...] = field(default=ARMS)
    device: str = "cpu"
    threads: int = 1
    rate_scale: float = 1.0
    controls: bool = True
