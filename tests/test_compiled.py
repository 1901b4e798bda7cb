"""What a compiler makes of the operators and the layer: nothing more is allocated or moved."""

import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import fresh_cache, run_and_get_code

import c3a
from c3a.memory import peak_allocated
from cases import operands, relative_error

OPS = torch.ops.c3a


@pytest.fixture(autouse=True)
def _from_the_start():
    torch.compiler.reset()
    with fresh_cache():
        yield


def adapted(features=64, block_size=16, base=nn.Linear, **options):
    return c3a.C3ALinear(base(features, features), block_size, init="gaussian", **options)


def two_layers(**options):
    return nn.Sequential(adapted(**options), nn.GELU(), adapted(**options))


def step(module, x):
    y = module(x)
    kernels = [p for p in module.parameters() if p.requires_grad]
    return y, torch.autograd.grad(y.float().sin().sum(), (x, *kernels))


def assert_same(one, other, tolerance=1e-5):
    assert relative_error(one[0].detach(), other[0].detach().double()) < tolerance
    for a, b in zip(one[1], other[1], strict=True):
        assert relative_error(a, b.double()) < tolerance


IN_PLACE = {
    "a copy of what is read": lambda x, w, base: (
        OPS.block_circ_conv_add_(y := x.clone(), x, w) or y
    ),
    "a product": lambda x, w, base: OPS.block_circ_conv_add_(y := x @ base, x, w) or y,
    "what is read later": lambda x, w, base: (
        OPS.block_circ_conv_add_(y := (z := x @ base).clone(), x, w) or (y - z)
    ),
    "a view": lambda x, w, base: OPS.block_circ_conv_add_((y := torch.cat([x, x]))[6:], x, w) or y,
    "an argument": lambda x, w, base: OPS.block_circ_conv_add_(x, x.sin(), w) or x,
    "a gradient": lambda x, w, base: (
        y := x @ base,
        OPS.block_circ_conv_backward_add_(y, x, x, w),
    ),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_writes_in_place_are_right_and_touch_nothing_else(name):
    """Whatever the compiler makes of them: its reinplacing has had a bug with copies."""
    x, w, _ = operands((6,), 2, 2, 8, dtype=torch.float32)
    base = torch.randn(16, 16)
    function = IN_PLACE[name]
    with torch.no_grad():
        x_then, w_then = x.clone(), w.clone()
        expected = function(x_then, w_then, base)
        got = torch.compile(function, fullgraph=True)(x, w, base)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close((x, w), (x_then, w_then))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_is_compiled_whole_with_the_same_results_and_gradients(dynamic, autocast):
    module = two_layers()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
    for tokens in (8, 24):
        x = torch.randn(2, tokens, 64, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert_same(step(compiled, x), step(module, x), 1e-2 if autocast else 1e-5)
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    assert relative_error(compiled(x), module(x).double()) < 1e-2


def test_both_sums_stay_in_place():
    module = two_layers()
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(2, 24, 64, requires_grad=True)
    _, codes = run_and_get_code(lambda: step(compiled, x))
    code = "\n".join(codes)
    calls = re.findall(r"^ +(?:buf\d+ = )?torch\.ops\.c3a\.(\w+)\.default\(", code, re.MULTILINE)
    assert calls == 2 * ["block_circ_conv_add_"] + 2 * ["block_circ_conv_backward_add_"]
    assert "clone" not in "".join(re.sub("#.*", "", line) for line in code.splitlines())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_layer_holds_no_more_memory_than_an_eager_one(training, dtype):
    layer = adapted(256, 32).to(dtype)
    layer.c3a_kernel.data = layer.c3a_kernel.data.float()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(512, 256, dtype=dtype, requires_grad=training)

    def run(module):
        with torch.set_grad_enabled(training):
            y = module(x)
            if training:
                torch.autograd.grad(y, (x, layer.c3a_kernel), torch.empty_like(y))

    run(compiled), run(layer)
    of_kernel = 0 if training else layer.c3a_kernel.nbytes  # which the eager layer has prepared
    most = peak_allocated(lambda: run(layer)) + of_kernel + 1024
    assert peak_allocated(lambda: run(compiled)) <= most


def hooked(layer):
    layer.base_layer.register_forward_hook(lambda module, args, y: y * 2)


def trained(layer):
    layer.base_layer.weight.requires_grad_()


def trained_bias(layer):
    layer.base_layer.bias.requires_grad_()


def padded(layer):
    layer.__init__(nn.Linear(60, 60), 16, pad=True, init="gaussian")


def wrapped(layer):
    layer.__init__(adapted(), 32, init="gaussian")
    layer.base_layer.c3a_kernel.requires_grad_(True)


@pytest.mark.parametrize("change", [hooked, trained, trained_bias, padded, wrapped])
def test_other_base_layers_keep_their_own_call(change):
    layer = adapted()
    change(layer)
    x = torch.randn(6, layer.in_features, requires_grad=True)
    assert_same(step(torch.compile(layer, backend="aot_eager"), x), step(layer, x))


def test_an_exported_layer_is_a_linear_layer_and_a_sum_without_writes():
    layer = adapted()
    program = torch.export.export(layer, (torch.randn(6, 64),))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets == {"aten.linear.default", "c3a.block_circ_conv_add.default"}


def test_states_that_change_are_seen():
    layer = adapted()
    compiled = torch.compile(layer)
    x = torch.randn(6, 64)
    for change in (
        lambda: None,
        layer.merge,
        layer.unmerge,
        lambda: setattr(layer, "enabled", False),
        lambda: setattr(layer, "enabled", True),
        lambda: setattr(layer, "scale", 0.5),
    ):
        change()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))
