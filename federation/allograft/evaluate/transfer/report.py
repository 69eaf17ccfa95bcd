# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: JSON, a Markdown table and two plots in one directory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from allograft.durable import durable_write
from allograft.evaluate.transfer.figures import Figures
from allograft.evaluate.transfer.plan import MatrixPlan
from allograft.evaluate.transfer.plot import plot_bytes, plot_doses
from allograft.evaluate.transfer.table import render
from allograft.evaluate.transfer.text import Texts


@dataclass(frozen=True, slots=True)
class RunReport:
    """A run's figures with what they were measured on."""

    figures: Figures
    texts: Texts
    plan: MatrixPlan
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Everything but the texts themselves. No comparison if the sanity rule fails."""
        figures = asdict(self.figures)
        if not self.figures.sanity.holds:
            figures = {"sanity": figures["sanity"]}
        size = asdict(self.plan.size)
        return {
            "domain": self.texts.domain,
            "nature": self.texts.nature,
            "texts_sha256": self.texts.digest(),
            "overlap": asdict(self.texts.overlap),
            "general_overlap": asdict(self.texts.general_overlap),
            "size": size,
            "device": self.plan.device,
            "seconds": round(self.seconds, 1),
            **figures,
        }

    def to_markdown(self) -> str:
        """The table."""
        return render(self.figures, self.texts, self.plan)

    def write(self, directory: Path, name: str) -> tuple[Path, ...]:
        """Write the files; plots only where a comparison may be shown."""
        directory.mkdir(parents=True, exist_ok=True)
        content = {
            f"{name}.json": json.dumps(self.to_json(), indent=2) + "\n",
            f"{name}.md": self.to_markdown(),
        }
        if self.figures.sanity.holds:
            content[f"{name}-doses.svg"] = plot_doses(self.figures)
            content[f"{name}-bytes.svg"] = plot_bytes(self.figures)
        for file, text in content.items():
            durable_write(directory / file, text.encode(), mode=0o644)
        return tuple(directory / file for file in content)
