"""Plots: figures as SVG text, the same bytes for the same data. matplotlib draws them without a screen and without its global state.

Text stays text (the reader's own font, searchable). Inline in a page, ink is the page's: `currentColor` and `var(--grid)` follow a dark or a light page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CompressError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Draw = Callable[[Axes], None]

COLORS = ("#3f87c9", "#e08a2c", "#2fa37a", "#cf5a72", "#8f74d6", "#a88a2e", "#4aa3ad", "#b5699f")  # legible on white and on near-black
INK, GRID = "#010203", "#040506"  # stand-ins, replaced in `inline`
STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "compress", "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 11,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.6, "axes.linewidth": 0.8,
         "axes.titlesize": 11, "legend.frameon": False, "legend.fontsize": 9.5, "lines.linewidth": 1.8, "lines.markersize": 4.5}  # fmt: skip
FONT = "system-ui,-apple-system,Segoe UI,Roboto,Helvetica,Arial,sans-serif"


def _figure(draw: Draw, width: float, height: float, ink: str, grid: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=COLORS)
    axes.patch.set_alpha(0)
    axes.tick_params(colors=ink, which="both")
    for spine in axes.spines.values():
        spine.set_color(ink)
    axes.grid(color=grid)
    draw(axes)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title, *axes.texts, *(legend.get_texts() if (legend := axes.get_legend()) else ())):
        text.set_color(ink)
    return figure


def inline(draw: Draw, label: str, width: float = 5.4, height: float = 3.3) -> str:
    """An <svg> for a page: scales with its column, takes the page's colours. `draw(axes)`; `label` is read to those who cannot see it."""
    from matplotlib import rc_context

    with rc_context(STYLE | {"svg.hashsalt": label}), io.StringIO() as out:
        _figure(draw, width, height, INK, GRID).savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"( version="[^"]*")?', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([^;\"']*?)'DejaVu Sans'[^;\"]*", rf"font: \1{FONT}", svg)
    title = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1).replace(INK, "currentColor").replace(GRID, "var(--grid)").strip()


def save(draw: Draw, path: Path, width: float = 7.2, height: float = 4.6) -> None:
    """A file of its own, .svg or .png, dark ink on white."""
    from matplotlib import rc_context

    if path.suffix not in (".svg", ".png"):
        raise CompressError(f"{path}: a picture is .svg or .png")
    with rc_context(STYLE | {"svg.fonttype": "path"}):
        figure = _figure(draw, width, height, "#222222", "#dddddd")
        figure.patch.set(alpha=1, facecolor="white")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
        except OSError as error:
            raise CompressError(f"{path}: cannot be written: {error.strerror}") from error


def _blocks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.margins(x=0.03)


def _legend(axes: Axes) -> None:
    columns = 4 if len(axes.get_lines()) > 6 else 3
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, borderaxespad=0.3, columnspacing=1.2, handlelength=1.4)


def layer_errors(layers: Mapping[str, Sequence[tuple[int, float]]]) -> Draw:
    """{kind of layer: [(block, relative error)]}, one line a kind, logarithmic."""

    def draw(axes: Axes) -> None:
        for i, (kind, points) in enumerate(layers.items()):
            axes.plot(*zip(*points), label=kind, marker="o^sDvPX*"[i % 8])
        if all(error > 0 for points in layers.values() for _, error in points):
            axes.set_yscale("log")
        axes.set(xlabel="block", ylabel="relative output error")
        _blocks(axes)
        if len(layers) > 1:
            _legend(axes)

    return draw


def depth(curve: Sequence[Mapping[str, float]]) -> Draw:
    """KL after the first k blocks are compressed, with its standard error, over k."""

    def draw(axes: Axes) -> None:
        x, y = [r["blocks"] for r in curve], [r["mean"] for r in curve]
        error = [r["stderr"] or 0 for r in curve]
        axes.fill_between(x, 0, y, alpha=0.15, color=COLORS[0], linewidth=0)
        axes.errorbar(x, y, error, color=COLORS[0], marker="o", capsize=2.5, elinewidth=1)
        axes.set(xlabel="blocks compressed, from the first", ylabel="KL, nats a token")
        axes.set_ylim(bottom=0)
        _blocks(axes)

    return draw


def by_block(lines: Mapping[str, Sequence[tuple[float, float]]], ylabel: str, mark: float | None = None) -> Draw:
    """Named lines over blocks, logarithmic; `mark` is a dashed horizontal line."""

    def draw(axes: Axes) -> None:
        for name, points in lines.items():
            axes.plot(*zip(*points), label=name, marker="o")
        axes.set_yscale("log")
        if mark:
            axes.axhline(mark, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set(xlabel="block", ylabel=ylabel)
        _blocks(axes)
        _legend(axes)

    return draw


def sizes(rows: Sequence[Mapping[str, Any]]) -> Draw:
    """Size against KL, one point an artifact: further down and to the left is better. rows: {"name", "bytes", "kl": {"mean", "stderr"}}."""

    def draw(axes: Axes) -> None:
        best = float("inf")
        front = []
        for row in sorted(rows, key=lambda r: (r["bytes"], r["kl"]["mean"])):
            if row["kl"]["mean"] < best:
                best = row["kl"]["mean"]
                front.append(row)
        axes.plot([r["bytes"] / 1e6 for r in front], [r["kl"]["mean"] for r in front], color=COLORS[0], linewidth=1, alpha=0.6)
        for row in rows:
            x, y = row["bytes"] / 1e6, row["kl"]["mean"]
            color = COLORS[0] if row in front else COLORS[1]
            axes.errorbar([x], [y], [row["kl"]["stderr"] or 0], color=color, marker="o", capsize=2.5, elinewidth=1, markersize=6)
            axes.annotate(row["name"], (x, y), textcoords="offset points", xytext=(7, 5), fontsize=10)
        if all(r["kl"]["mean"] > 0 for r in rows):
            axes.set_yscale("log")
        axes.margins(x=0.18, y=0.12)
        axes.set(xlabel="weights, MB", ylabel="KL to the original, nats a token")

    return draw
