"""Parameter-efficient fine-tuning by block-circular convolution.

``y = base(x) + scale * block_circ_conv(x, w)``: importing this package loads the operator libraries
and registers ``torch.ops.c3a.*`` with their Python rules.
"""

from typing import TYPE_CHECKING

from . import _library  # loads the operators that the modules below give rules for
from .adapter import load_adapter, save_adapter
from .fsdp import fully_shard
from .groups import param_groups
from .linear import C3ALinear
from .ops import (
    block_circ_conv,
    block_circ_conv_add,
    block_circ_conv_linear,
    block_circ_conv_many,
    block_circ_conv_many_prepared,
    block_circ_conv_prepared,
    block_circ_conv_prepared_add,
    prepare,
)
from .patch import disabled, merge, patch_model, unmerge, unpatch_model
from .pool import AdapterPool
from .pretrained import load_pretrained
from .reference import circulant, nearest_kernel
from .summary import summary

if TYPE_CHECKING:
    from .parallel import ColwiseParallel, RowwiseParallel

__version__ = _library.fact("version")

__all__ = [
    "AdapterPool",
    "C3ALinear",
    "ColwiseParallel",
    "RowwiseParallel",
    "block_circ_conv",
    "block_circ_conv_add",
    "block_circ_conv_linear",
    "block_circ_conv_many",
    "block_circ_conv_many_prepared",
    "block_circ_conv_prepared",
    "block_circ_conv_prepared_add",
    "circulant",
    "disabled",
    "fully_shard",
    "load_adapter",
    "load_pretrained",
    "merge",
    "nearest_kernel",
    "param_groups",
    "patch_model",
    "prepare",
    "save_adapter",
    "summary",
    "unmerge",
    "unpatch_model",
]


def __getattr__(name: str) -> object:
    """Import what is in ``parallel`` when it is asked for: its base classes are slow to import."""
    if name in ("ColwiseParallel", "RowwiseParallel"):
        from . import parallel

        return getattr(parallel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
