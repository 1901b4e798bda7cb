"""Autograd, forward mode, torch.func, autocast, compilation: the operators' Python rules."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import c3a
from c3a import operators
from c3a.memory import saved_for_backward
from cases import operands, relative_error

OPS = torch.ops.c3a
SMALL = [((2,), 2, 1, 1), ((3,), 1, 2, 2), ((2, 2), 2, 3, 5), ((3,), 3, 2, 4), ((), 2, 2, 6)]


def added_in_place(base, x, w, scale=1.0):
    OPS.block_circ_conv_add_(base, x, w, scale)
    return base


def pair_in_place(dx, g, x, w, scale=1.0):
    dw = OPS.block_circ_conv_backward_add_(dx, g, x, w, scale)
    return dx, dw


def every_operator(shape, device):
    """Return (function, arguments) of each operator, the arguments being tensors only."""
    x, w, g = (t.requires_grad_() for t in operands(*shape, device=device))
    b, scale = w.shape[-1], 0.7
    weight = torch.randn(g.shape[-1], x.shape[-1], dtype=x.dtype, device=device).requires_grad_()
    bias = torch.randn(g.shape[-1], dtype=x.dtype, device=device).requires_grad_()
    frozen = weight.detach(), bias.detach()
    return {
        "forward": (lambda x, w: OPS.block_circ_conv(x, w, scale), (x, w)),
        "input_grad": (lambda g, w: OPS.block_circ_conv_input_grad(g, w, scale), (g, w)),
        "kernel_grad": (
            lambda g, x: OPS.block_circ_conv_kernel_grad(g, x, b, None, scale),
            (g, x),
        ),
        "backward": (lambda g, x, w: OPS.block_circ_conv_backward(g, x, w, scale), (g, x, w)),
        "add": (lambda base, x, w: OPS.block_circ_conv_add(base, x, w, scale), (g, x, w)),
        "add_": (
            lambda base, x, w: added_in_place(base.clone(), x, w, scale),
            (g, x, w),
        ),
        "linear": (
            lambda x, weight, bias, w: OPS.block_circ_conv_linear(x, weight, bias, w, scale),
            (x, weight, bias, w),
        ),
        "frozen linear": (
            lambda x, w: OPS.block_circ_conv_linear(x, *frozen, w, scale),
            (x, w),
        ),
        "backward_add_": (
            lambda dx, g, x, w: pair_in_place(dx.clone(), g, x, w, scale),
            (x.detach().cos().requires_grad_(), g, x, w),
        ),
    }


OPERATORS = (
    "forward",
    "input_grad",
    "kernel_grad",
    "backward",
    "add",
    "add_",
    "linear",
    "frozen linear",
    "backward_add_",
)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_gradcheck_in_reverse_and_forward_mode_batched_too(shape, name, device):
    function, arguments = every_operator(shape, device)[name]
    assert gradcheck(
        function,
        arguments,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", SMALL[1:4], ids=str)
def test_gradgradcheck_in_reverse_and_forward_over_reverse(shape, name, device):
    function, arguments = every_operator(shape, device)[name]
    assert gradgradcheck(function, arguments, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck_passes_for_every_operator(dtype, device):
    x, w, g = (t.requires_grad_() for t in operands((2, 3), 2, 3, 4, dtype=dtype, device=device))
    weight, bias = torch.randn(8, 12, dtype=dtype, device=device), torch.randn(8, device=device)
    bias = bias.to(dtype)
    samples = [
        (OPS.block_circ_conv_linear, (x, weight, bias, w, 0.5)),
        (OPS.block_circ_conv_linear, (x.detach(), weight, None, w.detach())),
        (OPS.block_circ_conv_linear, (x, weight.clone().requires_grad_(), bias, w)),
        (OPS.block_circ_conv, (x, w)),
        (OPS.block_circ_conv, (x.detach(), w)),
        (OPS.block_circ_conv, (x.detach()[:0], w)),
        (OPS.block_circ_conv_input_grad, (g, w)),
        (OPS.block_circ_conv_kernel_grad, (g, x, 4)),
        (OPS.block_circ_conv_kernel_grad, (g, x, 4, torch.float32)),
        (OPS.block_circ_conv_backward, (g, x, w)),
        (OPS.block_circ_conv, (x, w, 0.5)),
        (OPS.block_circ_conv_input_grad, (g, w, 0.5)),
        (OPS.block_circ_conv_kernel_grad, (g, x, 4, None, 0.5)),
        (OPS.block_circ_conv_backward, (g, x, w, 0.5)),
        (OPS.block_circ_conv_add, (g, x, w, 0.5)),
        (OPS.block_circ_conv_add, (g.detach(), x, w)),
        (OPS.block_circ_conv_add, (g, x.detach(), w.detach())),
        (OPS.block_circ_conv_add_, (g.detach().clone(), x.detach(), w.detach(), 0.5)),
        (OPS.block_circ_conv_add_, (g.detach().clone(), x, w)),
        (
            OPS.block_circ_conv_backward_add_,
            (x.detach().clone(), g.detach(), x.detach(), w.detach(), 0.5),
        ),
        # w has no gradient eagerly and zeros by AOTAutograd, which opcheck sees from torch 2.15 on.
        (OPS.block_circ_conv_backward_add_, (x.detach().clone(), g, x, w.detach())),
    ]
    for op, arguments in samples:
        torch.library.opcheck(op, arguments)


def ours(x, w):
    return c3a.block_circ_conv(x, w, 0.3).sin().sum()


def dense(x, w):
    return (0.3 * x @ c3a.circulant(w).T).sin().sum()


TRANSFORMS = {
    "grad": lambda f, x, w: grad(f, (0, 1))(x, w),
    "grad of grad": lambda f, x, w: grad(lambda x: grad(f)(x, w).square().sum())(x),
    "jvp": lambda f, x, w: jvp(f, (x, w), (w.new_ones(x.shape), w))[1],
    "jvp of grad": lambda f, x, w: jvp(lambda w: grad(f, 1)(x, w), (w,), (w,))[1],
    "grad of jvp": lambda f, x, w: grad(lambda w: jvp(lambda x: f(x, w), (x,), (x,))[1])(w),
    "jacrev": lambda f, x, w: jacrev(f, (0, 1))(x, w),
    "jacfwd": lambda f, x, w: jacfwd(f, (0, 1))(x, w),
    "hessian": lambda f, x, w: hessian(f, (0, 1))(x, w),
    "per-sample grad": lambda f, x, w: vmap(grad(f, (0, 1)), (0, None))(x, w),
    "vmap over x": lambda f, x, w: vmap(f, (1, None))(x, w),
    "vmap over w": lambda f, x, w: vmap(f, (None, 1))(x, torch.stack([w, w.cos()], 1)),
    "vmap over both": lambda f, x, w: vmap(f)(x, torch.stack([w] * x.shape[0])),
    "vmap of vmap": lambda f, x, w: vmap(
        lambda w: vmap(lambda x: f(x, w))(x),
    )(torch.stack([w, w.cos()])),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_equal_those_of_the_dense_definition(name, device):
    x, w, _ = operands((3, 2), 2, 3, 4, device=device)
    transform = TRANSFORMS[name]
    torch.testing.assert_close(transform(ours, x, w), transform(dense, x, w))


def in_batches(tensors, in_dims):
    """Return the tensors with a batch of two where ``in_dims`` names its dimension."""
    pairs = zip(tensors, in_dims, strict=True)
    return [t if dim is None else torch.stack([t, t.cos()], dim) for t, dim in pairs]


def one_of(batched, in_dims, index):
    pairs = zip(batched, in_dims, strict=True)
    return [t if dim is None else t.select(dim, index) for t, dim in pairs]


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (None, 0, 1), (0, None, None), (None, None, 3)])
def test_vmap_of_the_pair_of_gradients(in_dims, device):
    x, w, g = operands((3,), 2, 3, 4, device=device)
    batched = in_batches((g, x, w), in_dims)
    got = vmap(OPS.block_circ_conv_backward, in_dims)(*batched)
    for index in range(2):
        expected = OPS.block_circ_conv_backward(*one_of(batched, in_dims, index))
        torch.testing.assert_close((got[0][index], got[1][index]), expected)


@pytest.mark.parametrize(
    "in_dims", [(0, 0, 0, 0), (1, None, 0, 1), (0, None, None, None), (None, 0, None, 3)]
)
def test_vmap_of_the_pair_onto_a_gradient(in_dims, device):
    x, w, g = operands((3,), 2, 3, 4, device=device)
    batched = in_batches((x.cos(), g, x, w), in_dims)
    copies = [batched[0].clone(), *batched[1:]]
    if in_dims[0] is None:
        with pytest.raises(RuntimeError, match="vmap cannot write a batch into a grad_input that"):
            vmap(OPS.block_circ_conv_backward_add_, in_dims)(*copies)
        return
    dw = vmap(OPS.block_circ_conv_backward_add_, in_dims)(*copies)
    for index in range(2):
        dx, *others = one_of(batched, in_dims, index)
        expected = OPS.block_circ_conv_backward(*others)
        got = copies[0].select(in_dims[0], index)
        torch.testing.assert_close((got, dw[index]), (dx + expected[0], expected[1]))


@pytest.mark.parametrize(
    "in_dims", [(0, 0, 0), (None, 0, 1), (1, None, None), (None, None, 3), (0, None, 1)]
)
def test_vmap_of_the_sum(in_dims, device):
    x, w, base = operands((3,), 2, 3, 4, device=device)
    batched = in_batches((base, x, w), in_dims)
    got = vmap(OPS.block_circ_conv_add, in_dims)(*batched)
    copies = [batched[0].clone(), *batched[1:]]
    if in_dims[0] is None:
        with pytest.raises(RuntimeError, match="vmap cannot write a batch into a base"):
            vmap(added_in_place, in_dims)(*copies)
    else:
        vmap(added_in_place, in_dims)(*copies)
        torch.testing.assert_close(copies[0].movedim(in_dims[0], 0), got)
    for index in range(2):
        expected = OPS.block_circ_conv_add(*one_of(batched, in_dims, index))
        torch.testing.assert_close(got[index], expected)


@pytest.mark.parametrize("dtypes", [(0, 1), (1, 0), (0, 2), (2, 1)])
def test_the_sum_takes_and_gives_every_dtype_its_own(dtypes, device):
    kinds = (torch.float32, torch.bfloat16, torch.float64)
    x, w, base = operands((5,), 2, 3, 8, device=device)
    exact = base + 0.5 * x @ c3a.circulant(w).T
    base, x = base.to(kinds[dtypes[0]]), x.to(kinds[dtypes[1]])
    tensors = [t.requires_grad_() for t in (base, x, w.float())]
    y = OPS.block_circ_conv_add(*tensors, 0.5)
    assert y.dtype == base.dtype
    assert relative_error(y.detach().cpu(), exact.cpu()) < 4e-3
    gradients = torch.autograd.grad(y.sum(), tensors)
    assert [t.dtype for t in gradients] == [t.dtype for t in tensors]


def operators_called(run) -> list[str]:
    run()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        run()
    return [event.name for event in record.events()]


@pytest.mark.parametrize(
    ("wanted", "operator"),
    [
        ((True, False), "c3a::block_circ_conv_input_grad"),
        ((False, True), "c3a::block_circ_conv_kernel_grad"),
        ((True, True), "c3a::block_circ_conv_backward"),
    ],
)
def test_only_the_wanted_gradients_are_computed(wanted, operator, device):
    x, w, _ = operands((3,), 2, 3, 4, device=device)
    x.requires_grad_(wanted[0])
    w.requires_grad_(wanted[1])
    called = operators_called(lambda: c3a.block_circ_conv(x, w).sum().backward())
    gradients = {name for name in called if name.startswith("c3a::block_circ_conv_")}
    assert gradients == {operator}


def test_an_operand_is_saved_only_where_the_other_one_needs_a_gradient(device):
    x, w, _ = operands((64,), 2, 3, 4, device=device)
    for x_needs, w_needs, expected in (
        (True, True, x.nbytes + w.nbytes),
        (True, False, w.nbytes),
        (False, True, x.nbytes),
    ):
        with saved_for_backward() as saved:
            y = c3a.block_circ_conv(
                x.clone().requires_grad_(x_needs), w.clone().requires_grad_(w_needs)
            )
        assert y.requires_grad
        assert saved.total == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_result_its_dtype_and_the_gradients_their_own(dtype, device):
    x, w, g = operands((5,), 2, 3, 8, dtype=torch.float32, device=device)
    x.requires_grad_()
    w.requires_grad_()
    with torch.autocast(device.type, dtype):
        with saved_for_backward() as saved:
            y = c3a.block_circ_conv(x, w)
        dx, dw = torch.autograd.grad(y, (x, w), g.to(dtype), create_graph=True)
        (ddw,) = torch.autograd.grad(dx.square().sum(), w)
    assert y.dtype == dtype
    assert dx.dtype == dw.dtype == ddw.dtype == torch.float32
    assert saved.total == x.nbytes + w.nbytes  # no copy in the lower precision
    assert relative_error(y.detach(), c3a.block_circ_conv(x, w).detach()) < 5e-3


def test_autocast_leaves_float64_alone(device):
    x, w, _ = operands((5,), 2, 3, 8, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert c3a.block_circ_conv(x, w).dtype == torch.float64


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_forward_and_backward(dynamic, device):
    def function(x, w):
        return c3a.block_circ_conv(x.sin(), w * 2).cos()

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (4, 7):
        x, w, g = operands((tokens,), 2, 3, 8, device=device)
        x.requires_grad_()
        w.requires_grad_()
        expected = function(x, w)
        got = compiled(x, w)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got, (x, w), g), torch.autograd.grad(expected, (x, w), g)
        )


def test_exports_with_a_dynamic_batch(device):
    class Module(torch.nn.Module):
        def forward(self, x, w):
            return c3a.block_circ_conv(x, w)

    x, w, _ = operands((4,), 2, 3, 8, device=device)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Module(), (x, w), dynamic_shapes=({0: batch}, None))
    x, w, _ = operands((9,), 2, 3, 8, device=device)
    torch.testing.assert_close(program.module()(x, w), c3a.block_circ_conv(x, w))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("contiguous", [True, False])
def test_writing_in_place_is_counted(mode, contiguous, device):
    x, w, base = operands((4,), 2, 3, 4, device=device)
    w_hat = c3a.prepare(w)
    base = base if contiguous else base.t().contiguous().t()
    before = base._version
    with mode():
        OPS.block_circ_conv_add_(base, x, w)
        OPS.block_circ_conv_prepared_add_(base, x, w_hat, 4)
        OPS.block_circ_conv_backward_add_(x.clone(), base, x, w)
    assert base._version == before + 2
    with mode():
        OPS.block_circ_conv_backward_add_(base, x, base.clone(), w.movedim(0, 1).contiguous())
    assert base._version == before + 3


def test_a_saved_tensor_that_was_written_in_place_is_an_error_not_a_wrong_gradient(device):
    p = torch.ones(2, 4, requires_grad=True, device=device)
    base = torch.ones(2, 4, device=device)
    z = (p * base).sum()
    OPS.block_circ_conv_add_(
        base, torch.randn(2, 4, device=device), torch.randn(1, 1, 4, device=device)
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()


def by_dual_numbers(function, x):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        return forward_ad.unpack_dual(function(dual)).tangent


def by_jvp(function, x):
    return jvp(function, (x,), (torch.ones_like(x),))[1]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("tangent", [by_jvp, by_dual_numbers])
def test_forward_mode_within_a_compiled_function_keeps_the_tangent(tangent, backend, device):
    x, w, _ = operands((3,), 2, 2, 4, device=device)
    w_hat = c3a.prepare(w)
    layer = c3a.C3ALinear(torch.nn.Linear(8, 8, device=device).double(), 4, init="gaussian")
    functions = {
        "operator": lambda x: x + c3a.block_circ_conv(x, w),
        "prepared": lambda x: x + c3a.block_circ_conv_prepared(x, w_hat, 4),
        "layer": layer,
    }
    for function in functions.values():
        torch.compiler.reset()
        run = lambda x, f=function: tangent(f, x)  # noqa: E731
        got = torch.compile(run, backend=backend)(x)
        torch.testing.assert_close(got, run(x))
        assert not torch.equal(got, torch.ones_like(got))


def test_compiled_autograd_takes_graphs_recorded_without_it(device):
    x, w, base = operands((3,), 2, 3, 4, device=device)
    w_hat, w_hat_t = c3a.prepare(w), c3a.prepare(w, transposed=True)
    tensors = [t.requires_grad_() for t in (base, x, w)]

    def function():
        y = OPS.block_circ_conv_add(base, x, w, 0.5) + c3a.block_circ_conv(x, w)
        return y + c3a.block_circ_conv_prepared(x, w_hat, 4, w_hat_t)

    expected = torch.autograd.grad(function().sin().sum(), tensors)
    loss = function().sin().sum()
    torch.compiler.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss.backward()
    torch.testing.assert_close([t.grad for t in tensors], list(expected))


@pytest.mark.parametrize("autocast", [False, True])
def test_backward_on_meta_tensors(autocast):
    layer = c3a.C3ALinear(torch.nn.Linear(12, 8, device="meta"), 4)
    x = torch.empty(5, 12, device="meta", requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer(x).sum().backward()
        c3a.block_circ_conv(x, layer.c3a_kernel).sum().backward()
    assert x.grad.shape == x.shape
    assert layer.c3a_kernel.grad.device.type == "meta"


def test_autocast_is_known_on_every_device_that_torch_has_it_for():
    types = [name for name in dir(torch._C.DispatchKey) if name.startswith("Autocast")]
    assert set(types) <= set(operators.AUTOCAST_KEYS.values())
    for op in ("c3a::block_circ_conv", "c3a::block_circ_conv_prepared"):
        for key in operators.AUTOCAST_KEYS.values():
            assert torch._C._dispatch_has_kernel_for_dispatch_key(op, key)


def test_nodes_of_the_graph_are_called_after_their_operator(device):
    x, w, base = (t.requires_grad_() for t in operands((3,), 2, 3, 4, device=device))
    w_hat, w_hat_t = (c3a.prepare(w.detach(), transposed=t) for t in (False, True))
    results = {
        "BlockCircConvBackward": OPS.block_circ_conv(x, w),
        "BlockCircConvAddBackward": OPS.block_circ_conv_add(base, x, w),
        "BlockCircConvInputGradBackward": OPS.block_circ_conv_input_grad(base, w),
        "BlockCircConvKernelGradBackward": OPS.block_circ_conv_kernel_grad(base, x, 4),
        "BlockCircConvPreparedBackward": OPS.block_circ_conv_prepared(x, w_hat, 4, w_hat_t),
        "BlockCircConvPreparedAddBackward": OPS.block_circ_conv_prepared_add(
            base, x, w_hat, 4, w_hat_t
        ),
    }
    for name, result in results.items():
        assert result.grad_fn.name() == name
    layer = c3a.C3ALinear(torch.nn.Linear(12, 8, device=device), 4)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        layer(x.float()).sum().backward()
    assert "BlockCircConvLinearBackward" in {event.name for event in record.events()}


def test_a_profile_of_a_layer_names_the_operators(device):
    x = torch.randn(3, 12, device=device, requires_grad=True)
    layer = c3a.C3ALinear(torch.nn.Linear(12, 8, device=device), 4)
    hooked = c3a.C3ALinear(torch.nn.Linear(12, 8, device=device), 4)
    hooked.base_layer.register_forward_hook(lambda module, args, y: None)
    padded = c3a.C3ALinear(torch.nn.Linear(12, 7, device=device), 4, pad=True)
    shown = {
        name: {called for called in operators_called(run) if called.startswith("c3a::block")}
        for name, run in {
            "one node": lambda: layer(x).sum().backward(),
            "a base layer's own call": lambda: hooked(x).sum().backward(),
            "padded": lambda: padded(x).sum().backward(),
        }.items()
    }
    assert shown == {
        "one node": {"c3a::block_circ_conv_add_", "c3a::block_circ_conv_backward_add_"},
        "a base layer's own call": {"c3a::block_circ_conv_add_", "c3a::block_circ_conv_backward"},
        "padded": {"c3a::block_circ_conv", "c3a::block_circ_conv_backward"},
    }


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flops_are_counted_for_every_operator(device):
    tokens, m, n, b = 5, 2, 3, 8
    x, w, g = operands((tokens,), m, n, b, device=device)
    w_hat = c3a.prepare(w)
    stack = torch.stack([w] * 7)
    stack_hat, index = c3a.prepare(stack), torch.arange(tokens, device=device)
    weight = torch.ones(m * b, n * b, dtype=x.dtype, device=device)
    product = tokens * m * n * (3 * 8 + 2 * 2)  # three complex bins and two real ones

    def transforms(*tensors):
        return sum(2.5 * t.numel() * 3 for t in tensors)

    expected = {
        lambda: OPS.block_circ_conv(x, w): product + transforms(x, w, g),
        lambda: OPS.block_circ_conv_add(g, x, w): product + transforms(x, w, g) + g.numel(),
        lambda: OPS.block_circ_conv_add_(g, x, w): product + transforms(x, w, g) + g.numel(),
        lambda: OPS.block_circ_conv_input_grad(g, w): product + transforms(x, w, g),
        lambda: OPS.block_circ_conv_kernel_grad(g, x, b): product + transforms(x, w, g),
        lambda: OPS.block_circ_conv_backward(g, x, w): (
            2 * product + transforms(x, w, g) + transforms(x, w)
        ),
        lambda: OPS.block_circ_conv_backward_add_(x, g, x.clone(), w): (
            2 * product + transforms(x, w, g) + transforms(x, w) + x.numel()
        ),
        lambda: OPS.block_circ_conv_linear(x, weight, None, w): (
            2 * tokens * weight.numel() + product + transforms(x, w, g) + g.numel()
        ),
        lambda: OPS.prepare(w): transforms(w),
        lambda: OPS.block_circ_conv_prepared(x, w_hat, b): product + transforms(x, g),
        lambda: OPS.block_circ_conv_prepared_add(g, x, w_hat, b): (
            product + transforms(x, g) + g.numel()
        ),
        lambda: OPS.block_circ_conv_prepared_add_(g, x, w_hat, b): (
            product + transforms(x, g) + g.numel()
        ),
        # As many kernels as there are rows are transformed, or all of them.
        lambda: OPS.block_circ_conv_many(x, stack, index): product + transforms(x, stack[:5], g),
        lambda: OPS.block_circ_conv_many_add_(g, x, stack[:3], index % 3): (
            product + transforms(x, stack[:3], g) + g.numel()
        ),
        lambda: OPS.block_circ_conv_many_input_grad(g, stack, index): (
            product + transforms(x, stack[:5], g)
        ),
        lambda: OPS.block_circ_conv_many_kernel_grad(g, x, index, 7, b): (
            product + transforms(x, stack[:5], g)
        ),
        lambda: OPS.block_circ_conv_many_prepared(x, stack_hat, index, b): (
            product + transforms(x, g)
        ),
        lambda: OPS.block_circ_conv_many_prepared_add_(g, x, stack_hat, index, b): (
            product + transforms(x, g) + g.numel()
        ),
    }
    assert len(expected) == len(operators.OPERATORS)
    for function, flops in expected.items():
        assert counted(function) == flops


def test_batches_and_tangents_are_not_rounded_below_their_results_dtype():
    """Where an operand is bfloat16 and the result float32, as in a call without vmap."""
    x, w, g = operands((3, 5), 2, 3, 16, dtype=torch.float32)
    narrow_x, narrow_g = x.bfloat16(), g.bfloat16()
    matrix = c3a.circulant(w.double())
    exact = g.double() + narrow_x.double() @ matrix.T
    got = vmap(OPS.block_circ_conv_add, (0, 0, None))(g, narrow_x, w)
    assert relative_error(got, exact) < 1e-6
    _, got = jvp(lambda x: OPS.block_circ_conv_add(g, x, w), (narrow_x,), (narrow_x,))
    assert relative_error(got, narrow_x.double() @ matrix.T) < 1e-6
    dx, _ = vmap(OPS.block_circ_conv_backward, (0, 0, None))(narrow_g, x, w)
    assert relative_error(dx, narrow_g.double() @ matrix) < 1e-6
    dx = torch.zeros_like(x)
    vmap(OPS.block_circ_conv_backward_add_, (0, 0, 0, None))(dx, narrow_g, narrow_x, w)
    assert relative_error(dx, narrow_g.double() @ matrix) < 1e-6
    pair_in_place(dx, narrow_g, narrow_x, w.clone().requires_grad_())
    assert relative_error(dx.detach(), 2 * narrow_g.double() @ matrix) < 1e-6


def test_a_gradient_that_does_not_arrive_is_none():
    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, h):
            return None

        @staticmethod
        def jvp(ctx, x_dot):
            return x_dot.clone()

    x, w, base = operands((3,), 2, 3, 4)
    x.requires_grad_()
    for op, arguments in ((OPS.block_circ_conv, ()), (OPS.block_circ_conv_add, (base,))):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            y = Silent.apply(op(*arguments, dual, w)).sum() + dual.sum()
            (dx,) = torch.autograd.grad(y, x)
        assert torch.equal(dx, torch.ones_like(x))
