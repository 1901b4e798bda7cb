"""Many adapters in one batch: each row of the activations chooses its kernel of a stack."""

import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.profiler import ProfilerActivity, profile

import c3a
from c3a.memory import saved_for_backward
from cases import DTYPES, TOLERANCE, relative_error, tolerance

OPS = torch.ops.c3a
# (leading sizes, the first of them rows; m, n, b; adapters): lanes of tokens and of blocks, single
# tokens, one and two dimensions of them, block sizes that ATen computes, no row and no token.
SHAPES = [
    ((5,), 3, 2, 8, 4),
    ((64,), 6, 6, 16, 64),
    ((7, 5), 2, 3, 6, 3),
    ((4, 2, 3), 1, 4, 15, 9),
    ((6, 20), 16, 17, 4, 2),
    ((3, 33), 2, 2, 64, 5),
    ((9, 2), 2, 1, 101, 4),
    ((20,), 1, 2, 17, 3),
    ((2, 40), 1, 1, 1, 1),
    ((0, 3), 2, 3, 4, 2),
    ((3, 0), 2, 3, 4, 2),
]


def stacked(leading, m, n, b, adapters, dtype=torch.float64, device="cpu"):
    """Return random (x, w, g, index): adapters in any order, some again, some never, and none."""
    generator = torch.Generator().manual_seed(hash((leading, m, n, b)) % 2**31)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    index = torch.randint(-1, adapters, (leading[0],), generator=generator)
    if leading[0] > 2:
        index[1] = index[2] = max(index[2], 0)  # neighbours
        index[0] = -1
    w = normal(adapters, m, n, b)
    return normal(*leading, n * b), w, normal(*leading, m * b), index.to(device)


def by_row(function, like, index, *operands):
    """Apply a function to each row that has a kernel; other rows are zeros."""
    rows = [
        function(int(k), *(t[r] for t in operands)) if k >= 0 else torch.zeros_like(like[r])
        for r, k in enumerate(index)
    ]
    return torch.stack(rows) if rows else torch.zeros_like(like)


def dense_results(x, w, g, index):
    """y, dx and dw by the definition, in float64."""
    x, w, g = (t.detach().double().cpu() for t in (x, w, g))
    w = w.clone().requires_grad_()
    y = by_row(lambda k, x: x @ c3a.circulant(w[k]).T, g, index, x)
    dx = by_row(lambda k, g: g @ c3a.circulant(w[k]), x, index, g)
    dw = torch.autograd.grad(y, w, g)[0] if y.requires_grad else torch.zeros_like(w)
    return y.detach(), dx.detach(), dw


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_product_equals_the_dense_definition(shape, dtype, device):
    x, w, g, index = stacked(*shape, dtype=dtype, device=device)
    y, dx, dw = dense_results(x, w, g, index)
    adapters, *_, b = w.shape
    w_hat, w_hat_t = (c3a.prepare(w, transposed=transposed) for transposed in (False, True))
    if dtype == torch.bfloat16:
        w_hat = c3a.prepare(w, dtype)
        w_hat_t = c3a.prepare(w, dtype, transposed=True)
    onto, onto_prepared = g.clone(), g.clone()
    OPS.block_circ_conv_many_add_(onto, x, w, index)
    OPS.block_circ_conv_many_prepared_add_(onto_prepared, x, w_hat, index, b)
    results = [
        (OPS.block_circ_conv_many(x, w, index), y),
        (OPS.block_circ_conv_many_input_grad(g, w, index), dx),
        (OPS.block_circ_conv_many_kernel_grad(g, x, index, adapters, b), dw),
        (OPS.block_circ_conv_many_prepared(x, w_hat, index, b, w_hat_t), y),
        (OPS.block_circ_conv_many_prepared(g, w_hat_t, index, b), dx),
        (onto, g.double().cpu() + y),
        (onto_prepared, g.double().cpu() + y),
    ]
    for got, expected in results:
        assert got.dtype == dtype
        assert got.shape == expected.shape
        assert got.is_contiguous()
        assert relative_error(got.cpu(), expected.cpu()) < tolerance(dtype, device)
    none = index < 0
    assert not OPS.block_circ_conv_many(x, w, index)[none].any()
    assert torch.equal(onto[none], g[none])
    never = [k for k in range(adapters) if k not in index]
    assert not results[2][0][never].any()


@pytest.mark.skipif("C3A_EMULATED" in os.environ, reason="of the CPU's kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] not in (101, 17)], ids=str)
def test_a_row_has_the_bits_that_its_adapter_gives_alone(shape, dtype):
    x, w, g, index = stacked(*shape, dtype=dtype)
    w_hat = c3a.prepare(w, torch.bfloat16 if dtype == torch.bfloat16 else None)
    y = OPS.block_circ_conv_many(x, w, index, 0.5)
    dx = OPS.block_circ_conv_many_input_grad(g, w, index, 0.5)
    prepared = OPS.block_circ_conv_many_prepared(x, w_hat, index, w.shape[-1])
    onto = g.clone()
    OPS.block_circ_conv_many_add_(onto, x, w, index, 0.5)
    for r, k in enumerate(index.tolist()):
        if k < 0:
            continue
        assert torch.equal(y[r], OPS.block_circ_conv(x[r], w[k], 0.5))
        assert torch.equal(dx[r], OPS.block_circ_conv_input_grad(g[r], w[k], 0.5))
        assert torch.equal(prepared[r], OPS.block_circ_conv(x[r], w[k]))
        assert torch.equal(onto[r], OPS.block_circ_conv_add(g[r], x[r], w[k], 0.5))


@pytest.mark.skipif("C3A_EMULATED" in os.environ, reason="of the CPU's kernels")
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4], ((150, 20), 3, 3, 32, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(shape, dtype):
    x, w, g, index = stacked(*shape, dtype=dtype)
    adapters, *_, b = w.shape

    def results():
        return (
            OPS.block_circ_conv_many(x, w, index),
            OPS.block_circ_conv_many_input_grad(g, w, index),
            OPS.block_circ_conv_many_kernel_grad(g, x, index, adapters, b),
        )

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = results()
        for count in (2, 3, 8):
            torch.set_num_threads(count)
            for got, one in zip(results(), expected, strict=True):
                assert torch.equal(got, one)
    finally:
        torch.set_num_threads(threads)


def test_a_kernels_gradient_does_not_depend_on_where_its_rows_are(device):
    x, _, g, _ = stacked((12, 30), 2, 3, 8, 3, device=device)
    index = torch.tensor([0, 1, 2] * 4, device=device)
    expected = OPS.block_circ_conv_many_kernel_grad(g, x, index, 3, 8)
    order = index.argsort(stable=True)
    got = OPS.block_circ_conv_many_kernel_grad(g[order], x[order], index[order], 3, 8)
    torch.testing.assert_close(got, expected)
    for k in range(3):
        one = OPS.block_circ_conv_kernel_grad(g[k::3], x[k::3], 8)
        torch.testing.assert_close(expected[k], one)


def test_what_is_not_finite_stays_in_its_row_and_kernel(device):
    x, w, g, _ = stacked((6, 3), 2, 3, 8, 4, device=device)
    index = torch.tensor([0, 1, -1, 2, 1, 3], device=device)
    w_hat = c3a.prepare(w)
    before = OPS.block_circ_conv_many(x, w, index)
    dw = OPS.block_circ_conv_many_kernel_grad(g, x, index, 4, 8)
    x[2], x[3] = float("nan"), float("inf")
    w[3], w_hat[3] = float("nan"), 0
    rest = [0, 1, 2, 4]
    assert torch.equal(OPS.block_circ_conv_many(x, w, index)[rest], before[rest])
    index[5] = -1
    prepared = OPS.block_circ_conv_many_prepared(x, w_hat, index, 8)  # the rest may be anything
    torch.testing.assert_close(prepared[rest], before[rest])
    got = OPS.block_circ_conv_many_kernel_grad(g, x, index, 4, 8)
    torch.testing.assert_close(got[:2], dw[:2])
    assert not got[2].isfinite().all()


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w_dtype", DTYPES, ids=str)
def test_dtypes_may_differ_and_results_follow_their_own_operand(x_dtype, w_dtype, device):
    x, w, g, index = stacked((9, 2), 2, 3, 12, 4, device=device)
    x, w, g = x.to(x_dtype), w.to(w_dtype), g.to(x_dtype)
    expected = dense_results(x, w, g, index)
    x.requires_grad_()
    w.requires_grad_()
    y = c3a.block_circ_conv_many(x, w, index)
    results = (y, *torch.autograd.grad(y, (x, w), g))
    assert [t.dtype for t in results] == [x_dtype, x_dtype, w_dtype]
    activations = () if w_dtype == torch.float64 else (x_dtype,)
    for got, exact in zip(results, expected, strict=True):
        limit = tolerance(got.dtype, device, *activations)
        assert relative_error(got.detach().cpu(), exact) < limit


@pytest.mark.parametrize("dtypes", [(0, 1), (1, 0), (0, 2), (2, 1)])
def test_the_sum_in_place_keeps_the_dtype_of_its_base(dtypes, device):
    kinds = (torch.float32, torch.bfloat16, torch.float64)
    x, w, base, index = stacked((5, 3), 2, 3, 8, 4, device=device)
    base, x = base.to(kinds[dtypes[0]]), x.to(kinds[dtypes[1]])
    y, _, _ = dense_results(x, w, base, index)
    for needs in (False, True):
        onto = base.clone()
        OPS.block_circ_conv_many_add_(onto, x, w.float().requires_grad_(needs), index, 0.5)
        assert onto.dtype == base.dtype
        error = relative_error(onto.detach().cpu(), base.double().cpu() + 0.5 * y)
        assert error < tolerance(torch.bfloat16, device, x.dtype, base.dtype)


@pytest.mark.parametrize("b", [8, 17])  # kernels of our own on the CPU, and ATen's transforms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_without_a_kernel_keeps_every_bit(dtype, b, device):
    w = torch.randn(2, 3, 2, b, dtype=dtype, device=device)
    index = torch.tensor([-1, 1, -1], device=device)
    x = torch.randn(3, 5, 2 * b, dtype=dtype, device=device)
    smallest = torch.finfo(dtype).smallest_normal / 4
    row = torch.tensor([0.0, -0.0, smallest, -smallest, torch.inf, torch.nan, 1.0, -1.0])
    before = row.to(device, dtype).repeat(15 * 3 * b)[: 15 * 3 * b].view(3, 5, 3 * b)
    w_hat = c3a.prepare(w)
    onto, onto_prepared = before.clone(), before.clone()
    OPS.block_circ_conv_many_add_(onto, x, w, index)
    OPS.block_circ_conv_many_prepared_add_(onto_prepared, x, w_hat, index, b)
    none, bits = index < 0, {8: torch.int64, 4: torch.int32, 2: torch.int16}[before.element_size()]
    for got in (onto, onto_prepared):
        assert torch.equal(got[none].view(bits), before[none].view(bits))
        assert not torch.equal(got[~none], before[~none])


def test_layout_and_memory_of_the_operands_do_not_matter(device):
    x, w, g, index = stacked((6, 4), 2, 3, 8, 3, device=device)
    y = OPS.block_circ_conv_many(x, w, index)

    def strided(t):
        return torch.stack([t, t], dim=-1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1)

    twice = torch.stack([index, index], dim=-1)[:, 0]
    assert not twice.is_contiguous()
    assert torch.equal(OPS.block_circ_conv_many(strided(x), strided(w), twice), y)
    w_hat = strided(c3a.prepare(w))
    torch.testing.assert_close(OPS.block_circ_conv_many_prepared(x, w_hat, twice, 8), y)
    rows = torch.zeros(6, 4, 32, device=device, dtype=g.dtype)
    rows[..., :16] = g
    OPS.block_circ_conv_many_add_(rows[..., :16], x, w, index)
    torch.testing.assert_close(rows[..., :16], g + y)
    assert not rows[..., 16:].any()
    square = w[:, :, :2].contiguous()
    expected = g + OPS.block_circ_conv_many(g, square, index)
    OPS.block_circ_conv_many_add_(g, g, square, index)
    torch.testing.assert_close(g, expected)


# Rules


def every_operator(device):
    """Return (function, arguments) of each operator that differentiates, all tensors."""
    x, w, g, index = stacked((4, 2), 2, 3, 4, 3, device=device)
    w_hat, w_hat_t = c3a.prepare(w), c3a.prepare(w, transposed=True)
    x, w, g = (t.requires_grad_() for t in (x, w, g))

    def add_(base, x, w):
        base = base.clone()
        OPS.block_circ_conv_many_add_(base, x, w, index, 0.7)
        return base

    def prepared_add_(base, x):
        base = base.clone()
        OPS.block_circ_conv_many_prepared_add_(base, x, w_hat, index, 4, w_hat_t)
        return base

    return {
        "forward": (lambda x, w: OPS.block_circ_conv_many(x, w, index, 0.7), (x, w)),
        "input_grad": (
            lambda g, w: OPS.block_circ_conv_many_input_grad(g, w, index, 0.7),
            (g, w),
        ),
        "kernel_grad": (
            lambda g, x: OPS.block_circ_conv_many_kernel_grad(g, x, index, 3, 4, None, 0.7),
            (g, x),
        ),
        "add_": (add_, (g, x, w)),
        "prepared": (
            lambda x: OPS.block_circ_conv_many_prepared(x, w_hat, index, 4, w_hat_t),
            (x,),
        ),
        "prepared_add_": (prepared_add_, (g, x)),
    }


NAMES = ("forward", "input_grad", "kernel_grad", "add_", "prepared", "prepared_add_")


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_both_orders_and_modes_batched_too(name, device):
    function, arguments = every_operator(device)[name]
    assert gradcheck(
        function,
        arguments,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=True,
    )
    assert gradgradcheck(function, arguments, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck_passes_for_every_operator(dtype, device):
    x, w, g, index = stacked((4, 3), 2, 3, 4, 3, dtype=dtype, device=device)
    w_hat, w_hat_t = c3a.prepare(w), c3a.prepare(w, transposed=True)
    x, w, g = (t.requires_grad_() for t in (x, w, g))
    base, plain = g.detach().clone(), x.detach()
    samples = [
        (OPS.block_circ_conv_many, (x, w, index)),
        (OPS.block_circ_conv_many, (plain, w, index, 0.5)),
        (OPS.block_circ_conv_many, (x[:0].detach(), w, index[:0])),
        (OPS.block_circ_conv_many_add_, (base.clone(), plain, w.detach(), index, 0.5)),
        (OPS.block_circ_conv_many_add_, (base.clone(), x, w, index)),
        (OPS.block_circ_conv_many_input_grad, (g, w, index, 0.5)),
        (OPS.block_circ_conv_many_kernel_grad, (g, x, index, 3, 4)),
        (OPS.block_circ_conv_many_kernel_grad, (g, x, index, 3, 4, torch.float32, 0.5)),
        (OPS.block_circ_conv_many_prepared, (x, w_hat, index, 4, w_hat_t)),
        (OPS.block_circ_conv_many_prepared, (plain, w_hat, index, 4)),
        (OPS.block_circ_conv_many_prepared_add_, (base.clone(), plain, w_hat, index, 4)),
        (OPS.block_circ_conv_many_prepared_add_, (base.clone(), x, w_hat, index, 4, w_hat_t)),
    ]
    for op, arguments in samples:
        torch.library.opcheck(op, arguments)


def test_only_the_wanted_gradients_are_computed_and_their_operands_saved(device):
    x, w, _, index = stacked((8, 4), 2, 3, 4, 3, device=device)
    for needs, size in (((True, False), w.nbytes), ((False, True), x.nbytes)):
        operands = [t.clone().requires_grad_(need) for t, need in zip((x, w), needs, strict=True)]
        with saved_for_backward() as saved:
            y = c3a.block_circ_conv_many(*operands, index)
        assert saved.total == size + index.nbytes
        with profile(activities=[ProfilerActivity.CPU]) as record:
            y.sum().backward()
        called = {e.name for e in record.events() if e.name.startswith("c3a::")}
        wanted = "input_grad" if needs[0] else "kernel_grad"
        assert called == {f"c3a::block_circ_conv_many_{wanted}"}
        assert y.grad_fn.name() == "BlockCircConvManyBackward"


def test_a_prepared_kernel_takes_no_gradient(device):
    x, w, g, index = stacked((4,), 2, 3, 4, 3, device=device)
    w_hat = c3a.prepare(w)
    with pytest.raises(RuntimeError, match="takes no gradient .* call c3a.block_circ_conv_many"):
        OPS.block_circ_conv_many_prepared(x, w_hat.requires_grad_(), index, 4)
    with pytest.raises(RuntimeError, match="give w_hat_transposed = c3a.prepare"):
        OPS.block_circ_conv_many_prepared_add_(g, x.requires_grad_(), w_hat.detach(), index, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_result_its_dtype_and_the_gradients_their_own(dtype, device):
    x, w, g, index = stacked((5,), 2, 3, 8, 4, dtype=torch.float32, device=device)
    w_hat, x, w = c3a.prepare(w), x.requires_grad_(), w.requires_grad_()
    with torch.autocast(device.type, dtype):
        y = c3a.block_circ_conv_many(x, w, index)
        prepared = c3a.block_circ_conv_many_prepared(x.detach(), w_hat, index, 8)
        gradients = torch.autograd.grad(y, (x, w), g.to(dtype))
    assert y.dtype == prepared.dtype == dtype
    assert {t.dtype for t in gradients} == {torch.float32}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_forward_and_backward(dynamic, device):
    def function(base, x, w, index):
        y = c3a.block_circ_conv_many(x.sin(), w * 2, index)
        total = base.cos()
        OPS.block_circ_conv_many_add_(total, x, w, index, 0.5)
        return y * total

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 7):
        x, w, g, index = stacked((rows, 3), 2, 3, 8, 3, device=device)
        arguments = [t.requires_grad_() for t in (g, x, w)]
        expected = function(*arguments, index)
        got = compiled(*arguments, index)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got.sum(), arguments),
            torch.autograd.grad(expected.sum(), arguments),
        )


@pytest.mark.parametrize("op", ["many", "many_input_grad", "many_kernel_grad", "many_prepared"])
@pytest.mark.parametrize(
    "batched", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)]
)
def test_every_batch_is_one_call(op, batched, device):
    """Along dimension 0 of the first operand, -1 of the second, 0 of the index."""
    entries = [stacked((4, 2), 2, 3, 4, 3, device=device) for _ in range(3)]
    index_of = [torch.tensor(i, device=device) for i in ([0, 2, -1, 0], [1, 1, 0, -1], [-1] * 4)]
    xs, ws, gs, _ = zip(*entries, strict=True)
    ws = [w * (i + 1) for i, w in enumerate(ws)]
    firsts, seconds = {
        "many": (xs, ws),
        "many_input_grad": (gs, ws),
        "many_kernel_grad": (gs, xs),
        "many_prepared": (xs, [c3a.prepare(w) for w in ws]),
    }[op]
    rest = {"many_kernel_grad": (3, 4), "many_prepared": (4,)}.get(op, ())

    def run(a, b, index):
        y = getattr(OPS, f"block_circ_conv_{op}")(a, b, index, *rest)
        return y

    groups = (firsts, seconds, index_of)
    in_dims = [dim if on else None for dim, on in zip((0, -1, 0), batched, strict=True)]
    arguments = [
        group[0] if dim is None else torch.stack(list(group), dim)
        for group, dim in zip(groups, in_dims, strict=True)
    ]
    with profile(activities=[ProfilerActivity.CPU]) as record:
        got = vmap(run, tuple(in_dims))(*arguments)
    calls = [e.name for e in record.events() if e.name == f"c3a::block_circ_conv_{op}"]
    assert len(calls) <= 2  # the batch's, and the one that it becomes
    for i in range(3):
        one = [group[i if on else 0] for group, on in zip(groups, batched, strict=True)]
        torch.testing.assert_close(got[i], run(*one))


def test_a_batch_may_be_written_in_place(device):
    x, w, g, index = stacked((4, 2), 2, 3, 4, 3, device=device)
    base = torch.stack([g, g.cos()])

    def add_(base, scaled):
        OPS.block_circ_conv_many_add_(base, x, scaled, index)
        return base

    expected = [OPS.block_circ_conv_many(x, k * w, index) + t for k, t in zip((1, 2), base)]  # noqa: B905
    vmap(add_)(base, torch.stack([w, 2 * w]))
    torch.testing.assert_close(base, torch.stack(expected))


def test_gradients_of_each_sample_are_one_call_of_the_stacks_operator(device):
    layer = c3a.C3ALinear(torch.nn.Linear(12, 8, device=device).double(), 4, init="gaussian")
    frozen = dict(layer.named_buffers()) | {
        name: p.detach() for name, p in layer.named_parameters() if "kernel" not in name
    }
    x = torch.randn(16, 5, 12, dtype=torch.float64, device=device)

    def loss(kernel, x):
        return functional_call(layer, {**frozen, "c3a_kernel": kernel}, x).sin().sum()

    kernel = layer.c3a_kernel.detach()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        got = vmap(grad(loss), (None, 0))(kernel, x)
    called = [e.name for e in record.events() if e.name.startswith("c3a::")]
    assert 1 <= called.count("c3a::block_circ_conv_many_kernel_grad") <= 2
    for i in range(16):
        torch.testing.assert_close(got[i], grad(loss)(kernel, x[i]))


@pytest.mark.parametrize("order", [1, 2])
def test_batches_of_activations_and_kernels_at_once_are_one_call(order, device):
    x, w, g, _ = stacked((6, 3), 2, 3, 4, 6, device=device)

    def ours(x, w):
        return c3a.block_circ_conv(x, w, 0.3).sin().sum()

    def dense(x, w):
        return (0.3 * x @ c3a.circulant(w).T).sin().sum()

    transform = grad if order == 1 else hessian
    for argnums in (0, 1):
        got = vmap(transform(ours, argnums))(x, w)
        torch.testing.assert_close(got, vmap(transform(dense, argnums))(x, w))
    tangent = jvp(vmap(ours), (x, w), (x.cos(), w.cos()))
    torch.testing.assert_close(tangent, jvp(vmap(dense), (x, w), (x.cos(), w.cos())))
    pair = vmap(OPS.block_circ_conv_backward)(g, x, w)
    for i in range(6):
        one = OPS.block_circ_conv_backward(g[i], x[i], w[i])
        torch.testing.assert_close([t[i] for t in pair], list(one))


# What is refused


def test_indices_out_of_range_are_named(device):
    x, w, g, _ = stacked((3,), 2, 3, 4, 2)
    w_hat = c3a.prepare(w)
    calls = {
        "": lambda i: OPS.block_circ_conv_many(x, w, i),
        "_add_": lambda i: OPS.block_circ_conv_many_add_(g, x, w, i),
        "_input_grad": lambda i: OPS.block_circ_conv_many_input_grad(g, w, i),
        "_kernel_grad": lambda i: OPS.block_circ_conv_many_kernel_grad(g, x, i, 2, 4),
        "_prepared": lambda i: OPS.block_circ_conv_many_prepared(x, w_hat, i, 4),
        "_prepared_add_": lambda i: OPS.block_circ_conv_many_prepared_add_(g, x, w_hat, i, 4),
    }
    before = g.clone()
    for name, call in calls.items():
        for wrong in (2, -2, 2**40):
            with pytest.raises(RuntimeError) as raised:
                call(torch.tensor([0, wrong, 1]))
            said = str(raised.value).splitlines()[0]
            rule = "expected -1 <= index < 2, the number of adapters, got index[1]"
            assert said == f"c3a.block_circ_conv_many{name}: {rule} = {wrong}"
    assert torch.equal(g, before)


@pytest.mark.skipif("C3A_EMULATED" in os.environ, reason="of the CPU's prepared kernels")
def test_only_the_kernels_that_are_chosen_must_be_prepared():
    x, w, _, _ = stacked((3,), 2, 3, 4, 3)
    w_hat, w_hat_t = c3a.prepare(w), c3a.prepare(w, transposed=True)
    together = torch.stack([c3a.prepare(one) for one in w])
    index = torch.tensor([2, 0, -1])
    expected = OPS.block_circ_conv_many_prepared(x, w_hat, index, 4)
    assert torch.equal(OPS.block_circ_conv_many_prepared(x, together, index, 4), expected)
    w_hat[1] = 7
    assert torch.equal(OPS.block_circ_conv_many_prepared(x, w_hat, index, 4), expected)
    with pytest.raises(RuntimeError, match="expected w_hat as c3a.prepare made it for m = 2, n"):
        OPS.block_circ_conv_many_prepared(x, w_hat, torch.tensor([0, 1, 2]), 4)
    with pytest.raises(RuntimeError, match="got tensors of different origin"):
        OPS.block_circ_conv_many_prepared(x, w_hat, index, 4, w_hat_t.flip(0))


@pytest.mark.skipif("C3A_EMULATED" in os.environ, reason="of the CPU's instruction sets")
def test_by_atens_transforms_the_results_are_the_definitions_too():
    code = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_many, torch
for shape in test_many.SHAPES:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        test_many.test_every_product_equals_the_dense_definition(shape, dtype, torch.device("cpu"))
test_many.test_what_is_not_finite_stays_in_its_row_and_kernel(torch.device("cpu"))
"""
    subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "C3A_CPU_LEVEL": "aten"},
        check=True,
        timeout=600,
    )


def test_float32_sums_err_no_more_than_one_adapters(device):
    x, w, g, _ = stacked((4, 500), 2, 2, 32, 2, dtype=torch.float32, device=device)
    index = torch.tensor([1, 0, 1, 1], device=device)
    exact = dense_results(x, w, g, index)[2]
    dw = OPS.block_circ_conv_many_kernel_grad(g, x, index, 2, 32)
    assert relative_error(dw.cpu(), exact) < TOLERANCE[torch.float32]
