"""Styles for ``parallelize_module`` that divide an adapted layer's kernel as its base layer."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor import parallel as of_torch

from .linear import C3ALinear

_Style = of_torch.ColwiseParallel | of_torch.RowwiseParallel


class ColwiseParallel(of_torch.ColwiseParallel):
    """``torch.distributed.tensor.parallel.ColwiseParallel``, for adapted layers too.

    Each process has some of the output features: rows of the base layer's weight and the kernel's
    output blocks for them. Arguments and other layers are torch's.

    Raises ValueError when it is applied to a layer whose output blocks cannot be divided evenly, or
    whose base layer is not a plain ``nn.Linear``.

    >>> import c3a
    >>> c3a.ColwiseParallel(use_local_output=False).use_local_output
    False
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, C3ALinear):
            return super()._apply(module, device_mesh)
        places = {"weight": Shard(0), "bias": Shard(0), "c3a_kernel": Shard(0)}
        return _divided(self, module, device_mesh, 0, places, Replicate())


class RowwiseParallel(of_torch.RowwiseParallel):
    """``torch.distributed.tensor.parallel.RowwiseParallel``, for adapted layers too.

    Each process has some of the input features: columns of the base layer's weight and the kernel's
    input blocks for them. Arguments and other layers are torch's.

    Raises ValueError when it is applied to a layer whose input blocks cannot be divided evenly, or
    whose base layer is not a plain ``nn.Linear``.

    >>> import c3a
    >>> c3a.RowwiseParallel().use_local_output
    True
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, C3ALinear):
            return super()._apply(module, device_mesh)
        places = {"weight": Shard(1), "bias": Replicate(), "c3a_kernel": Shard(1)}
        return _divided(self, module, device_mesh, 1, places, Shard(-1))


def _divided(
    style: _Style,
    layer: C3ALinear,
    mesh: DeviceMesh,
    dimension: int,
    places: Mapping[str, Placement],
    of_input: Placement,
) -> nn.Module:
    """Divide a layer's parameters, and let it take and return what the style says."""
    _check(style, layer, mesh, dimension)

    def divide(_name: str, part: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in list(part.named_parameters(recurse=False)):
            placed = distribute_tensor(
                parameter, mesh, [places[name]], src_data_rank=style.src_data_rank
            )
            part.register_parameter(name, nn.Parameter(placed, parameter.requires_grad))

    def take(_layer: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> Any:
        x, *others = inputs
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, style.input_layouts, run_check=False)
        return (x.redistribute(placements=[of_input]), *others)

    def give(_layer: nn.Module, y: Any, mesh: DeviceMesh) -> Tensor:
        y = y.redistribute(placements=style.output_layouts)
        return y.to_local() if style.use_local_output else y  # type: ignore[no-any-return]

    # torch declares that its hooks return nothing, and takes what they return
    return distribute_module(layer, mesh, divide, take, give)  # type: ignore[arg-type]


def _check(style: _Style, layer: C3ALinear, mesh: DeviceMesh, dimension: int) -> None:
    name = f"c3a.{type(style).__name__}"
    base = layer.base_layer
    if type(base) is not nn.Linear:
        raise ValueError(f"{name}: expected a base layer of torch.nn.Linear, got {type(base)}")
    if layer.merged:
        raise ValueError(f"{name}: expected a layer that is not merged; call c3a.unmerge first")
    blocks, what = layer.c3a_kernel.shape[dimension], ("output", "input")[dimension]
    features = (layer.out_features, layer.in_features)[dimension]
    if blocks % mesh.size() or features != blocks * layer.block_size:
        raise ValueError(
            f"{name}: expected {what} blocks that {mesh.size()} processes can divide evenly, got "
            f"{blocks} for {features} features; a smaller block size gives more"
        )
