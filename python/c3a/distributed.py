"""Models whose tensors are divided among processes: by FSDP2, or as DTensors.

What of torch is not imported has divided nothing: nothing of it is imported here but to divide.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


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


def is_first() -> bool:
    """Return whether this is the process that writes what all have together."""
    import torch.distributed as dist

    return dist.get_rank() == 0


def gathered(state: Mapping[str, Any]) -> dict[str, Any]:
    """Gather tensors one by one, for which all processes must ask; only the first keeps them."""
    found = {}
    for key, t in state.items():
        t = whole(t) if isinstance(t, Tensor) else t
        if is_first():
            found[key] = t.cpu() if isinstance(t, Tensor) else t
    return found


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
    if is_first():
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
