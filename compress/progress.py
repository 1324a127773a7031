"""Progress: a bar with the layer, its error and the time left on a terminal or in a notebook; one plain line a layer everywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

console = Console(stderr=True)


def _bar(**kwargs) -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                    console=console, **kwargs)  # fmt: skip


def _live() -> bool:
    return console.is_terminal or console.is_jupyter


class Layers:
    """with Layers(total) as screen: screen.layer(done)"""

    def __init__(self, total: int, show: bool):
        self.total, self.show, self.count, self.timed, self.seconds = total, show, 0, 0, 0.0
        self.bar = _bar(transient=False) if show and _live() else None

    def __enter__(self) -> Layers:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task("calibrating", total=self.total)
        return self

    def layer(self, done) -> None:
        self.count += 1
        self.timed += not done.resumed
        self.seconds += done.seconds
        r = done.record
        if self.bar:
            self.bar.update(self.task, advance=1, description=f"{done.name}  {r.describe}  error {r.error:.2e}")
        elif self.show:
            left = self.seconds / max(1, self.timed) * (self.total - self.count)
            state = "resumed" if done.resumed else f"{done.seconds:6.2f} s"
            console.print(f"[{self.count}/{self.total}] {done.name}  {r.describe}  {r.bits:.3f} bits  error {r.error:.3e}  {state}  left {left:.0f} s",
                          highlight=False, markup=False, soft_wrap=True)  # fmt: skip

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()


def line(text: str, show: bool) -> None:
    """One plain line."""
    if show:
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def batches(logits: Iterator[Tensor], windows: int, show: bool) -> Iterator[Tensor]:
    """The same batches, with a bar where there is a terminal."""
    if not (show and _live()):
        yield from logits
        return
    with _bar(transient=True) as bar:
        task = bar.add_task("evaluating", total=windows)
        for batch in logits:
            yield batch
            bar.update(task, advance=len(batch))


def steps(todo: Sequence, what: str, show: bool) -> Iterator:
    """The items of `todo`, with a bar where there is a terminal and a few plain lines elsewhere."""
    if show and _live():
        with _bar(transient=True) as bar:
            yield from bar.track(todo, description=what)
        return
    began = time.perf_counter()
    for i, item in enumerate(todo):
        yield item
        if show and (i + 1) % max(1, len(todo) // 4) == 0:
            console.print(f"{what} {i + 1}/{len(todo)}  {time.perf_counter() - began:.0f} s", highlight=False, markup=False)
