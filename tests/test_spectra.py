"""Spectra kept from call to call: used when no gradient is wanted for the kernel, never stale."""

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import c3a
from c3a import spectra
from cases import operands, relative_error

OPS = torch.ops.c3a


@pytest.fixture(autouse=True)
def nothing_kept():
    c3a.forget_spectra()
    yield
    c3a.forget_spectra()


def transforms(function) -> int:
    """Return how often the call transforms a kernel for keeping."""
    with profile(activities=[ProfilerActivity.CPU]) as run:
        function()
    return sum(event.name == "c3a::_kernel_spectra" for event in run.events())


def check(x, w, scale=1.0) -> None:
    with torch.no_grad():
        got = c3a.block_circ_conv(x, w, scale)
    assert relative_error(got, scale * x @ c3a.circulant(w.detach()).T) < 1e-6


def parameter(*shape) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape))


def test_a_kernel_is_transformed_once_where_no_gradient_is_wanted_for_it():
    w, x = parameter(2, 3, 8), torch.randn(5, 24)
    with torch.no_grad():
        assert transforms(lambda: c3a.block_circ_conv(x, w)) == 1
        assert transforms(lambda: c3a.block_circ_conv(x, w)) == 0
        assert transforms(lambda: c3a.block_circ_conv(x, w, 0.5)) == 1
        assert transforms(lambda: c3a.block_circ_conv(x.double(), w)) == 1
    check(x, w)
    check(x, w, 0.5)


def test_training_keeps_nothing():
    w, x = parameter(2, 3, 8), torch.randn(5, 24, requires_grad=True)
    c3a.block_circ_conv(x, w).sum().backward()
    assert not spectra._KEPT


def test_a_frozen_adapter_keeps_the_spectra_of_forward_and_input_gradient():
    w = torch.nn.Parameter(torch.randn(2, 3, 8), requires_grad=False)
    x = torch.randn(5, 24, requires_grad=True)

    def step():
        return torch.autograd.grad(c3a.block_circ_conv(x, w).square().sum(), x)[0]

    assert transforms(step) == 2
    assert transforms(step) == 0
    matrix = c3a.circulant(w)
    (expected,) = torch.autograd.grad((x @ matrix.T).square().sum(), x)
    assert relative_error(step(), expected) < 1e-6


CHANGES = {
    "an optimizer's step": lambda w: torch.optim.SGD([w], lr=1.0).step(),
    "an in-place operation": lambda w: w.mul_(2),
    "a write to a view": lambda w: w[0].fill_(3.0),
    "a state dict": lambda w: w.copy_(torch.ones_like(w)),
    "new data": lambda w: setattr(w, "data", torch.randn_like(w)),
    "data of another shape": lambda w: setattr(w, "data", torch.randn(1, 3, 8)),
    "data of another dtype": lambda w: setattr(w, "data", w.data.bfloat16().double()),
    "an exchange with another tensor": lambda w: torch.utils.swap_tensors(
        w, torch.nn.Parameter(torch.randn(2, 3, 8))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_kept_spectra_are_never_stale(change):
    w, x = parameter(2, 3, 8), torch.randn(5, 24)
    w.grad = torch.ones_like(w)
    check(x, w)
    with torch.no_grad():
        CHANGES[change](w)
    check(x.to(torch.promote_types(x.dtype, w.dtype)), w)


def test_memory_that_was_freed_and_given_out_again_is_another_kernel():
    x, w = torch.randn(5, 24), parameter(2, 3, 8)
    for _ in range(20):
        w.data = torch.randn(2, 3, 8)  # frees what it had, often to be given out at once
        check(x, w)
    for _ in range(20):
        check(x, parameter(2, 3, 8))  # the same for the object and its id


def test_what_is_kept_goes_when_the_next_kernel_comes_after_its_own_is_gone():
    x = torch.randn(5, 24)
    for _ in range(10):
        check(x, parameter(2, 3, 8))
        gc.collect()
        assert len(spectra._KEPT) == 1


def test_a_write_around_the_version_is_seen_unless_it_is_of_a_few_numbers():
    w, x = parameter(16, 3, 8), torch.randn(5, 24)
    check(x, w)
    w.data.mul_(2)
    check(x, w)
    w.detach().numpy()[:] = 1
    check(x, w)
    w.data[0, 0, 1] = 100
    c3a.forget_spectra()
    check(x, w)


@pytest.mark.parametrize("b", [8, 34, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_results_have_the_same_bits_with_and_without(b, dtype):
    x, w, g = operands((5,), 2, 3, b, dtype=dtype)
    w.requires_grad_()
    with_graph = (c3a.block_circ_conv(x, w), c3a.block_circ_conv_add(g, x, w, 0.5))
    g_in = g.clone()
    with torch.no_grad():
        kept = (c3a.block_circ_conv(x, w), c3a.block_circ_conv_add(g, x, w, 0.5))
        OPS.block_circ_conv_add_(g_in, x, w, 0.5)
    for a, b in zip(kept, with_graph, strict=True):
        assert torch.equal(a, b.detach())
    assert torch.equal(g_in, kept[1])


def test_layers_keep_spectra_in_inference_mode_too():
    layer = c3a.C3ALinear(torch.nn.Linear(24, 16), 8, init="gaussian")
    x = torch.randn(1, 24)
    expected = layer(x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            layer(x)
            assert transforms(lambda: layer(x)) == 0
            torch.testing.assert_close(layer(x), expected)


def test_a_kernel_made_in_inference_mode_has_no_version_and_nothing_is_kept():
    with torch.inference_mode():
        layer = c3a.C3ALinear(torch.nn.Linear(24, 16), 8, init="gaussian")
        x = torch.randn(1, 24)
        before = layer(x)
        layer.c3a_kernel.zero_()
        torch.testing.assert_close(layer(x), layer.base_layer(x))
        assert not torch.equal(before, layer(x))
    assert not spectra._KEPT


def test_a_traced_graph_calls_the_operator_and_holds_no_spectra():
    w, x = torch.randn(2, 3, 8), torch.randn(5, 24)
    check(x, w)
    for mode in ("real", "fake"):
        trace = torch.fx.experimental.proxy_tensor.make_fx(
            lambda x, w: c3a.block_circ_conv(x, w), tracing_mode=mode
        )
        called = {node.target for node in trace(x, w).graph.nodes if node.op == "call_function"}
        assert called == {OPS.block_circ_conv.default}


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_a_compiled_layer_sees_a_changed_kernel(mode):
    layer = c3a.C3ALinear(torch.nn.Linear(24, 16), 8, init="gaussian").requires_grad_(False)
    x = torch.randn(2, 24)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with getattr(torch, mode)():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), layer(x))
            layer.c3a_kernel.add_(1)


def test_spectra_of_another_kernel_are_refused():
    x, w = torch.randn(5, 24), torch.randn(2, 3, 8)
    w_hat = OPS._kernel_spectra(torch.randn(1, 3, 8), torch.float32)
    with pytest.raises(RuntimeError, match="expected spectra of .* numbers, got"):
        OPS._apply_spectra(torch.empty(5, 16), x, w, w_hat)


def test_bad_operands_are_named_by_the_operator_itself():
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"c3a\.block_circ_conv: expected x"):
        c3a.block_circ_conv(torch.ones(2, 7), parameter(2, 2, 4))
