"""The pictures: layers over base for README.md, the operator over sizes for DESIGN.md."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from report import Result

COLORS = {"float32": "#1f5fa8", "bfloat16": "#c2571a", "autocast": "#3b7d3b"}
FADED = 0.45  # two threads


def _bars(ax: Axes, raw: list[dict]) -> None:
    """C3A's time over base, relative to LoRA's, at every shape."""
    shapes = list(dict.fromkeys(tuple(point["shape"]) for point in raw))
    kinds = list(dict.fromkeys((point["mode"], point["threads"]) for point in raw))
    width = 0.8 / len(kinds)
    for i, (mode, count) in enumerate(kinds):
        points = [point for point in raw if (point["mode"], point["threads"]) == (mode, count)]
        ratios = [point["C3A / LoRA over base"] for point in points]
        at = [shapes.index(tuple(point["shape"])) + width * (i + 0.5) - 0.4 for point in points]
        values = [ratio.value for ratio in ratios]
        spread = [[r.value - r.low for r in ratios], [r.high - r.value for r in ratios]]
        ax.bar(
            at,
            values,
            width,
            yerr=spread,
            color=COLORS[mode],
            alpha=1 if count == 1 else FADED,
            ecolor="#444444",
            error_kw={"linewidth": 1},
            label=f"{mode}, {'one thread' if count == 1 else 'two threads'}",
        )
    names = [f"{features}, block {block}\nT={t}, r={rank}" for features, block, t, rank in shapes]
    ax.set_xticks(range(len(shapes)), names, fontsize=8)
    ax.set_title("layers of five shapes", fontsize=10)


def _lines(ax: Axes, raw: list[dict]) -> None:
    """The same over tokens, one thread."""
    kinds = dict.fromkeys((point["mode"], point["how"]) for point in raw)
    for mode, how in kinds:
        points = [
            (point["shape"][2], point["C3A / LoRA over base"].value)
            for point in raw
            if (point["mode"], point["how"], point["threads"]) == (mode, how, 1)
        ]
        points = [point for point in points if not math.isnan(point[1])]
        style = "o-" if how == "eager" else "s--"
        ax.plot(*zip(*points, strict=True), style, color=COLORS[mode], label=f"{mode}, {how}")
    features, block, _, rank = raw[0]["shape"]
    title = f"{features} features, block {block}, LoRA r={rank}, one thread"
    ax.set_title(title, fontsize=10)
    ax.set(xlabel="tokens")
    ax.set_xscale("log", base=2)


def _finish(ax: Axes) -> None:
    ax.axhline(1, color="#444444", linewidth=1)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    if ax.has_data():
        ax.legend(fontsize=8)


def draw_layers(results: dict[str, Result], title: str, path: Path) -> None:
    """With the sweep over tokens where that was measured too."""
    drawn = [(_bars, results["layers"].raw)]
    if "sweep" in results:
        drawn.append((_lines, results["sweep"].raw))
    size = (5.5 * len(drawn) + 1, 4.2)
    figure, axes = pyplot.subplots(1, len(drawn), figsize=size, layout="constrained", squeeze=False)
    axes[0][0].set_ylabel("C3A's time over base / LoRA's")
    for ax, (draw, raw) in zip(axes[0], drawn, strict=True):
        draw(ax, raw)
        ax.set_ylim(0, 1.3 * ax.get_ylim()[1])  # room for the legend
        _finish(ax)
    _save(figure, title, path)


def draw_operator(results: dict[str, Result], title: str, path: Path) -> None:
    subtitles = {
        "block size": "4096 x 4096, T = 512, LoRA of as many parameters (r >= 1)",
        "tokens": "1024 x 1024, block size 128, LoRA r=8",
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for ax, (sweep, subtitle) in zip(axes, subtitles.items(), strict=True):
        points = [point for point in results["sizes"].raw if point["sweep"] == sweep]
        at = [point["at"] for point in points]
        for peer, color in (("PEFT", "tab:red"), ("LoRA", "tab:blue")):
            ratios = [point["seconds"]["C3A"] / point["seconds"][peer] for point in points]
            ax.plot(at, ratios, "o-", color=color, label=f"time / {peer}'s")
        ax.set(xscale="log", yscale="log", xlabel=sweep)
        ax.set_title(subtitle, fontsize=10)
        ax.set_xscale("log", base=2)
        _finish(ax)
    axes[0].set_ylabel("the operator's time, relative")
    _save(figure, title, path)


def _save(figure: pyplot.Figure, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110, facecolor="white")
    pyplot.close(figure)
