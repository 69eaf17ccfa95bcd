# SPDX-License-Identifier: Apache-2.0
"""What the demo is doing now: a live line per stage on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Stage:
    """One stage under way; `note` says how far it is."""

    def __init__(self, progress: Progress | None, title: str) -> None:
        self._progress = progress
        self._task = None if progress is None else progress.add_task(title, total=None, note="")

    def note(self, text: str, fraction: float | None = None) -> None:
        """Show a detail, and how much of the stage is done (0 to 1) where that is known."""
        if self._progress is None or self._task is None:
            return
        if fraction is None:
            self._progress.update(self._task, note=text)
        else:
            self._progress.update(self._task, note=text, total=1.0, completed=fraction)


class Stages:
    """Prints stages in order."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """Run one stage: a live line while it runs, one line that stays when it is done."""
        started = time.monotonic()
        if self.console.is_terminal:
            with self._live() as progress:
                yield Stage(progress, title)
        else:
            self.console.print(f"… {title}")
            yield Stage(None, title)
        self.console.print(
            f"[green]✓[/green] {title} [dim]{time.monotonic() - started:.0f} s[/dim]"
        )

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(f"  {text}")

    def _live(self) -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("[dim]{task.fields[note]}[/dim]"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )
