"""``c3a inspect``: shape, norm and rank of each layer of an adapter, and its singular spectra."""

import argparse
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

_FORMATS = ("png", "svg", "pdf", "jpg", "webp")
_SHOWN = 0.98  # of a spectrum: its last values fall off a cliff that would squeeze all others


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "inspect", help="print shape, norm and rank of each layer of an adapter, draw its spectra"
    )
    parser.add_argument("adapter", type=Path, help="a folder that save_adapter or PEFT wrote")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PICTURE",
        help=f"ends in .{', .'.join(_FORMATS)} (default: ADAPTER/spectra.png)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the table and draw the picture."""
    import matplotlib  # noqa: F401 - if it is not there, that is to be known before the table

    from ..adapter import read_adapter
    from ..reference import rank, singular_values

    picture = options.output or options.adapter / "spectra.png"
    suffix = picture.suffix.lower().removeprefix(".")
    if suffix not in _FORMATS:
        raise ValueError(f"expected --output to end in .{', .'.join(_FORMATS)}, got {picture}")
    if picture.is_dir():
        raise ValueError(f"expected --output to be a file, {picture} is a folder")
    found = read_adapter(options.adapter).kernels
    if not found:
        raise ValueError(f"{options.adapter} holds no c3a_kernel")
    for layer, kernel in found.items():
        _check_kernel(kernel, f"{options.adapter}: {layer}")
    rows, spectra = [], {}
    for layer, kernel in sorted(found.items(), key=lambda item: in_order(item[0])):
        m, n, b = kernel.shape[-3:]
        of_each = kernel.reshape(-1, m, n, b)  # experts have one each
        sigma = torch.cat([singular_values(k) for k in of_each]) / (n * b)
        sigma = sigma.sort(descending=True).values
        full_rank = sum(rank(k) for k in of_each)
        spectra[layer] = sigma[:full_rank]  # the others are rounding
        sizes = (str(n * b), str(m * b), str(b), f"{kernel.numel():,}")
        rows.append((layer, *sizes, f"{sigma.norm():.3g}", f"{full_rank}/{len(sigma)}"))
    header = ("layer", "in", "out", "block", "parameters", "norm", "rank")
    print_table(header, rows)
    print("norm and rank of the matrix that is added to the weight, scale 1 / in_features")
    draw_spectra(spectra, picture, suffix, options.adapter.resolve().name)
    print(f"singular spectra drawn to {picture}")


def in_order(name: str) -> list[tuple[bool, int, str]]:
    """Layer 10 comes after layer 9."""
    parts = [(part, part.isdecimal()) for part in name.split(".")]
    return [(not number, int(part) if number else 0, part) for part, number in parts]


def _check_kernel(kernel: Tensor, where: str) -> None:
    # a spectrum is finite where its kernel is, but for float64's largest numbers
    if not torch.fft.fft(kernel.double()).isfinite().all():
        raise ValueError(f"{where}: expected a kernel of finite numbers, of moderate size")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of layers, names shortened for the terminal; numbers follow the name."""
    for line in _table(header, rows, shutil.get_terminal_size().columns):
        print(line)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """Give the lines of a table, none longer than ``width`` if its numbers allow that."""
    columns = list(zip(header, *rows, strict=True))
    sizes = [max(map(len, column)) for column in columns[1:]]
    room = max(12, width - sum(sizes) - 2 * len(sizes))
    layers = ["".join(c if c.isprintable() else "?" for c in row[0]) for row in rows]
    names = [header[0], *shortened(layers, room)]
    first = max(map(len, names))
    for number, (name, row) in enumerate(zip(names, [header, *rows], strict=True)):
        cells = [cell.rjust(size) for cell, size in zip(row[1:], sizes, strict=True)]
        yield "  ".join([name.ljust(first), *cells])
        if number == 0:
            yield "  ".join("-" * size for size in (first, *sizes))


def shortened(names: Sequence[str], width: int) -> list[str]:
    """Return names with whole parts left out of the middle, numbers never, so that they fit.

    >>> shortened(["bert.encoder.layer.0.attention.output.dense"], 30)
    ['bert…0.attention.output.dense']
    """
    candidates = [list(_shorter(name)) for name in names]
    meant_by = Counter(short for found in candidates for short in found)
    return [
        next(
            # what two names could be shortened to tells nobody which it is
            (short for short in [name, *found] if len(short) <= width and meant_by[short] <= 1),
            f"…{name[-(width - 1) :]}",
        )
        for name, found in zip(names, candidates, strict=True)
    ]


def _shorter(name: str) -> Iterator[str]:
    """Give a name without one run of its parts: runs near the front first, since ends tell most."""
    parts = name.split(".")
    for start in (*range(1, len(parts)), 0):
        for end in range(start + 1, len(parts)):
            if parts[end - 1].isdecimal():
                break
            yield ".".join(parts[:start]) + "…" + ".".join(parts[end:])


def by_kind(layers: Sequence[str]) -> dict[str, list[tuple[int | None, str]]]:
    """Return the layers by kind, which is the name without its numbers, each with its depth.

    >>> by_kind(["layer.0.query", "layer.1.query", "pooler"])
    {'query': [(0, 'layer.0.query'), (1, 'layer.1.query')], 'pooler': [(None, 'pooler')]}
    """
    kinds: dict[tuple[str, ...], list[tuple[int | None, str]]] = {}
    for name in layers:
        parts = name.split(".")
        numbers = [int(part) for part in parts if part.isdecimal()]
        kind = tuple("*" if part.isdecimal() else part for part in parts)
        kinds.setdefault(kind, []).append((numbers[0] if numbers else None, name))
    # What follows the last number names a kind, unless that would be two kinds' name.
    ends = {kind: ".".join(kind).rpartition("*.")[2] for kind in kinds}
    uses = Counter(ends.values())
    return {
        ends[kind] if uses[ends[kind]] == 1 else ".".join(kind): members
        for kind, members in kinds.items()
    }


def draw_spectra(spectra: Mapping[str, Tensor], path: Path, suffix: str, title: str) -> None:
    """Draw the singular values of every layer, largest first: a panel a kind, coloured by depth."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from ..files import replacing

    kinds = by_kind(list(spectra))
    depths = [depth for members in kinds.values() for depth, _ in members if depth is not None]
    # without its palest end, which nobody sees on white
    colors = ListedColormap(colormaps["viridis"].resampled(256)(range(230)))
    scale = ScalarMappable(Normalize(min(depths, default=0), max(depths, default=1)), colors)
    columns = min(len(kinds), 4 if len(kinds) in (4, 7, 8) or len(kinds) > 9 else 3)
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(1.4 + 2.6 * columns, 1.0 + 2.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel, (kind, members) in zip(panels.flat, kinds.items(), strict=False):
        panel.set_title(*shortened([kind], 32), fontsize="small", parse_math=False)
        panel.grid(alpha=0.25, lw=0.5)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize="small")
        for depth, name in members:
            # matplotlib declares arrays only, and takes a number as well
            color = "0.25" if depth is None else scale.to_rgba(depth)  # type: ignore[arg-type]
            sigma = spectra[name].tolist()
            panel.semilogy(range(1, len(sigma) + 1), sigma, color=color, lw=1.1)
        if not any(len(spectra[name]) for _, name in members):
            panel.text(0.5, 0.5, "all zero", transform=panel.transAxes, ha="center", color="0.4")
    drawn = [sigma for sigma in spectra.values() if len(sigma)]
    if drawn:
        lowest = min(float(sigma[int(_SHOWN * (len(sigma) - 1))]) for sigma in drawn)
        panels[0, 0].set_ylim(lowest / 2, 2 * max(float(sigma[0]) for sigma in drawn))
    for panel in panels.flat[len(kinds) :]:
        panel.set_visible(False)
    for column in range(columns):  # the lowest panel there is
        lowest = (len(kinds) - 1 - column) // columns
        panels[lowest, column].tick_params(labelbottom=True)
    figure.supxlabel("index of the singular value, largest first", fontsize="medium")
    figure.supylabel("singular value", fontsize="medium")
    heading = f"{title}: singular values of the matrices added to the weights"
    figure.suptitle(heading, parse_math=False)
    if len(set(depths)) > 1:
        bar = figure.colorbar(scale, ax=panels, aspect=30, pad=0.02, label="depth: layer number")
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    with replacing(path) as (temporary,):
        figure.savefig(temporary, dpi=130, format=suffix)
