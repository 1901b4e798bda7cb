"""An optimizer's groups: kernels, what is trained whole, and what is not to decay."""

import math
from numbers import Real
from typing import Any

from torch import Tensor, nn

_KERNEL = "c3a_kernel"
_HEAD_LR = 1e-3


def param_groups(
    model: nn.Module,
    lr: float,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
    *,
    kernel_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return the groups for an optimizer of a model whose C3A adapters are trained.

    Works for a model of ``patch_model`` and for one of the PEFT library's, wrapped or not. Frozen
    parameters are in no group; a group that would be empty is left out.

    Args:
        model: has C3A adapters.
        lr: of the kernels, in the group named ``"adapter"``; 0.1 to 1 at the default scale.
        head_lr: of everything else that is trainable, such as ``modules_to_save``, in the groups
            ``"head"`` and ``"no_decay"``. An ordinary layer's rate; by default 1e-3.
        weight_decay: of the group ``"head"``. Biases, norms and other vectors are in ``"no_decay"``
            instead, without any.
        kernel_weight_decay: of the kernels. AdamW takes ``lr`` times that much of a kernel at every
            step, with the kernels' large rate.

    Returns:
        One dictionary a group, with ``name``, ``params``, ``param_names`` (their names in the
        model), ``lr`` and ``weight_decay``. Schedulers and loggers find a group by its name.

    Raises:
        ValueError: no C3A adapter, nothing that is trainable, or a rate or decay that is negative
            or not finite.

    >>> import c3a, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    >>> model = c3a.patch_model(model, ["0"], block_size=4, modules_to_save=["1"])
    >>> groups = c3a.param_groups(model, lr=0.3, weight_decay=0.01)
    >>> optimizer = torch.optim.AdamW(groups)
    >>> for group in optimizer.param_groups:
    ...     print(group["name"], group["param_names"], group["lr"], group["weight_decay"])
    adapter ['0.c3a_kernel'] 0.3 0.0
    head ['1.weight'] 0.001 0.01
    no_decay ['1.bias'] 0.001 0.0
    """
    head_lr = _HEAD_LR if head_lr is None else head_lr
    given = {
        "lr": lr,
        "head_lr": head_lr,
        "weight_decay": weight_decay,
        "kernel_weight_decay": kernel_weight_decay,
    }
    for argument, value in given.items():
        checked: object = value
        if not isinstance(checked, Real) or not 0 <= value < math.inf:
            raise ValueError(
                f"c3a.param_groups: expected {argument} to be a finite number >= 0, got {value!r}"
            )
    members: dict[str, dict[str, Tensor]] = {"adapter": {}, "head": {}, "no_decay": {}}
    has_kernel = False
    norms = {name for name, part in model.named_modules() if "Norm" in type(part).__name__}
    for name, parameter in model.named_parameters():
        is_kernel = _KERNEL in name.split(".")  # PEFT's goes on with the adapter's name
        has_kernel |= is_kernel
        owner, _, own = name.rpartition(".")
        if parameter.requires_grad:
            vector = parameter.ndim < 2 or own == "bias" or owner in norms
            group = "adapter" if is_kernel else "no_decay" if vector else "head"
            members[group][name] = parameter
    if not has_kernel:
        raise ValueError(
            "c3a.param_groups: expected a model with C3A adapters, got a "
            f"{type(model).__name__} without one; call c3a.patch_model first"
        )
    if not any(members.values()):
        raise ValueError(
            "c3a.param_groups: nothing is trainable: every parameter of the model, kernels "
            "included, has requires_grad=False"
        )
    settings = {
        "adapter": (lr, kernel_weight_decay),
        "head": (head_lr, weight_decay),
        "no_decay": (head_lr, 0.0),
    }
    return [
        {
            "name": group,
            "params": list(members[group].values()),
            "param_names": list(members[group]),
            "lr": rate,
            "weight_decay": decay,
        }
        for group, (rate, decay) in settings.items()
        if members[group]
    ]
