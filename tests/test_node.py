"""A frozen nn.Linear and its adapter as one node of the graph, and where they stay two."""

import os
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import c3a
from c3a import _private
from c3a.memory import peak_allocated, saved_for_backward
from cases import relative_error

pytestmark = pytest.mark.usefixtures("default_device")

ONE, PREPARED = "BlockCircConvLinearBackward", "BlockCircConvPreparedLinearBackward"
SHAPES = [(12,), (5, 12), (2, 3, 12), (0, 12), (2, 0, 12)]


class Subclass(nn.Linear):
    """An nn.Linear to every eye but that of the layer: with it there are two nodes."""


def adapted(dtype=torch.float64, bias=True, in_features=12, cls=nn.Linear, kernel_dtype=None):
    base = cls(in_features, 8, bias=bias, dtype=dtype)
    return c3a.C3ALinear(base, 4, init="gaussian", dtype=kernel_dtype or dtype)


def twin_of(layer):
    """Return the same layer with two nodes."""
    old = layer.base_layer
    base = Subclass(
        old.in_features, old.out_features, bias=old.bias is not None, dtype=old.weight.dtype
    )
    twin = c3a.C3ALinear(base, layer.block_size, dtype=layer.c3a_kernel.dtype)
    twin.load_state_dict(layer.state_dict())
    return twin


def is_one(y) -> bool:
    return y.grad_fn.name() in (ONE, PREPARED)


def dense(layer, x, kernel):
    base = layer.base_layer
    matrix = base.weight + layer.scale * c3a.circulant(kernel)
    y = x @ matrix.T
    return y if base.bias is None else y + base.bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_wanted_gradients_are_those_of_the_dense_definition(shape, wanted, bias):
    layer = adapted(bias=bias)
    layer.c3a_kernel.requires_grad_(wanted[1])
    x = torch.randn(shape, dtype=torch.float64, requires_grad=wanted[0])
    y = layer(x)
    assert y.grad_fn.name() == (ONE if wanted[1] or not x.is_cpu else PREPARED)
    expected = dense(layer, x, layer.c3a_kernel)
    torch.testing.assert_close(y, expected)
    h = torch.randn_like(y)
    leaves = [t for t, is_wanted in zip((x, layer.c3a_kernel), wanted, strict=True) if is_wanted]
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, h), torch.autograd.grad(expected, leaves, h)
    )


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_derivatives_of_any_order_in_every_mode(shape, wanted):
    layer = adapted()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=wanted[0])
    kernel = layer.c3a_kernel.requires_grad_(wanted[1])
    leaves = tuple(t for t in (x, kernel) if t.requires_grad)

    def function(*_):
        y = layer(x)
        assert is_one(y)
        return y.sin()

    assert torch.autograd.gradcheck(function, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, leaves, check_batched_grad=True)

    # With a frozen kernel forward mode takes the two nodes, or the tangent would be lost.
    def of_x(x):
        return layer(x).sin()

    if wanted[0]:
        assert torch.autograd.gradcheck(
            of_x, x, check_forward_ad=True, check_batched_forward_grad=True
        )
        assert torch.autograd.gradgradcheck(of_x, x, check_fwd_over_rev=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_numbers_are_those_of_two_nodes(tokens, dtype):
    layer = adapted(dtype, in_features=64, kernel_dtype=torch.float32)
    twin = twin_of(layer)
    x = torch.randn(tokens, 64, dtype=dtype, requires_grad=True)
    h = torch.randn(tokens, 8, dtype=dtype)
    one, two = layer(x), twin(x)
    assert is_one(one)
    assert not is_one(two)
    assert torch.equal(one, two)
    dx, dw = torch.autograd.grad(one, (x, layer.c3a_kernel), h)
    other_dx, other_dw = torch.autograd.grad(two, (x, twin.c3a_kernel), h)
    assert torch.equal(dw, other_dw)
    assert dx.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    assert relative_error(dx, other_dx) < tolerance


def test_a_gradient_that_is_rounded_once_errs_less():
    """In bfloat16 two nodes round the base's share, the adapter's, and their sum."""
    layer = adapted(torch.bfloat16, in_features=512)
    twin = twin_of(layer)
    x = torch.randn(256, 512, dtype=torch.bfloat16, requires_grad=True)
    h = torch.randn(256, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        weight, kernel = layer.base_layer.weight.double(), layer.c3a_kernel.double()
        exact = h.double() @ (weight + layer.scale * c3a.circulant(kernel))
    errors = [
        relative_error(torch.autograd.grad(each(x), x, h)[0], exact) for each in (layer, twin)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("retain_graph", [False, True])
def test_a_backward_pass_changes_nothing_that_it_is_given(create_graph, retain_graph):
    layer = adapted()
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    h = torch.randn(5, 8, dtype=torch.float64)
    tensors = [x, h, layer.c3a_kernel, layer.base_layer.weight]
    copies = [t.detach().clone() for t in tensors]
    y = layer(x)
    result = y.detach().clone()
    first = torch.autograd.grad(
        y, (x, layer.c3a_kernel), h, create_graph=create_graph, retain_graph=retain_graph
    )
    if retain_graph:
        kept = [t.detach().clone() for t in first]
        again = torch.autograd.grad(y, (x, layer.c3a_kernel), h)
        torch.testing.assert_close(again, tuple(kept))
        torch.testing.assert_close(first, tuple(kept))
    assert torch.equal(y, result)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def test_gradients_of_every_layout_are_taken():
    layer = adapted(torch.float32)
    x = torch.randn(5, 12, requires_grad=True)
    h = torch.randn(8, 5).T
    for given in (h, h[:1].expand(5, 8), torch._neg_view(h), torch.stack([h, h], -1)[..., 0]):
        y = layer(x)
        expected = dense(layer, x, layer.c3a_kernel)
        leaves = (x, layer.c3a_kernel)
        torch.testing.assert_close(
            torch.autograd.grad(y, leaves, given), torch.autograd.grad(expected, leaves, given)
        )


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_saves_the_input_the_kernel_and_nothing_else(wanted):
    layer = adapted(torch.float32)
    layer.c3a_kernel.requires_grad_(wanted[1])
    x = torch.randn(64, 12, requires_grad=wanted[0])
    layer(x)
    with saved_for_backward(layer) as saved:
        layer(x)
    if wanted[1]:
        assert saved.total == x.nbytes
    elif x.is_cpu:
        held = layer._prepared._held
        assert saved.total == held.w_hat.nbytes + held.w_hat_transposed.nbytes


def test_an_input_that_no_gradient_needs_is_not_kept():
    layer = adapted(torch.float32).requires_grad_(False)
    x = torch.randn(64, 12, requires_grad=True)
    middle = x * 2
    kept = weakref.ref(middle.untyped_storage())
    y = layer(middle)
    del middle
    assert y.requires_grad
    assert kept() is None


def test_a_step_takes_one_activation_less_than_with_two_nodes(device):
    if device.type != "cpu" or "C3A_EMULATED" in os.environ:
        pytest.skip("of the CPU's kernels: other temporaries are larger than an activation")
    layer = c3a.C3ALinear(nn.Linear(512, 512), 64)
    twin = twin_of(layer)

    def step(layer):
        x = torch.randn(8192, 512).requires_grad_()
        layer(x).backward(h)

    h = torch.randn(8192, 512)
    activation = h.nbytes
    peaks = []
    for each in (layer, twin):
        step(each)
        peaks.append(peak_allocated(lambda each=each: step(each)))
    assert peaks[1] - peaks[0] > 0.9 * activation


def operators_called(run) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU]) as record:
        run()
    return [event.name for event in record.events()]


@pytest.mark.parametrize(
    ("wanted", "operator"),
    [
        ((True, True), "c3a::block_circ_conv_backward_add_"),
        ((True, False), "c3a::block_circ_conv_prepared_add_"),
        ((False, True), "c3a::block_circ_conv_kernel_grad"),
    ],
)
def test_only_what_is_wanted_is_computed(wanted, operator, device):
    if device.type != "cpu":
        pytest.skip("kernels are prepared by themselves on the CPU alone")
    layer = adapted(torch.float32)
    layer.c3a_kernel.requires_grad_(wanted[1])
    y = layer(torch.randn(3, 12, requires_grad=wanted[0])).sum()
    called = operators_called(y.backward)
    assert {name for name in called if name.startswith("c3a::")} == {operator}
    assert ("aten::matmul" in called) == wanted[0]
    assert "aten::add" not in called


def test_a_frozen_kernel_that_is_not_prepared_gives_the_input_its_gradient(monkeypatch):
    layer = adapted().requires_grad_(False)
    monkeypatch.setattr(layer._prepared, "get", lambda *_, **__: None)  # as on other devices
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.grad_fn.name() == ONE
    expected = dense(layer, x, layer.c3a_kernel)
    h = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, h), torch.autograd.grad(expected, x, h))


@pytest.mark.parametrize("what", ["weight", "kernel", "input"])
def test_a_write_between_forward_and_backward_is_an_error_not_a_wrong_gradient(what):
    layer = adapted()
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    middle = x * 1
    y = layer(middle)
    written = {"weight": layer.base_layer.weight, "kernel": layer.c3a_kernel, "input": middle}
    with torch.no_grad():
        written[what].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_merging_between_forward_and_backward_leaves_the_gradient_right():
    layer = adapted()
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    (expected,) = torch.autograd.grad(dense(layer, x, layer.c3a_kernel).sum(), x)
    layer.merge()
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize("what", ["weight", "bias", "kernel", "input"])
def test_tangents_that_were_written_into_parameters_are_not_lost(what):
    layer = adapted()
    x = torch.randn(5, 12, dtype=torch.float64).requires_grad_()
    base, kernel = layer.base_layer, layer.c3a_kernel
    tensors = {"weight": base.weight, "bias": base.bias, "kernel": kernel, "input": x}
    t = tensors[what]
    value, dot = t.detach().clone(), torch.randn_like(t)
    with forward_ad.dual_level():
        with torch.no_grad():
            t.copy_(forward_ad.make_dual(value, dot))
        y = layer(x)
        assert is_one(y)
        _, got = forward_ad.unpack_dual(y)
        assert got is not None
        (dx,) = torch.autograd.grad(y.sin().sum(), x)  # forward over reverse
        _, dx_dot = forward_ad.unpack_dual(dx)
        expected = dense(layer, x, kernel)
        _, dot = forward_ad.unpack_dual(expected)
        torch.testing.assert_close(got, dot)
        (expected,) = torch.autograd.grad(expected.sin().sum(), x)
        torch.testing.assert_close(dx_dot, forward_ad.unpack_dual(expected)[1])


def test_a_tangent_of_the_gradient_that_arrives_is_not_lost():
    layer = adapted()
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    factor, dot = (torch.randn(5, 8, dtype=torch.float64) for _ in range(2))
    with forward_ad.dual_level():
        y = layer(x)
        assert is_one(y)
        (y * forward_ad.make_dual(factor, dot)).sum()
        (dx,) = torch.autograd.grad((y * forward_ad.make_dual(factor, dot)).sum(), x)
        got = forward_ad.unpack_dual(dx)[1]
    matrix = layer.base_layer.weight + layer.delta_weight()
    torch.testing.assert_close(got, (dot @ matrix).detach())


def test_gradients_in_a_batch_are_right():
    layer = adapted()
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    h = torch.randn(3, *y.shape, dtype=torch.float64)
    leaves = (x, layer.c3a_kernel)
    got = torch.autograd.grad(y, leaves, h, is_grads_batched=True, retain_graph=True)
    for index in range(3):
        expected = torch.autograd.grad(y, leaves, h[index], retain_graph=True)
        torch.testing.assert_close(tuple(t[index] for t in got), expected)


def hooked(register):
    return lambda layer, seen: getattr(layer.base_layer, register)(
        lambda *_: seen.append(1) or None
    )


HOOKS = {
    name: hooked(f"register_{name}")
    for name in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_the_base_layer_are_called(hook):
    layer, seen = adapted(torch.float32), []
    x = torch.randn(5, 12, requires_grad=True)
    handle = HOOKS[hook](layer, seen)
    y = layer(x)
    assert not is_one(y)
    y.sum().backward()
    assert seen
    handle.remove()
    assert is_one(layer(x))


@pytest.mark.parametrize("name", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_hooks_on_all_modules_see_the_base_layer(name):
    layer, seen = adapted(torch.float32), []
    x = torch.randn(5, 12, requires_grad=True)
    register = getattr(nn.modules.module, f"register_module_{name}")
    handle = register(lambda module, *_: seen.append(module) and None)
    try:
        layer(x).sum().backward()
    finally:
        handle.remove()
    assert layer.base_layer in seen
    assert is_one(layer(x))


def of_its_own(layer, _):
    forward = layer.base_layer.forward
    layer.base_layer.forward = lambda x: forward(x) * 2


def dropped_out(layer, patch):
    forward = nn.Linear.forward
    patch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) * 2)


def function_patched(layer, patch):
    linear = nn.functional.linear
    patch.setattr(nn.functional, "linear", lambda *args: linear(*args) * 2)


def called_otherwise(layer, patch):
    call = nn.Module.__call__

    def twice(self, *args):
        y = call(self, *args)
        return y * 2 if isinstance(self, nn.Linear) else y

    patch.setattr(nn.Module, "__call__", twice)


CHANGED = [of_its_own, dropped_out, function_patched, called_otherwise]


@pytest.mark.parametrize("change", CHANGED)
def test_a_base_layer_whose_call_is_not_torchs_own_is_called(change, monkeypatch):
    layer = adapted(torch.float32)
    x = torch.randn(5, 12, requires_grad=True)
    expected = 2 * layer.base_layer(x) + x @ layer.delta_weight().T
    change(layer, monkeypatch)
    torch.testing.assert_close(layer(x), expected)


def trained(layer):
    layer.base_layer.weight.requires_grad_()


def trained_bias(layer):
    layer.base_layer.bias.requires_grad_()


def normed(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer.base_layer)


def parametrized(layer):
    nn.utils.parametrizations.weight_norm(layer.base_layer)


def tensor_weight(layer):
    weight = layer.base_layer.weight.detach()
    del layer.base_layer.weight
    layer.base_layer.weight = weight


def padded(layer):
    layer.__init__(nn.Linear(10, 7), 4, pad=True)


@pytest.mark.parametrize(
    "change", [trained, trained_bias, normed, parametrized, tensor_weight, padded]
)
def test_other_base_layers_keep_their_own_nodes(change):
    layer = adapted(torch.float32)
    change(layer)
    x = torch.randn(5, layer.in_features, requires_grad=True)
    y = layer(x)
    assert not is_one(y)
    y.sum().backward()
    for parameter in layer.base_layer.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_under_autocast_it_is_one_node_that_keeps_the_input_as_it_is(
    dtype, of_x, wanted, inside, device
):
    layer = adapted(torch.float32, in_features=64)
    layer.c3a_kernel.requires_grad_(wanted[1])
    x = torch.randn(6, 64, dtype=of_x, requires_grad=wanted[0])
    h = torch.randn(6, 8, dtype=dtype)

    def step(layer, **options):
        leaves = [
            t for t, is_wanted in zip((x, layer.c3a_kernel), wanted, strict=True) if is_wanted
        ]
        with torch.autocast(device.type, dtype):
            y = layer(x)
            if inside:
                return y, torch.autograd.grad(y, leaves, h, **options)
        return y, torch.autograd.grad(y, leaves, h, **options)

    with saved_for_backward(layer) as saved:
        y, gradients = step(layer)
    assert y.grad_fn.name() == (ONE if wanted[1] or not x.is_cpu else PREPARED)
    assert y.dtype == dtype
    if wanted[1]:
        copy = layer.base_layer.weight.nbytes // 2 if wanted[0] else 0  # autocast's weight
        assert saved.total == x.nbytes + copy
    narrow = [None if t is None else t.to(dtype).double() for t in layer.base_layer.parameters()]
    matrix = layer.scale * c3a.circulant(layer.c3a_kernel.double())
    expected = x.to(dtype).double() @ narrow[0].T + narrow[1] + x.double() @ matrix.T
    assert relative_error(y.detach(), expected.detach()) < 3 * torch.finfo(dtype).eps
    if wanted[0]:
        exact = h.double() @ (narrow[0] + matrix)
        assert gradients[0].dtype == of_x
        assert relative_error(gradients[0], exact.detach()) < 3 * torch.finfo(dtype).eps
    twin = twin_of(layer)
    twin.c3a_kernel.requires_grad_(wanted[1])
    _, two = step(twin)
    for one, other in zip(gradients, two, strict=True):
        assert relative_error(one, other.double()) < 6 * torch.finfo(dtype).eps
    for one, other in zip(gradients, step(layer, create_graph=wanted[1])[1], strict=True):
        assert relative_error(one, other.double()) < 6 * torch.finfo(dtype).eps


def test_tangents_under_autocast_are_those_of_two_nodes(device):
    layer = adapted(torch.float32, in_features=64)
    x, dot = torch.randn(6, 64, requires_grad=True), torch.randn(6, 64)
    tangents = []
    for of in (layer, twin_of(layer)):
        with forward_ad.dual_level(), torch.autocast(device.type, torch.bfloat16):
            y = of(forward_ad.make_dual(x, dot))
            assert not is_one(y)
            tangents.append(forward_ad.unpack_dual(y).tangent)
    assert torch.equal(*tangents)


def test_autocast_leaves_float64_alone(device):
    layer = adapted(torch.float64)
    with torch.autocast(device.type, torch.bfloat16):
        assert layer(torch.randn(5, 12, dtype=torch.float64, requires_grad=True)).dtype == (
            torch.float64
        )


def test_another_devices_autocast_changes_nothing(device):
    other = "cuda" if device.type == "cpu" else "cpu"
    layer = adapted(torch.float32)
    torch.set_autocast_enabled(other, True)
    try:
        y = layer(torch.randn(5, 12, requires_grad=True))
    finally:
        torch.set_autocast_enabled(other, False)
    assert y.dtype == torch.float32


@pytest.mark.parametrize("mode", ["no_grad", "nothing wanted", "merged", "disabled"])
def test_calls_without_the_node(mode, device):
    layer = adapted(torch.float32)
    x = torch.randn(5, 12, requires_grad=mode != "nothing wanted")
    if mode == "nothing wanted":
        layer.requires_grad_(False)
    if mode == "merged":
        layer.merge()
    layer.enabled = mode != "disabled"
    with torch.no_grad() if mode == "no_grad" else nullcontext():
        y = layer(x)
    assert y.grad_fn is None or not is_one(y)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    layer = adapted()
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    leaves = (x, layer.c3a_kernel)
    layer(x).sin().sum().backward()
    expected = [t.grad.clone() for t in leaves]
    for t in leaves:
        t.grad = None
    checkpoint(lambda x: layer(x).sin(), x, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close([t.grad for t in leaves], expected)


def test_anomaly_mode_and_hooks_on_saved_tensors_see_the_node():
    layer = adapted()
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    packed = []

    def pack(t):
        packed.append(t.shape)
        return t.detach().clone()

    with (
        torch.autograd.set_detect_anomaly(True),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        y = layer(x)
        assert is_one(y)
        (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, expected)
    assert packed == [x.shape, layer.c3a_kernel.shape, layer.base_layer.weight.shape]


def test_a_default_device_is_no_mode_that_sees_functions():
    with torch.device("cpu"):
        layer = adapted(torch.float32)
        assert is_one(layer(torch.randn(3, 12, requires_grad=True)))


def test_a_gradient_of_another_kind_is_refused_by_name():
    layer = adapted(torch.float32)
    x = torch.randn(5, 12, requires_grad=True)
    y = layer(x)
    with pytest.raises(RuntimeError, match="expected grad_output to be a dense tensor"):
        y.backward(torch.ones(5, 8).to_sparse())


@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_out_of_memory_has_torchs_type(moment, monkeypatch):
    layer, x = adapted(torch.float32), torch.randn(3, 12, requires_grad=True)
    y = layer(x)

    def fail():
        raise RuntimeError("c3a.block_circ_conv_add_: CUDA out of memory. Tried to allocate 2 EiB.")

    monkeypatch.setattr(_private, "autocast_disabled", fail)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2 EiB"):
        layer(x) if moment == "forward" else y.sum().backward()
