"""``c3a inspect``: shape, norm and rank of each layer of an adapter, and its singular spectra."""

import argparse
from pathlib import Path

from torch import Tensor


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "inspect", help="print shape, norm and rank of each layer of an adapter, draw its spectra"
    )
    parser.add_argument("adapter", type=Path, help="a folder that save_adapter or PEFT wrote")
    parser.add_argument(
        "--output", type=Path, help="the picture to write (default: ADAPTER/spectra.png)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the table and draw the picture."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from ..adapter import kernels, read_config, read_tensors
    from ..reference import rank, singular_values

    read_config(options.adapter)
    found = kernels(read_tensors(options.adapter))
    if not found:
        raise ValueError(f"{options.adapter} holds no c3a_kernel")
    caption = "norm and rank of the matrix that is added to the weight, scale 1 / in_features"
    table = Table(box=SIMPLE, pad_edge=False, caption=caption)
    for name in ("layer", "in", "out", "block", "parameters", "norm", "rank"):
        if name == "layer":
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    spectra: dict[str, Tensor] = {}
    for layer, kernel in found.items():
        m, n, b = kernel.shape
        spectra[layer] = singular_values(kernel) / (n * b)
        table.add_row(
            layer,
            str(n * b),
            str(m * b),
            str(b),
            f"{kernel.numel():,}",
            f"{spectra[layer].norm():.3g}",
            f"{rank(kernel)}/{min(m, n) * b}",
        )
    Console().print(table)
    picture = options.output or options.adapter / "spectra.png"
    draw_spectra(spectra, picture)
    print(f"singular spectra drawn to {picture}")


def draw_spectra(spectra: dict[str, Tensor], path: Path) -> None:
    """Draw the singular values of every layer, largest first."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..files import replacing

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = colormaps["viridis"].resampled(len(spectra))
    for index, (layer, sigma) in enumerate(spectra.items()):
        positive = sigma[sigma > 0]
        position = range(1, len(positive) + 1)
        axes.semilogy(position, positive.numpy(), color=colors(index), lw=1, label=layer)
    axes.set(
        xlabel="index", ylabel="singular value", title="Singular spectra of the adapter's matrices"
    )
    axes.grid(alpha=0.3)
    if len(spectra) <= 12:
        axes.legend(fontsize="x-small")
    else:
        first, *_, last = spectra
        mappable = axes.get_lines()
        axes.legend([mappable[0], mappable[-1]], [first, last], fontsize="x-small")
    with replacing(path) as (temporary,):
        figure.savefig(temporary, dpi=120)
