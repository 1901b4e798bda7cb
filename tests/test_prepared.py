"""Prepared kernels: the operators that take them, and the layer that owns one, never stale."""

import copy
import gc
import io
import itertools
import os
import pickle
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp, vmap
from torch.profiler import ProfilerActivity, profile

import c3a
from c3a.memory import saved_for_backward
from cases import DTYPES, SHAPES, operands, relative_error, rounds_spectra, tolerance

OPS = torch.ops.c3a


# The operators


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_equal_the_definition_and_those_of_the_kernel_itself(shape, dtype, device):
    x, w, g = operands(*shape, dtype=dtype, device=device)
    m, n, b = w.shape
    matrix = 0.5 * c3a.circulant(w.double()).cpu()
    y, dx = x.double().cpu() @ matrix.T, g.double().cpu() @ matrix
    kind = dtype if dtype == torch.bfloat16 else None
    w_hat = c3a.prepare(w, kind, scale=0.5)
    w_hat_t = c3a.prepare(w, kind, transposed=True, scale=0.5)
    assert w_hat.shape[:2] == (m, n)
    assert w_hat_t.shape[:2] == (n, m)
    in_place = g.clone()
    OPS.block_circ_conv_prepared_add_(in_place, x, w_hat, b)
    results = [
        (c3a.block_circ_conv_prepared(x, w_hat, b), y, OPS.block_circ_conv(x, w, 0.5)),
        (
            c3a.block_circ_conv_prepared(g, w_hat_t, b),
            dx,
            OPS.block_circ_conv_input_grad(g, w, 0.5),
        ),
        (
            c3a.block_circ_conv_prepared_add(g, x, w_hat, b),
            g.double().cpu() + y,
            OPS.block_circ_conv_add(g, x, w, 0.5),
        ),
        (in_place, g.double().cpu() + y, OPS.block_circ_conv_add(g, x, w, 0.5)),
    ]
    for got, expected, unprepared in results:
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert relative_error(got.cpu(), expected) < 2 * tolerance(dtype, device)
        if device.type == "cpu":
            assert torch.equal(got, unprepared)


@pytest.mark.parametrize("b", [1, 5, 8, 17, 34, 64])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_of_kernels_is_prepared_as_each_of_them_is(b, transposed, device):
    w = torch.randn(2, 3, 4, 5, b, device=device)
    stack = c3a.prepare(w, transposed=transposed)
    x = torch.randn(7, (4 if transposed else 5) * b, device=device)
    for i in range(2):
        for j in range(3):
            one = c3a.prepare(w[i, j], transposed=transposed)
            assert stack[i, j].shape == one.shape
            got = c3a.block_circ_conv_prepared(x, stack[i, j], b)
            assert torch.equal(got, c3a.block_circ_conv_prepared(x, one, b))
    assert c3a.prepare(w[:0]).shape[:4] == (0, 3, 4, 5)


@pytest.mark.parametrize("b", [8, 17])
def test_a_prepared_kernel_may_begin_anywhere_in_memory(b, device):
    x, w, _ = operands((5,), 2, 3, b, dtype=torch.float32, device=device)
    w_hat = c3a.prepare(w)
    odd = torch.empty(w_hat.numel() + 1, device=device)[1:].view_as(w_hat).copy_(w_hat)
    expected = c3a.block_circ_conv_prepared(x, w_hat, b)
    torch.testing.assert_close(c3a.block_circ_conv_prepared(x, odd, b), expected)


def test_sums_run_in_the_dtype_that_was_prepared(device):
    x, w, _ = operands((9,), 2, 3, 16, device=device)
    exact = c3a.block_circ_conv(x, w)
    w_hat = c3a.prepare(w.float(), torch.float64)
    assert w_hat.dtype == torch.float64
    got = c3a.block_circ_conv_prepared(x, w_hat, 16)
    assert relative_error(got, x @ c3a.circulant(w.float().double()).T) < 1e-13
    assert relative_error(c3a.block_circ_conv_prepared(x.float(), c3a.prepare(w), 16), exact) < 1e-6


@pytest.mark.parametrize("shape", [((2,), 2, 1, 1), ((2, 2), 2, 3, 5), ((3,), 3, 2, 4)], ids=str)
def test_gradients_in_both_modes_and_of_second_order(shape, device):
    x, w, base = operands(*shape, device=device)
    b = w.shape[-1]
    w_hat, w_hat_t = c3a.prepare(w, scale=0.7), c3a.prepare(w, transposed=True, scale=0.7)
    x.requires_grad_()
    base.requires_grad_()

    def product(x):
        return c3a.block_circ_conv_prepared(x, w_hat, b, w_hat_t)

    def total(base, x):
        return c3a.block_circ_conv_prepared_add(base, x, w_hat, b, w_hat_t)

    def in_place(base, x):
        base = base.clone()
        OPS.block_circ_conv_prepared_add_(base, x, w_hat, b, w_hat_t)
        return base

    for function, arguments in ((product, (x,)), (total, (base, x)), (in_place, (base, x))):
        options = {"check_batched_grad": True, "check_forward_ad": True}
        assert gradcheck(function, arguments, **options)
        assert gradgradcheck(lambda *a, f=function: f(*a).sin(), arguments)
    (dx,) = torch.autograd.grad(product(x).sum(), x)
    torch.testing.assert_close(dx, 0.7 * torch.ones_like(base) @ c3a.circulant(w))


def test_what_would_lose_a_gradient_is_refused(device):
    x, w, _ = operands((3,), 2, 3, 4, device=device)
    w_hat = c3a.prepare(w)
    with pytest.raises(RuntimeError, match="x requires a gradient, which needs the transposed"):
        c3a.block_circ_conv_prepared(x.requires_grad_(), w_hat, 4)
    with torch.no_grad():
        c3a.block_circ_conv_prepared(x, w_hat, 4)
    with pytest.raises(RuntimeError, match="takes no gradient and no tangent, and w_hat has"):
        c3a.block_circ_conv_prepared(x, w_hat.clone().requires_grad_(), 4)
    with pytest.raises(RuntimeError, match=r"c3a.prepare: a prepared kernel takes no gradient"):
        c3a.prepare(w.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"c3a.prepare: a prepared kernel takes no gradient"):
        jvp(c3a.prepare, (w,), (w,))
    x = x.detach()
    for function, arguments in (
        (lambda x, w_hat: c3a.block_circ_conv_prepared(x, w_hat, 4), (x, w_hat)),
        (lambda w_hat: c3a.block_circ_conv_prepared(x, w_hat, 4), (w_hat,)),
        (lambda w_hat: c3a.block_circ_conv_prepared(x, c3a.prepare(w), 4, w_hat), (w_hat,)),
    ):
        with pytest.raises(RuntimeError, match="takes no gradient and no tangent, and w_hat has"):
            jvp(function, arguments, arguments)


def test_opcheck_passes_for_the_operators_of_prepared_kernels(device):
    x, w, g = operands((2, 3), 2, 3, 4, dtype=torch.float32, device=device)
    w_hat, w_hat_t = c3a.prepare(w), c3a.prepare(w, transposed=True)
    samples = [
        (OPS.prepare, (w,)),
        (OPS.prepare, (torch.stack([w, w]), torch.float64, True, 0.5)),
        (OPS.block_circ_conv_prepared, (x, w_hat, 4)),
        (OPS.block_circ_conv_prepared, (x[:0], w_hat, 4)),
        (OPS.block_circ_conv_prepared, (x.clone().requires_grad_(), w_hat, 4, w_hat_t)),
        (OPS.block_circ_conv_prepared_add, (g, x, w_hat, 4)),
        (
            OPS.block_circ_conv_prepared_add,
            (g.clone().requires_grad_(), x.clone().requires_grad_(), w_hat, 4, w_hat_t),
        ),
        (OPS.block_circ_conv_prepared_add_, (g.clone(), x, w_hat, 4)),
        (
            OPS.block_circ_conv_prepared_add_,
            (g.clone(), x.clone().requires_grad_(), w_hat, 4, w_hat_t),
        ),
    ]
    for op, arguments in samples:
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("in_dims", [(0, None), (1, None), (None, 0), (0, 0), (None, None)])
def test_vmap_over_activations_and_prepared_kernels(in_dims, device):
    x, w, base = operands((2, 2), 2, 3, 4, device=device)
    kernels = c3a.prepare(torch.stack([w, w.cos()]))
    w_hat = kernels if in_dims[1] == 0 else kernels[0]
    x = x[0] if in_dims[0] is None else x

    def product(x, w_hat):
        return c3a.block_circ_conv_prepared(x, w_hat, 4)

    def total(base, x, w_hat):
        return c3a.block_circ_conv_prepared_add(base, x, w_hat, 4)

    def one(t, dim, index):
        return t if dim is None else t.select(dim, index)

    if any(dim is not None for dim in in_dims):
        got = vmap(product, in_dims)(x, w_hat)
    got_sum = vmap(total, (0, *in_dims))(torch.stack([base[0], base[1]]).expand(2, 2, 8), x, w_hat)
    for index in range(2):
        arguments = (one(x, in_dims[0], index), one(w_hat, in_dims[1], index))
        if any(dim is not None for dim in in_dims):
            torch.testing.assert_close(got[index], product(*arguments))
        torch.testing.assert_close(got_sum[index], total(base[index], *arguments))
    prepared = vmap(lambda w: c3a.prepare(w))(torch.stack([w, w.cos()]))
    assert torch.equal(product(x, prepared[1]), product(x, kernels[1]))


def test_autocast_gives_the_result_its_dtype(device):
    x, w, _ = operands((5,), 2, 3, 8, dtype=torch.float32, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert c3a.block_circ_conv_prepared(x, c3a.prepare(w), 8).dtype == torch.bfloat16


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, device):
    w = operands((1,), 2, 3, 8, device=device)[1]
    w_hat, w_hat_t = c3a.prepare(w), c3a.prepare(w, transposed=True)

    def function(x, w):
        return c3a.block_circ_conv_prepared(x.sin(), w_hat, 8, w_hat_t).cos() + c3a.prepare(w).sum()

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (4, 7):
        x = operands((tokens,), 2, 3, 8, device=device)[0].requires_grad_()
        got, expected = compiled(x, w), function(x, w)
        torch.testing.assert_close(got, expected)
        pairs = (torch.autograd.grad(y.sum(), x) for y in (got, expected))
        torch.testing.assert_close(next(pairs), next(pairs))


@pytest.mark.skipif("C3A_EMULATED" in os.environ, reason="the CPU's own kernels look at it")
def test_a_prepared_kernel_of_other_numbers_is_refused_on_the_cpu():
    x, w = torch.randn(5, 24), torch.randn(2, 3, 8)
    w_hat = c3a.prepare(w)
    message = "expected w_hat as c3a.prepare made it for m = 2, n = 3 and block_size = 8, got other"
    for other in (torch.zeros_like(w_hat), w_hat * 1.0 + 1, w_hat.flip(-1)):
        with pytest.raises(RuntimeError, match=message):
            c3a.block_circ_conv_prepared(x, other, 8)
    copied = pickle.loads(pickle.dumps(w_hat.clone()))
    assert torch.equal(
        c3a.block_circ_conv_prepared(x, copied, 8), c3a.block_circ_conv_prepared(x, w_hat, 8)
    )


PARTS = {
    "rows": lambda w_hat: w_hat[4:],
    "columns": lambda w_hat: w_hat[:, 4:],
    "the transpose": lambda w_hat: w_hat.transpose(0, 1),
    "two in one": lambda w_hat: torch.cat([w_hat, w_hat]),
    "other rows": lambda w_hat: w_hat.flip(0),
}


@pytest.mark.skipif("C3A_EMULATED" in os.environ, reason="the CPU's own kernels look at it")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("b", [16, 17])
def test_a_part_of_a_prepared_kernel_is_refused_on_the_cpu(part, b):
    other = PARTS[part](c3a.prepare(torch.randn(8, 8, b)))
    with pytest.raises(RuntimeError, match="a part of a prepared kernel|size"):
        c3a.block_circ_conv_prepared(torch.randn(3, other.shape[1] * b), other, b)


@pytest.mark.skipif("C3A_EMULATED" in os.environ, reason="the CPU's own kernels look at it")
@pytest.mark.parametrize("b", [8, 17])
def test_a_pair_of_different_origin_is_refused_on_the_cpu(b):
    w = torch.randn(3, 3, b)
    w_hat, w_hat_t = c3a.prepare(w), c3a.prepare(w, transposed=True)
    x = torch.randn(2, 3 * b, requires_grad=True)
    c3a.block_circ_conv_prepared(x, w_hat, b, w_hat_t)
    c3a.block_circ_conv_prepared(x, w_hat_t, b, w_hat)
    others = (
        w_hat,
        c3a.prepare(w, transposed=True, scale=2),
        c3a.prepare(w + 1, transposed=True),
        torch.zeros_like(w_hat),
    )
    if rounds_spectra("cpu", torch.bfloat16) and b == 8:  # 17 is ATen's, which rounds none
        others += (c3a.prepare(w, torch.bfloat16, transposed=True),)
    for other in others:
        with pytest.raises(RuntimeError, match="one dtype and one scale, got tensors of different"):
            c3a.block_circ_conv_prepared(x, w_hat, b, other)


# The layer


def transforms(function) -> int:
    """Return how often the call prepares a kernel."""
    with profile(activities=[ProfilerActivity.CPU]) as run:
        function()
    return sum(event.name == "c3a::prepare" for event in run.events())


def adapted(**options) -> c3a.C3ALinear:
    return c3a.C3ALinear(nn.Linear(24, 16), 8, init="gaussian", **options).eval()


def check(layer, x) -> None:
    with torch.no_grad():
        kernel, dtype = layer.c3a_kernel.detach(), torch.float64
        expected = layer.base_layer(x).to(dtype)
        expected = expected + layer.scale * x.to(dtype) @ c3a.circulant(kernel.to(dtype)).T
        assert relative_error(layer(x), expected) < 1e-6


def test_a_kernel_is_prepared_once_where_no_gradient_is_wanted_for_it():
    layer, x = adapted(), torch.randn(5, 24)
    for mode in (torch.no_grad, torch.inference_mode):
        layer.train().eval()
        with mode():
            assert transforms(lambda: layer(x)) == 1
            assert transforms(lambda: layer(x)) == 0
    layer.scale = 0.5
    with torch.no_grad():
        assert transforms(lambda: layer(x)) == 1
        assert transforms(lambda: layer(x)) == 0
    check(layer, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prepare_does_it_before_the_first_call(dtype):
    layer, x = adapted().to(dtype), torch.randn(5, 24, dtype=dtype)
    assert transforms(layer.prepare) == 1
    with torch.no_grad():
        assert transforms(lambda: layer(x)) == 0


def test_training_prepares_nothing():
    layer, x = adapted(), torch.randn(5, 24)
    assert transforms(lambda: layer(x).sum().backward()) == 0


def test_a_frozen_adapter_is_prepared_for_forward_and_input_gradient():
    layer = adapted().requires_grad_(False)
    x = torch.randn(5, 24, requires_grad=True)

    def step():
        return torch.autograd.grad(layer(x).square().sum(), x)[0]

    assert transforms(step) == 2
    assert transforms(step) == 0
    matrix = layer.base_layer.weight + layer.delta_weight()
    (expected,) = torch.autograd.grad((x @ matrix.T + layer.bias).square().sum(), x)
    assert relative_error(step(), expected) < 1e-6
    with saved_for_backward(layer) as saved:
        layer(x)
    held = layer._prepared._held
    assert saved.total == held.w_hat.nbytes + held.w_hat_transposed.nbytes


CHANGES = {
    "an optimizer's step": lambda w: torch.optim.SGD([w], lr=1.0).step(),
    "an in-place operation": lambda w: w.mul_(2),
    "a write to a view": lambda w: w[0].fill_(3.0),
    "new data": lambda w: setattr(w, "data", torch.randn_like(w)),
    "data of another dtype": lambda w: setattr(w, "data", w.data.bfloat16()),
    "a write to one number's data": lambda w: w.data[1, 2, 3].add_(1),
    "a write through NumPy": lambda w: w.detach().numpy().__setitem__((0, 0, 1), 100),
    "an exchange with another tensor": lambda w: torch.utils.swap_tensors(
        w, nn.Parameter(torch.randn_like(w))
    ),
    "a negative view": lambda w: setattr(w, "data", torch._neg_view(w.data)),
    "not a number": lambda w: w.data.__setitem__((0, 0, 0), float("nan")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_prepared_kernel_is_never_stale(change):
    layer, x = adapted(), torch.randn(5, 24)
    layer.c3a_kernel.grad = torch.ones_like(layer.c3a_kernel)
    check(layer, x)
    with torch.no_grad():
        CHANGES[change](layer.c3a_kernel)
        if change == "not a number":
            assert layer(x).isnan().any()
        else:
            check(layer, x)


def test_another_parameter_and_a_loaded_one_are_seen():
    layer, x = adapted(), torch.randn(5, 24)
    check(layer, x)
    layer.c3a_kernel = nn.Parameter(torch.randn(2, 3, 8))
    check(layer, x)
    layer.load_state_dict(adapted().state_dict())
    check(layer, x)


def test_a_kernel_made_in_inference_mode_has_no_version_and_is_compared_all_the_same():
    with torch.inference_mode():
        layer, x = adapted(), torch.randn(5, 24)
        before = layer(x)
        layer.c3a_kernel.zero_()
        torch.testing.assert_close(layer(x), layer.base_layer(x))
        assert not torch.equal(before, layer(x))


DROPS = {
    "train": lambda layer: layer.train(),
    "load_state_dict": lambda layer: layer.load_state_dict(layer.state_dict()),
    "to": lambda layer: layer.to(torch.float64),
}


@pytest.mark.parametrize("drop", DROPS)
def test_what_was_prepared_is_freed(drop):
    layer = adapted()
    layer.prepare()
    kept = weakref.ref(layer._prepared._held.w_hat)
    DROPS[drop](layer)
    gc.collect()
    assert kept() is None


def test_it_goes_with_the_layer():
    layer = adapted()
    layer.prepare()
    kept = weakref.ref(layer._prepared._held.w_hat)
    del layer
    gc.collect()
    assert kept() is None


def test_copies_and_pickles_of_a_layer_start_without():
    layer, x = adapted(), torch.randn(5, 24)
    layer.prepare()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert twin._prepared._held is None
        check(twin, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(24, 16), (23, 15)])
def test_results_have_the_same_bits_prepared_or_not(dtype, sizes):
    layer = c3a.C3ALinear(nn.Linear(*sizes, dtype=dtype), 8, init="gaussian", pad=True)
    x = torch.randn(5, sizes[0], dtype=dtype)
    with_graph = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), with_graph)


def test_many_threads_prepare_once():
    layer, x = adapted(), torch.randn(5, 24)
    barrier, results = threading.Barrier(8), []

    def run():
        barrier.wait()
        with torch.no_grad():
            results.append(layer(x))

    def all_at_once():
        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    made = []
    prepare = c3a.prepared._prepared
    c3a.prepared._prepared = lambda *a, **k: made.append(1) or prepare(*a, **k)
    try:
        all_at_once()
    finally:
        c3a.prepared._prepared = prepare
    assert len(made) == 1
    assert len(results) == 8
    assert all(torch.equal(results[0], result) for result in results)


def test_kernels_are_exchanged_while_others_infer_and_differentiate():
    """No lock keeps the writer out: every result is that of one of the kernels."""
    layer = c3a.C3ALinear(nn.Linear(64, 32), 16, init="gaussian", scale=0.5).requires_grad_(False)
    kernels = [torch.randn_like(layer.c3a_kernel) for _ in range(3)]
    layer.c3a_kernel.data = kernels[0].clone()
    weight, bias = layer.base_layer.weight.double(), layer.base_layer.bias.double()
    matrices = [weight + 0.5 * c3a.circulant(kernel.double()) for kernel in kernels]
    end, wrong = time.monotonic() + 3, []

    def infer():
        while time.monotonic() < end:
            x = torch.randn(2, 64)
            with torch.no_grad():
                y = layer(x)
            exact = [x.double() @ matrix.T + bias for matrix in matrices]
            if min(relative_error(y, one) for one in exact) > 1e-5:
                wrong.append("a result")

    def differentiate():
        while time.monotonic() < end:
            x = torch.randn(2, 64, requires_grad=True)
            y = layer(x)
            (dx,) = torch.autograd.grad(y.sum(), x)
            y, given = y.detach(), x.detach().double()
            errors = [
                relative_error(y, given @ matrix.T + bias)
                + relative_error(dx, matrix.sum(0).expand(2, 64))
                for matrix in matrices
            ]
            if min(errors) > 1e-5:
                wrong.append("a gradient, or one of another kernel than its result")

    def write():
        for turn in itertools.count():
            if time.monotonic() > end:
                return
            kernel = kernels[turn % 3].clone()
            if turn % 2:
                layer.c3a_kernel = nn.Parameter(kernel, requires_grad=False)
            else:
                layer.c3a_kernel.data = kernel
            time.sleep(0.001)

    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(job) for job in (infer, infer, differentiate, differentiate, write)]
    for job in jobs:
        job.result()
    assert not wrong


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_a_compiled_layer_sees_a_changed_kernel(mode):
    layer = adapted().requires_grad_(False)
    x = torch.randn(2, 24)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with getattr(torch, mode)():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), layer(x))
            layer.c3a_kernel.add_(1)


def test_a_traced_graph_calls_the_operator_that_takes_the_kernel():
    layer, x = adapted(), torch.randn(5, 24)
    check(layer, x)
    with torch.no_grad():
        graph = torch.fx.experimental.proxy_tensor.make_fx(layer)(x).graph
    called = {node.target for node in graph.nodes if node.op == "call_function"}
    assert OPS.block_circ_conv_add.default in called
    assert not any("prepare" in str(target) for target in called)


def test_off_the_cpu_only_an_explicit_call_prepares_and_the_version_drops_it():
    layer = c3a.C3ALinear(nn.Linear(24, 16, device="meta"), 8).eval()
    x = torch.randn(5, 24, device="meta")
    with torch.no_grad():
        assert transforms(lambda: layer(x)) == 0
        layer.prepare()
        held = layer._prepared._held
        layer(x)
        assert layer._prepared._held is held
        layer.c3a_kernel.add_(1)
        layer(x)
        assert layer._prepared._held is None
    with torch.inference_mode():
        layer = c3a.C3ALinear(nn.Linear(24, 16, device="meta"), 8).eval()
        with pytest.raises(RuntimeError, match="expected a kernel made outside inference mode"):
            layer.prepare()
