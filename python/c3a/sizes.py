"""Sizes of layers: features, the block sizes that fit, shapes of kernels."""

import math
from numbers import Integral
from typing import Any, TypeGuard

from torch import nn


def is_count(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_NAMES = (("in_features", "out_features"), ("infeatures", "outfeatures"), ("nx", "nf"))


def features(layer: nn.Module) -> tuple[int, int] | None:
    """Return ``(in_features, out_features)`` of a linear layer, or None for any other module.

    ``nn.Linear`` and everything that copies its two attributes (quantised layers, ``C3ALinear``),
    some of GPTQ's with their ``infeatures`` and ``outfeatures``, and
    ``transformers.pytorch_utils.Conv1D`` with its ``nx`` and ``nf``.
    """
    for in_name, out_name in _NAMES:
        sizes: tuple[Any, Any] = getattr(layer, in_name, None), getattr(layer, out_name, None)
        if all(isinstance(size, int) and size > 0 for size in sizes):
            return sizes
    return None


def linear_features(layer: nn.Module) -> tuple[int, int]:
    """Return ``features`` of what is known to be a linear layer."""
    sizes = features(layer)
    assert sizes is not None
    return sizes


def is_transposed(layer: nn.Module) -> bool:
    """Return whether a dense weight of a linear layer is ``(in, out)``, as that of ``Conv1D``."""
    return hasattr(layer, "nx") and not hasattr(layer, "in_features")


def common_divisors(in_features: int, out_features: int) -> list[int]:
    """Return the block sizes that fit without padding, ascending."""
    gcd = math.gcd(in_features, out_features)
    return [b for b in range(1, gcd + 1) if gcd % b == 0]


def auto_block_size(in_features: int, out_features: int, rank: int) -> int:
    """Return the common divisor nearest to ``sqrt(in * out) / rank``, by ratio; ties go up.

    The rule of the PEFT library's page on C3A, ``rank`` being the LoRA rank one would use.
    """
    goal = math.sqrt(in_features * out_features) / rank
    return min(
        common_divisors(in_features, out_features), key=lambda b: (abs(math.log(b / goal)), -b)
    )


def check_block_size(
    block_size: object, in_features: int, out_features: int, pad: bool, may_pad: bool = True
) -> None:
    """Raise ValueError, with the sizes that would do, unless ``block_size`` fits the layer."""
    if isinstance(block_size, bool) or not isinstance(block_size, Integral) or block_size < 1:
        raise ValueError(f"expected block_size to be an integer >= 1, got {block_size!r}")
    # A matrix has no more diagonals: what a kernel holds beyond them would have no effect.
    block_size, most = int(block_size), in_features + out_features - 1
    if pad and block_size > most:
        raise ValueError(
            f"expected block_size <= {most}, in_features + out_features - 1, got {block_size}"
        )
    if not pad and (in_features % block_size or out_features % block_size):
        fits = ", ".join(str(b) for b in common_divisors(in_features, out_features))
        raise ValueError(
            f"block_size {block_size} does not divide in_features = {in_features} and out_features "
            f"= {out_features}; these do: {fits}" + (" (or pass pad=True)" if may_pad else "")
        )


def kernel_shape(in_features: int, out_features: int, block_size: int) -> tuple[int, int, int]:
    """Return ``(m, n, b)`` of a layer's kernel, with room for padding where ``b`` divides not."""
    return -(-out_features // block_size), -(-in_features // block_size), block_size
