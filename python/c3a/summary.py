"""What a patched model trains, layer by layer."""

from dataclasses import dataclass

from torch import nn

from .patch import adapters


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer, or parameter of experts: sizes in features, parameters as counts."""

    name: str
    in_features: int
    out_features: int
    block_size: int
    parameters: int
    merged: bool
    experts: int = 1  # each with matrices of these sizes


@dataclass(frozen=True)
class Summary:
    """Counts of parameters; ``print`` it for a table."""

    layers: tuple[LayerSummary, ...]
    adapter: int  # in the kernels
    trainable: int  # in all that requires a gradient: kernels, modules_to_save
    total: int  # in everything, kernels included

    def __str__(self) -> str:
        header = ("layer", "in", "out", "block size", "parameters")
        rows = [
            (
                layer.name
                + (f" ({layer.experts} experts)" if layer.experts > 1 else "")
                + (" (merged)" if layer.merged else ""),
                str(layer.in_features),
                str(layer.out_features),
                str(layer.block_size),
                f"{layer.parameters:,}",
            )
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0])]
                + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
            )
            for row in (header, *rows)
        ]
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(
            f"trainable: {self.trainable:,} of {self.total:,} parameters ({share:.3g} %), "
            f"{self.adapter:,} of them in {len(self.layers)} adapted layers"
        )
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Count the trainable and total parameters of a model and of each adapted layer.

    >>> import c3a, torch
    >>> model = c3a.patch_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), ["0"], 4)
    >>> print(c3a.summary(model))
    layer  in  out  block size  parameters
    0       8    4           4           8
    trainable: 8 of 44 parameters (18.2 %), 8 of them in 1 adapted layers
    """
    layers = tuple(
        LayerSummary(
            name,
            layer.in_features,
            layer.out_features,
            layer.block_size,
            layer.c3a_kernel.numel(),
            layer.merged,
            len(layer.c3a_kernel) if layer.c3a_kernel.ndim == 4 else 1,
        )
        for name, layer in adapters(model).items()
    )
    parameters = list(model.parameters())
    return Summary(
        layers,
        adapter=sum(layer.parameters for layer in layers),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
    )
