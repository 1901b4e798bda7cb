"""Parameter-efficient fine-tuning by block-circular convolution.

``y = base(x) + scale * block_circ_conv(x, w)``: importing this package loads the operator libraries
and registers ``torch.ops.c3a.*`` with their Python rules.
"""

from . import _library  # loads the operators that the modules below give rules for
from .adapter import load_adapter, save_adapter
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
from .pretrained import load_pretrained
from .reference import circulant
from .summary import summary

__version__ = _library.fact("version")

__all__ = [
    "C3ALinear",
    "block_circ_conv",
    "block_circ_conv_add",
    "block_circ_conv_linear",
    "block_circ_conv_many",
    "block_circ_conv_many_prepared",
    "block_circ_conv_prepared",
    "block_circ_conv_prepared_add",
    "circulant",
    "disabled",
    "load_adapter",
    "load_pretrained",
    "merge",
    "patch_model",
    "prepare",
    "save_adapter",
    "summary",
    "unmerge",
    "unpatch_model",
]
