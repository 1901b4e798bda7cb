"""Quantised weights: the matrix that one stands for, and another matrix in the same scheme.

Schemes are known by the names of their weights' classes, so that no library is imported for them.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

_Change = Callable[[Any, Any], None]


def _nothing(_layer: Any, _weight: Any) -> None:
    pass


class Scheme(NamedTuple):
    """How a class of weights is quantised."""

    dequantise: Callable[[Any, Any], Tensor]  # (layer, its weight) -> (out, in), in float32
    quantise: Callable[[Any, Tensor], Tensor]  # (weight, (out, in) in float32) -> one like it
    # What a layer holds beside its weight, when that weight goes and when another has come.
    leave: _Change = _nothing
    enter: _Change = _nothing


def scheme_of(weight: object) -> Scheme | None:
    """Return the scheme of a weight, or None where it is not quantised or not known."""
    cls = type(weight)
    return _SCHEMES.get((cls.__module__.partition(".")[0], cls.__name__))


# torchao's tensors


def _torchao(layer: Any, weight: Any) -> Tensor:
    dense: Tensor = weight.dequantize()
    return dense.float()


def _granularity(weight: Any) -> Any:
    granularity = import_module("torchao.quantization.granularity")
    block, shape = list(weight.block_size), list(weight.shape)
    if block == shape:
        return granularity.PerTensor()
    if block[-1] == shape[-1]:
        return granularity.PerRow()
    return granularity.PerGroup(block[-1])


def _mapping(weight: Any) -> Any:
    mapping = import_module("torchao.quantization.quant_primitives").MappingType
    zero = weight.zero_point
    return mapping.SYMMETRIC if zero is None or not zero.any() else mapping.ASYMMETRIC


def _int8(weight: Any, values: Tensor) -> Tensor:
    found: Tensor = type(weight).from_hp(
        values.to(weight.dtype),
        _granularity(weight),
        _mapping(weight),
        act_quant_kwargs=weight.act_quant_kwargs,
        act_quant_scale=weight.act_quant_scale,
        act_quant_zero_point=weight.act_quant_zero_point,
        act_pre_scale=weight.act_pre_scale,
        reduce_range=weight.reduce_range,
    )
    return found


def _float8(weight: Any, values: Tensor) -> Tensor:
    found: Tensor = type(weight).from_hp(
        values.to(weight.dtype),
        weight.qdata.dtype,
        _granularity(weight),
        mm_config=weight.mm_config,
        kernel_preference=weight.kernel_preference,
        act_quant_kwargs=weight.act_quant_kwargs,
    )
    return found


def _intx(weight: Any, values: Tensor) -> Tensor:
    found: Tensor = type(weight).from_hp(
        values.to(weight.dtype),
        weight.block_size,
        weight.target_dtype,
        mapping_type=_mapping(weight),
        activation_quantization=weight.activation_quantization,
    )
    return found


# bitsandbytes' parameters


def _bnb8_dense(layer: Any, weight: Any) -> Tensor:
    values: Tensor = weight.data
    if values.is_floating_point():  # has_fp16_weights, or not quantised yet
        return values.float()
    largest: Tensor = layer.state.SCB if weight.SCB is None else weight.SCB  # moved by a call
    return values.float() * (largest.float().view(-1, 1) / 127)


def _bnb8(weight: Any, values: Tensor) -> Tensor:
    options = {"requires_grad": False, "has_fp16_weights": weight.has_fp16_weights}
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float16
    # bitsandbytes quantises what moves from the CPU.
    found: Tensor = type(weight)(values.to("cpu", dtype), **options).to(weight.device)
    return found


def _bnb8_leave(layer: Any, former: Any) -> None:
    if layer.state.SCB is not None:
        former.CB, former.SCB = layer.state.CB, layer.state.SCB


def _bnb8_enter(layer: Any, _weight: Any) -> None:
    layer.state.CB = layer.state.SCB = None  # the next call takes the weight's


def _bnb4_dense(layer: Any, weight: Any) -> Tensor:
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        layer.state_dict()  # which puts the numbers back into the order that is saved
    functional = import_module(f"{type(weight).__module__.partition('.')[0]}.functional")
    dense: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
    return dense.float()


def _bnb4(weight: Any, values: Tensor) -> Tensor:
    names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    options = {name: getattr(weight, name) for name in names}
    values = values.to("cpu", weight.quant_state.dtype)
    found: Any = type(weight)(values, requires_grad=False, **options).to(weight.device)
    found.module = weight.module
    tensor: Tensor = found
    return tensor


def _bnb4_enter(layer: Any, weight: Any) -> None:
    layer.quant_state = weight.quant_state


_SCHEMES = {
    ("torchao", "Int8Tensor"): Scheme(_torchao, _int8),
    ("torchao", "Float8Tensor"): Scheme(_torchao, _float8),
    ("torchao", "IntxUnpackedToInt8Tensor"): Scheme(_torchao, _intx),
    ("bitsandbytes", "Int8Params"): Scheme(_bnb8_dense, _bnb8, _bnb8_leave, _bnb8_enter),
    ("bitsandbytes", "Params4bit"): Scheme(_bnb4_dense, _bnb4, enter=_bnb4_enter),
}
