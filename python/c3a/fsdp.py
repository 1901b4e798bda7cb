"""FSDP2 of patched models, whose kernels and bases differ in dtype."""

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from .distributed import is_fsdp
from .experts import adapted_experts
from .patch import adapted_layers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

Model = TypeVar("Model", bound=nn.Module)


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
        ValueError: the model has no adapted layer, or experts that are adapted.

    >>> import c3a, torch
    >>> model = c3a.patch_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), ["0"], 4)
    >>> model = c3a.fully_shard(model, mesh=mesh)  # doctest: +SKIP
    """
    from torch.distributed import fsdp

    layers = adapted_layers(model)
    if experts := list(adapted_experts(model)):
        raise ValueError(
            f"c3a.fully_shard: expected layers alone to be adapted, got experts ({experts[0]}), "
            "whose kernels cannot be sharded"
        )
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
