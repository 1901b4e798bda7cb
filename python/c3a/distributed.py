"""Models whose tensors are divided among processes: by FSDP2, or as DTensors.

What of torch is not imported has divided nothing: nothing of it is imported here but to divide.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

Model = TypeVar("Model", bound=nn.Module)


def _is(found: object, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(found, kind)


def is_dtensor(t: object) -> bool:
    return _is(t, "torch.distributed.tensor", "DTensor")


def is_fsdp(module: nn.Module) -> bool:
    return _is(module, "torch.distributed.fsdp", "FSDPModule")


def is_sharded(model: nn.Module) -> bool:
    """Return whether processes have a model together, rather than one each."""
    return any(map(is_fsdp, model.modules())) or any(map(is_dtensor, model.parameters()))


def reshard(model: nn.Module) -> None:
    """Let FSDP show the parameters that it keeps, rather than what it has gathered from them."""
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()  # type: ignore[operator]  # torch's FSDPModule has it


def whole(t: Any) -> Tensor:
    """Return a tensor in one piece: a DTensor is gathered, for which all processes must ask."""
    piece: Tensor = t.full_tensor() if is_dtensor(t) else t
    return piece


def placed_as(t: Tensor, like: Any) -> Tensor:
    """Divide a tensor that every process has as another one is; differentiable."""
    if not is_dtensor(like):
        return t
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = [Replicate()] * mesh.ndim
    whole = DTensor.from_local(t.to(like.device), mesh, everywhere, run_check=False)
    return whole.redistribute(placements=like.placements)


def by_one_process(act: Callable[[], object]) -> None:
    """Act in the first process; the others wait, and raise OSError if it fails there."""
    import torch.distributed as dist

    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            act()
        except Exception as error:
            failure = error
    said = [None if failure is None else f"{type(failure).__name__}: {failure}"]
    dist.broadcast_object_list(said, src=0)
    if failure is not None:
        raise failure
    if said[0] is not None:
        raise OSError(f"c3a: in the first process: {said[0]}")


def fully_shard(
    model: Model,
    *,
    mesh: "DeviceMesh | None" = None,
    mp_policy: "MixedPrecisionPolicy | None" = None,
    **options: Any,
) -> Model:
    """Shard a patched model, or a part of one, over processes by FSDP2.

    Each adapted layer's base layer and its kernel are groups of their own, and what else there is
    is one. So the dtypes of kernels, bases and ``modules_to_save`` need not agree. Kernels keep
    their dtype whatever ``mp_policy.param_dtype`` is, for it is small and trained.

    Args:
        model: a patched model, or such a part of it as a transformer block; parts first, the whole
            model last. After ``parallelize_module`` where there is tensor parallelism too.
        mesh, mp_policy, options: as for ``torch.distributed.fsdp.fully_shard``.

    Returns:
        The same model. ``c3a.save_adapter``, ``c3a.load_adapter``, ``c3a.merge`` and
        ``c3a.summary`` take it; all processes must call them.

    Raises:
        ValueError: the model has no adapted layer.

    >>> import c3a, torch
    >>> model = c3a.patch_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), ["0"], 4)
    >>> model = c3a.fully_shard(model, mesh=mesh)  # doctest: +SKIP
    """
    from torch.distributed import fsdp

    from .patch import adapted_layers

    layers = adapted_layers(model)
    if not layers:
        raise ValueError(
            "c3a.fully_shard: the model has no C3ALinear layer; patch it first, or call "
            "torch.distributed.fsdp.fully_shard"
        )
    policy = mp_policy or fsdp.MixedPrecisionPolicy()
    of_kernels = dataclasses.replace(
        policy, param_dtype=None, output_dtype=None, cast_forward_inputs=False
    )
    options["mesh"] = mesh
    for layer in layers.values():
        for part, its in ((layer.base_layer, policy), (layer, of_kernels)):
            if not is_fsdp(part):
                fsdp.fully_shard(part, mp_policy=its, **options)
    if not is_fsdp(model):
        fsdp.fully_shard(model, mp_policy=policy, **options)
    return model
