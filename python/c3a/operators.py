"""The operators' Python rules: one record each, and their registration with torch.

cpp/library.cpp has the schemas, cpp/operators.h the checks and what they compute.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _private, autograd, flops, shapes, sharding, vmap
from ._library import NAMESPACE
from ._library import OPS as _OPS
from ._private import DispatchKeySet, Overload

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
Rule = Callable[..., Any]


@dataclass(frozen=True)
class Operator:
    """What torch must know of an operator beside its kernels in C++."""

    op: Overload
    fake: Rule  # shapes.py: the result for tensors without data
    autograd: Rule  # autograd.py: the kernel of the Autograd key
    vmap: Rule  # vmap.py
    flops: Callable[..., int]  # flops.py
    sharding: sharding.Rule  # sharding.py: for DTensors
    # Of those whose result follows autocast's dtype; the others keep the dtypes they are given.
    autocast: Callable[[Overload, str], Rule] | None = None


def _records() -> tuple[Operator, ...]:
    forward = autograd.FORWARD.op
    input_grad = autograd.INPUT_GRAD.op
    kernel_grad = autograd.KERNEL_GRAD.op
    prepared = autograd.PREPARED.op
    backward = _OPS.block_circ_conv_backward.default
    backward_add_ = _OPS.block_circ_conv_backward_add_.default
    add = _OPS.block_circ_conv_add.default
    add_ = _OPS.block_circ_conv_add_.default
    linear = _OPS.block_circ_conv_linear.default
    prepare = _OPS.prepare.default
    prepared_add = _OPS.block_circ_conv_prepared_add.default
    prepared_add_ = _OPS.block_circ_conv_prepared_add_.default
    many = autograd.MANY.op
    many_add_ = _OPS.block_circ_conv_many_add_.default
    many_input_grad = autograd.MANY_INPUT_GRAD.op
    many_kernel_grad = autograd.MANY_KERNEL_GRAD.op
    many_prepared = autograd.MANY_PREPARED.op
    many_prepared_add_ = _OPS.block_circ_conv_many_prepared_add_.default

    over_forward = vmap.folded(
        forward, vmap.tokens_of(forward), vmap.kernels_of_forward, vmap.rows_of(many)
    )
    over_input_grad = vmap.folded(
        input_grad,
        vmap.tokens_of(input_grad),
        vmap.kernels_of_input_grad,
        vmap.rows_of(many_input_grad),
    )
    over_kernel_grad = vmap.folded(
        kernel_grad,
        vmap.outputs_of_kernel_grad,
        vmap.inputs_of_kernel_grad,
        vmap.rows_of_kernel_grad,
    )
    over_pair = vmap.pair(over_input_grad, over_kernel_grad)
    over_sum = vmap.summed(over_forward)
    over_prepared = vmap.prepared(prepared, many_prepared)
    over_prepared_sum = vmap.summed(over_prepared)
    over_many = vmap.more_rows(many)
    over_many_prepared = vmap.more_rows(many_prepared)
    return (
        Operator(
            op=forward,
            fake=shapes.forward,
            autograd=autograd.product_rule(autograd.FORWARD, "BlockCircConv"),
            vmap=over_forward,
            flops=flops.forward,
            sharding=sharding.FORWARD,
            autocast=_result_in_autocasts_dtype,
        ),
        Operator(
            op=add,
            fake=shapes.add,
            autograd=autograd.sum_rule(add, autograd.FORWARD, "BlockCircConvAdd"),
            vmap=over_sum,
            flops=flops.add,
            sharding=sharding.ADD,
        ),
        Operator(
            op=add_,
            fake=shapes.add_,
            autograd=autograd.in_place_rule(add_, add),
            vmap=vmap.in_place("block_circ_conv_add_", over_sum),
            flops=flops.add,
            sharding=sharding.ADD_,
        ),
        Operator(
            op=linear,
            fake=shapes.linear,
            autograd=autograd.linear_rule(linear),
            vmap=vmap.decomposed(autograd.linear_as_a_sum),
            flops=flops.linear,
            sharding=sharding.LINEAR,
            autocast=_linear_in_autocasts_dtype,
        ),
        Operator(
            op=input_grad,
            fake=shapes.input_grad,
            autograd=autograd.product_rule(autograd.INPUT_GRAD, "BlockCircConvInputGrad"),
            vmap=over_input_grad,
            flops=flops.input_grad,
            sharding=sharding.INPUT_GRAD,
        ),
        Operator(
            op=kernel_grad,
            fake=shapes.kernel_grad,
            autograd=autograd.product_rule(autograd.KERNEL_GRAD, "BlockCircConvKernelGrad"),
            vmap=over_kernel_grad,
            flops=flops.kernel_grad,
            sharding=sharding.KERNEL_GRAD,
        ),
        Operator(
            op=backward,
            fake=shapes.backward,
            autograd=autograd.pair_rule(backward),
            vmap=over_pair,
            flops=flops.backward,
            sharding=sharding.BACKWARD,
        ),
        Operator(
            op=backward_add_,
            fake=shapes.backward_add_,
            autograd=autograd.pair_in_place_rule(backward_add_),
            vmap=vmap.pair_in_place("block_circ_conv_backward_add_", over_pair),
            flops=flops.backward_add_,
            sharding=sharding.backward_add_,
        ),
        Operator(
            op=prepare,
            fake=shapes.prepare,
            autograd=autograd.prepare_rule(prepare),
            vmap=vmap.stacked(prepare),
            flops=flops.prepare,
            sharding=sharding.prepare,
        ),
        Operator(
            op=prepared,
            fake=shapes.prepared,
            autograd=autograd.product_rule(autograd.PREPARED, "BlockCircConvPrepared"),
            vmap=over_prepared,
            flops=flops.prepared,
            sharding=sharding.PREPARED,
            autocast=_result_in_autocasts_dtype,
        ),
        Operator(
            op=prepared_add,
            fake=shapes.prepared_add,
            autograd=autograd.sum_rule(prepared_add, autograd.PREPARED, "BlockCircConvPreparedAdd"),
            vmap=over_prepared_sum,
            flops=flops.prepared_add,
            sharding=sharding.PREPARED_ADD,
        ),
        Operator(
            op=prepared_add_,
            fake=shapes.prepared_add_,
            autograd=autograd.in_place_rule(prepared_add_, prepared_add),
            vmap=vmap.in_place("block_circ_conv_prepared_add_", over_prepared_sum),
            flops=flops.prepared_add,
            sharding=sharding.PREPARED_ADD_,
        ),
        Operator(
            op=many,
            sharding=sharding.MANY,
            fake=shapes.many,
            autograd=autograd.product_rule(autograd.MANY, "BlockCircConvMany"),
            vmap=over_many,
            flops=flops.many,
            autocast=_result_in_autocasts_dtype,
        ),
        Operator(
            op=many_add_,
            sharding=sharding.MANY_ADD_,
            fake=shapes.many_add_,
            autograd=autograd.in_place_rule(
                many_add_, autograd.sum_of(autograd.MANY, shapes.many_add_)
            ),
            vmap=vmap.in_place("block_circ_conv_many_add_", vmap.summed(over_many)),
            flops=flops.many_add_,
        ),
        Operator(
            op=many_input_grad,
            sharding=sharding.MANY_INPUT_GRAD,
            fake=shapes.many_input_grad,
            autograd=autograd.product_rule(autograd.MANY_INPUT_GRAD, "BlockCircConvManyInputGrad"),
            vmap=vmap.more_rows(many_input_grad),
            flops=flops.many,
        ),
        Operator(
            op=many_kernel_grad,
            sharding=sharding.MANY_KERNEL_GRAD,
            fake=shapes.many_kernel_grad,
            autograd=autograd.product_rule(
                autograd.MANY_KERNEL_GRAD, "BlockCircConvManyKernelGrad"
            ),
            vmap=vmap.more_rows_of_kernel_grad,
            flops=flops.many_kernel_grad,
        ),
        Operator(
            op=many_prepared,
            sharding=sharding.MANY_PREPARED,
            fake=shapes.many_prepared,
            autograd=autograd.product_rule(autograd.MANY_PREPARED, "BlockCircConvManyPrepared"),
            vmap=over_many_prepared,
            flops=flops.many_prepared,
            autocast=_result_in_autocasts_dtype,
        ),
        Operator(
            op=many_prepared_add_,
            sharding=sharding.MANY_PREPARED_ADD_,
            fake=shapes.many_prepared_add_,
            autograd=autograd.in_place_rule(
                many_prepared_add_,
                autograd.sum_of(autograd.MANY_PREPARED, shapes.many_prepared_add_),
            ),
            vmap=vmap.in_place(
                "block_circ_conv_many_prepared_add_", vmap.summed(over_many_prepared)
            ),
            flops=flops.many_prepared_add_,
        ),
    )


# Every device type that torch has an autocast key for.
AUTOCAST_KEYS = {
    "cpu": "AutocastCPU",
    "cuda": "AutocastCUDA",
    "xpu": "AutocastXPU",
    "hpu": "AutocastHPU",
    "ipu": "AutocastIPU",
    "mps": "AutocastMPS",
    "mtia": "AutocastMTIA",
    "maia": "AutocastMAIA",
    "xla": "AutocastXLA",
    "privateuseone": "AutocastPrivateUse1",
}


def _autocast_dtype(device_type: str) -> torch.dtype:
    is_private = device_type == "privateuseone"
    return torch.get_autocast_dtype(
        _private.privateuse1_device_type() if is_private else device_type
    )


def _result_in_autocasts_dtype(op: Overload, device_type: str) -> Rule:
    """Take the operands as they are (no copy to save), give the result autocast's dtype."""

    def kernel(*args: Any) -> Tensor:
        with _private.autocast_disabled():
            y: Tensor = op(*args)
            return y if y.dtype == torch.float64 else y.to(_autocast_dtype(device_type))

    return kernel


def _linear_in_autocasts_dtype(op: Overload, device_type: str) -> Rule:
    """Give the linear layer autocast's dtype, and so the result; the input is as it is."""

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        if torch.float64 not in (x.dtype, weight.dtype):
            dtype = _autocast_dtype(device_type)
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        with _private.autocast_disabled():
            y: Tensor = op(x, weight, bias, *args)
            return y

    return kernel


def _version_rule(op: Overload) -> Rule:
    """Count a write in place, by which autograd finds saved tensors that were changed."""

    written = _private.schema(op).arguments[0].name

    def kernel(keyset: DispatchKeySet, base: Any, *args: Any) -> Any:
        if base is not None and base.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"c3a.{op.name().partition('::')[2]}: expected to write a tensor of inference "
                f"mode within inference mode only; call {written}.clone() first"
            )
        result = _private.below_version_counting(op, keyset, base, *args)
        torch.autograd.graph.increment_version(base)
        return result

    return kernel


def _negated_rule(op: Overload) -> Rule:
    """Write into views with the lazy negative bit, which torch's own fallback cannot here."""

    check = shapes.argument_check(op)

    def kernel(base: Tensor, *args: Any) -> Any:
        check((base, *args))
        args = tuple([t.resolve_neg() if isinstance(t, Tensor) else t for t in args])
        plain = base.resolve_neg()
        result = op(plain, *args)
        if plain is not base:
            base.copy_(plain)
        return result

    return kernel


def _register(operator: Operator) -> None:
    op = operator.op
    name = op.name()
    torch.library.register_fake(name, operator.fake, lib=_LIBRARY)
    torch.library.register_vmap(name, operator.vmap, lib=_LIBRARY)
    _LIBRARY.impl(name, operator.autograd, "Autograd", with_keyset=True)
    if _private.schema(op).is_mutable:
        _LIBRARY.impl(name, _version_rule(op), "ADInplaceOrView", with_keyset=True)
        _LIBRARY.impl(name, _negated_rule(op), "Negative")
    if operator.autocast is not None:
        for device_type, key in AUTOCAST_KEYS.items():
            _LIBRARY.impl(name, operator.autocast(op, device_type), key)
    # In inference mode nested tensors come here, past the Autograd kernel, which refuses them too.
    check = shapes.argument_check(op)
    for key in ("NestedTensorCPU", "NestedTensorCUDA"):
        _LIBRARY.impl(name, lambda *args: check(args), key)
    torch.library.register_torch_dispatch(
        name,
        _private.NestedTensor,
        lambda _cls, _func, _types, args=(), _kwargs=None: check(args),
        lib=_LIBRARY,
    )


OPERATORS = _records()
for _operator in OPERATORS:
    _register(_operator)
flops.register({operator.op: operator.flops for operator in OPERATORS})
sharding.register({operator.op: operator.sharding for operator in OPERATORS}, _LIBRARY)
