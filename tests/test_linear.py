"""C3ALinear: its function, what it saves, merging, states, layers other than nn.Linear."""

import copy
import io
import re
import sys
import threading
import time
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import c3a
from c3a.memory import saved_for_backward
from cases import relative_error

pytestmark = pytest.mark.usefixtures("default_device")


def adapted(in_features=12, out_features=8, block_size=4, base_dtype=torch.float32, **options):
    options.setdefault("init", "gaussian")
    base = nn.Linear(in_features, out_features).to(base_dtype)
    return c3a.C3ALinear(base, block_size, **options)


def dense(layer, x):
    """The layer's definition in float64."""
    base = layer.base_layer
    weight = base.weight.T if isinstance(base, Conv1D) else base.weight
    matrix = weight.double() + layer.scale * c3a.circulant(layer.c3a_kernel.double())
    return x.double() @ matrix.T + base.bias.double()


def test_float16_neither_overflows_before_the_scale_nor_loses_gradients_after_it():
    layer = adapted(4096, 4096, 4096, base_dtype=torch.float16)
    with torch.no_grad():
        layer.c3a_kernel.fill_(4)
        layer.base_layer.weight.zero_()
    x = torch.full((2, 4096), 8.0, dtype=torch.float16, requires_grad=True)
    y = layer(x) - layer.bias
    torch.testing.assert_close(y, torch.full_like(y, 32.0), rtol=1e-2, atol=0)
    (dw,) = torch.autograd.grad(y, layer.c3a_kernel, torch.full_like(y, 1e-4))
    expected = 2 * 4096 * 8 * torch.tensor(1e-4).half().item() / 4096
    torch.testing.assert_close(dw, torch.full_like(dw, expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_forward_is_base_plus_scaled_circulant(dtype, scale):
    layer = adapted(base_dtype=dtype, scale=scale)
    assert layer.scale == (1 / 12 if scale is None else scale)
    x = torch.randn(2, 5, 12, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    limit = {torch.float64: 1e-6, torch.float32: 1e-6}.get(dtype, 8e-3)
    assert relative_error(y.detach(), dense(layer, x)) < limit


def test_zeros_leave_the_output_as_it_was_and_still_train():
    layer = adapted(init="zeros")
    x = torch.randn(3, 12)
    y = layer(x)
    assert torch.equal(y, layer.base_layer(x))
    y.square().sum().backward()
    assert layer.c3a_kernel.grad.abs().min() > 0
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize(
    ("init", "bound", "std"),
    [
        ("xavier_uniform", (6 / 768) ** 0.5, (2 / 768) ** 0.5),
        ("kaiming_uniform", (1 / 512) ** 0.5, (1 / 512 / 3) ** 0.5),
        ("gaussian", None, 1.0),
    ],
)
def test_initial_values_are_those_of_peft(init, bound, std):
    kernel = adapted(512, 256, 16, init=init).c3a_kernel
    assert kernel.shape == (16, 32, 16)
    assert abs(kernel.std().item() / std - 1) < 0.05
    if bound:
        assert kernel.abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["to", "method", "type"])
def test_a_model_in_half_precision_keeps_its_kernels(how, dtype):
    model = nn.Sequential(adapted(32, 32, 8), nn.Linear(32, 32))
    kernel = model[0].c3a_kernel
    kernel.grad, values = torch.ones_like(kernel), kernel.detach().clone()
    if how == "method":
        model.half() if dtype == torch.float16 else model.bfloat16()
    else:
        model.to(dtype) if how == "to" else model.type(dtype)
    assert model[0].c3a_kernel is kernel
    assert torch.equal(kernel, values)
    assert kernel.dtype == kernel.grad.dtype == torch.float32
    assert model[0].base_layer.weight.dtype == model[1].weight.dtype == dtype
    model.double()
    assert kernel.dtype == torch.float64
    model.float()
    assert kernel.dtype == torch.float32
    narrow = adapted(32, 32, 8, dtype=torch.bfloat16).half()
    assert narrow.c3a_kernel.dtype == torch.float16  # asked for


def test_a_model_in_float16_trains():
    """AdamW's eps is zero in float16, as are squares of gradients: NaN at the second step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    c3a.patch_model(model, ["0", "2"], block_size=16).half()
    kernels = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(kernels, lr=1e-2)
    x, target = torch.randn(32, 64).half(), torch.randn(32, 64)
    losses = []
    for _ in range(12):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.002


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saves_nothing_but_its_input_and_the_kernel(dtype):
    layer = adapted(256, 128, 32, base_dtype=dtype)
    x = torch.randn(64, 256, dtype=dtype, requires_grad=True)
    trained_base = nn.Linear(256, 128).to(dtype)
    with saved_for_backward(trained_base) as of_base:
        trained_base(x)
    with saved_for_backward(layer) as saved:
        layer(x)
    assert saved.total == of_base.total == x.nbytes


def test_saves_the_same_input_for_siblings_under_autocast(device):
    query, key = adapted(256, 256, 32), adapted(256, 256, 32)
    x = torch.randn(64, 256, requires_grad=True)
    siblings = nn.ModuleList([query, key])
    with torch.autocast(device.type, torch.bfloat16), saved_for_backward(siblings) as saved:
        y = query(x) + key(x)
    base_copies = 2 * query.base_layer.weight.nbytes // 2  # autocast's own bfloat16 weights
    assert y.dtype == torch.bfloat16
    assert saved.total <= x.nbytes + base_copies


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merge_rounds_once_and_unmerge_restores_every_bit(dtype):
    layer = adapted(64, 32, 16, base_dtype=dtype)
    weight = layer.base_layer.weight
    original = weight.detach().clone()
    delta = layer.scale * c3a.circulant(layer.c3a_kernel.detach().double())
    layer.merge()
    layer.merge()
    assert layer.merged
    exact = original.double() + delta
    spacing = torch.finfo(dtype).eps * exact.abs() + 1e-7 * delta.abs().max()
    assert ((layer.weight.double() - exact).abs() <= 0.51 * spacing + 2e-8).all()
    x = torch.randn(5, 64, dtype=dtype)
    assert relative_error(layer(x).detach(), x.double() @ exact.T + layer.bias) < 8e-3
    layer.unmerge()
    layer.unmerge()
    assert layer.base_layer.weight is weight
    assert torch.equal(weight, original)


def test_merging_leaves_a_tied_weight_alone():
    embedding = nn.Embedding(8, 12)
    head = nn.Linear(12, 8)
    head.weight = embedding.weight
    layer = c3a.C3ALinear(head, 4, init="gaussian")
    before = embedding.weight.detach().clone()
    layer.merge()
    assert torch.equal(embedding.weight, before)
    layer.unmerge()
    assert head.weight is embedding.weight


@pytest.mark.parametrize("merged", [False, True])
def test_disabling_gives_the_base_layer_merged_or_not(merged):
    layer = adapted()
    x = torch.randn(3, 12)
    with_adapter, base = layer(x), layer.base_layer(x)
    if merged:
        layer.merge()
    layer.enabled = False
    assert torch.equal(layer(x), base)
    layer.enabled = True
    torch.testing.assert_close(layer(x), with_adapter)
    layer.enabled = False
    layer.unmerge()
    assert torch.equal(layer(x), base)


def test_merging_while_disabled_takes_effect_when_enabled():
    layer = adapted()
    x = torch.randn(3, 12)
    with_adapter, base = layer(x), layer.base_layer(x)
    layer.enabled = False
    layer.merge()
    assert torch.equal(layer(x), base)
    layer.enabled = True
    torch.testing.assert_close(layer(x), with_adapter)
    layer.unmerge()
    assert torch.equal(layer.base_layer(x), base)


def test_state_dict_is_the_same_merged_or_not_and_loads_either_way():
    layer, other = adapted(), adapted()
    expected = {name: t.clone() for name, t in layer.state_dict().items()}
    assert set(expected) == {"c3a_kernel", "base_layer.weight", "base_layer.bias"}
    layer.merge()
    state = layer.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    other.merge()
    other.load_state_dict(state)
    x = torch.randn(3, 12)
    assert other.merged
    assert torch.equal(other(x), layer(x))
    other.unmerge()
    assert torch.equal(other.base_layer.weight, expected["base_layer.weight"])


def test_a_merged_layer_moves_and_converts_with_its_original_weight():
    layer = adapted()
    original = layer.base_layer.weight.detach().clone()
    layer.merge()
    parameter = layer._set_aside[0]
    layer.to(torch.float64)
    layer.unmerge()
    weight = layer.base_layer.weight
    assert weight is parameter  # the object, lest a tie is broken
    assert weight.dtype == torch.float64
    assert torch.equal(weight, original.double())


@pytest.mark.parametrize("merged", [False, True])
def test_copies_and_pickles(merged):
    layer = adapted()
    if merged:
        layer.merge()
    x = torch.randn(3, 12)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), layer(x))
        twin.unmerge()
        with torch.no_grad():
            twin.c3a_kernel.zero_()
        assert not torch.equal(twin(x), layer(x))


def test_repr_tells_sizes_scale_and_state():
    layer = adapted(scale=0.5)
    layer.merge()
    assert "in_features=12, out_features=8, block_size=4, scale=0.5, parameters=24, merged" in repr(
        layer
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"block_size": 8},
            "block_size 8 does not divide in_features = 12 and out_features = 8; "
            r"these do: 1, 2, 4 \(or pass pad=True\)",
        ),
        ({"block_size": 0}, "expected block_size to be an integer >= 1, got 0"),
        ({"block_size": True}, "expected block_size to be an integer >= 1, got True"),
        ({"block_size": 2.0}, "expected block_size to be an integer >= 1, got 2.0"),
        ({"scale": 0.0}, "expected a finite scale other than 0, got 0.0"),
        ({"scale": float("nan")}, "expected a finite scale other than 0, got nan"),
        ({"init": "ones"}, "expected init to be one of .*, got 'ones'"),
    ],
)
def test_bad_arguments_are_named_and_leave_the_base_layer_as_it_was(options, message):
    base = nn.Linear(12, 8)
    with pytest.raises(ValueError, match=f"c3a.C3ALinear: {message}"):
        c3a.C3ALinear(base, **{"block_size": 4, **options})
    assert base.weight.requires_grad


def test_modules_without_features_and_odd_dtypes_are_named():
    with pytest.raises(TypeError, match="expected a layer with in_features .* got LayerNorm"):
        c3a.C3ALinear(nn.LayerNorm(4), 2)
    with pytest.raises(TypeError, match="expected one of .*, got dtype torch.int64"):
        c3a.C3ALinear(nn.Linear(4, 4), 2, dtype=torch.int64)


def test_a_layer_trains_under_compile_like_without():
    layer = adapted(init="zeros")
    x, target = torch.randn(16, 12), torch.randn(16, 8)
    losses = []
    torch.compiler.reset()
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        with torch.no_grad():
            layer.c3a_kernel.zero_()
        optimizer = torch.optim.AdamW([layer.c3a_kernel], lr=0.3)
        for _ in range(10):
            loss = (function(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] < (layer.base_layer(x) - target).square().mean().item()


def quantised_dynamically(linear):
    torch.backends.quantized.engine = "fbgemm"
    return torch.ao.nn.quantized.dynamic.Linear.from_float(with_qconfig(linear))


def with_qconfig(linear):
    linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return linear


class IntegerActivations(nn.Module):
    """Dynamic quantisation as libraries of today do it: integers for weight and activations."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter(
            (linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False
        )

    def forward(self, x):
        scale = x.abs().max() / 127
        integers = (x / scale).round().to(torch.int32)
        return (integers @ self.weight.to(torch.int32).T).float() * (scale * self.scale).detach()


def by_torchao(linear):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(linear)
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model[0]


def by_torchao_in_four_bits(linear):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(linear)
    config = quantization.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4)
    quantization.quantize_(model, config)
    return model[0]


@pytest.mark.filterwarnings("ignore:.*(deprecated|reduce_range|TypedStorage)")
@pytest.mark.parametrize(
    "make", [quantised_dynamically, IntegerActivations, by_torchao, by_torchao_in_four_bits]
)
def test_a_base_that_cuts_the_graph_is_said_once(make, device, monkeypatch):
    if device.type != "cpu":
        pytest.skip("integer products are the CPU's")
    monkeypatch.setattr(c3a.adapted, "_CUTTING", set())
    layers = [c3a.C3ALinear(make(nn.Linear(32, 8)), 4) for _ in range(2)]
    x = torch.randn(3, 32)
    layers[0](x)  # no gradient is wanted for the input: nothing is lost
    x.requires_grad_()
    with torch.no_grad():
        layers[0](x)
    base = layers[0].base_layer
    name = f"{type(base).__name__} with a weight of type {type(base.weight).__name__}"
    with pytest.warns(UserWarning, match=f"gradients do not pass through .* of type {name}"):
        layers[0](x)
    layers[0](x)
    layers[1](x)
    monkeypatch.setattr(c3a.adapted, "_CUTTING", set())
    monkeypatch.setattr(c3a.adapted, "_LOOKED_AT", weakref.WeakSet())
    layer = c3a.C3ALinear(nn.Linear(32, 8), 4)
    layer(x)
    layer.base_layer = base
    with pytest.warns(UserWarning, match="gradients do not pass through"):
        layer(x)
    for base in (nn.Linear(32, 8), nn.Sequential(nn.Linear(32, 8), nn.Tanh())):
        base.in_features, base.out_features = 32, 8
        c3a.C3ALinear(base, 4)(x)
        c3a.C3ALinear(base, 4)(x.tanh())


# The base layer's result is written in place where nobody else has it, and only there.


def memory_of_base(layer, x, kept) -> bool:
    """Return whether the layer's result lies where its base layer's did."""
    place = []
    handle = layer.base_layer.register_forward_hook(
        lambda _module, _args, y: place.append(y.data_ptr()) or kept(y)
    )
    with torch.no_grad():
        y = layer(x)
    handle.remove()
    return y.data_ptr() == place[0]


HOLDERS = {
    "a list": lambda y, held: held.append(y),
    "a view": lambda y, held: held.append(y[:, :2]),
    "a detached tensor": lambda y, held: held.append(y.detach()),
    "an array": lambda y, held: held.append(y.numpy() if y.is_cpu else y.detach()),
    "a storage": lambda y, held: held.append(y.untyped_storage()),
}


def test_the_result_of_the_base_is_written_in_place_where_nobody_has_it():
    for x in (torch.randn(12), torch.randn(3, 12), torch.randn(2, 3, 12)):
        assert memory_of_base(adapted(), x, lambda y: None)


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_result_that_something_holds_is_left_alone(holder):
    layer, x, held = adapted(), torch.randn(3, 12), []
    expected = layer.base_layer(x).detach().clone()
    assert not memory_of_base(layer, x, lambda y: HOLDERS[holder](y, held))
    if holder == "a storage":
        return
    got = torch.tensor(held[0].tolist())
    width = got.shape[-1] if got.dim() > 1 else got.numel()
    torch.testing.assert_close(got.view(-1), expected[:, :width].reshape(-1)[: got.numel()])


class Recorder(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.results = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is nn.functional.linear:
            self.results.append(result)
        return result


@pytest.mark.parametrize("grad", [True, False])
def test_modes_and_patched_classes_that_keep_the_result_keep_it_as_it_was(grad, monkeypatch):
    layer, x = adapted(), torch.randn(3, 12, requires_grad=grad)
    expected = layer.base_layer(x).detach().clone()
    with torch.set_grad_enabled(grad), Recorder() as mode:
        layer(x)
    assert torch.equal(mode.results[0], expected)

    seen = []
    forward = nn.Linear.forward
    monkeypatch.setattr(
        nn.Linear, "forward", lambda self, x: seen.append(forward(self, x)) or seen[-1]
    )
    with torch.set_grad_enabled(grad):
        layer(x)
    assert torch.equal(seen[0], expected)


class SavesItsResult(nn.Module):
    in_features, out_features = 12, 8

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 8)

    def forward(self, x):
        return self.linear(x).tanh()  # whose derivative needs the result


class ReturnsItsBuffer(nn.Module):
    in_features = out_features = 8

    def __init__(self):
        super().__init__()
        self.register_buffer("result", torch.randn(3, 8))

    def forward(self, x):
        return self.result


def test_a_base_that_needs_its_result_has_it(device):
    layer = c3a.C3ALinear(SavesItsResult().double(), 4, init="gaussian", dtype=torch.float64)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    layer = c3a.C3ALinear(ReturnsItsBuffer(), 4, init="gaussian")
    before = layer.base_layer.result.clone()
    layer(torch.randn(3, 8))
    assert torch.equal(layer.base_layer.result, before)
    identity = nn.Identity()
    identity.in_features = identity.out_features = 8
    layer = c3a.C3ALinear(identity, 4, init="gaussian")
    x = torch.randn(3, 8)
    before = x.clone()
    layer(x)
    assert torch.equal(x, before)


class Given(nn.Module):
    """A base layer that returns what it is given."""

    in_features, out_features = 8, 8

    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, x):
        return self.result()


FOREIGN = {
    "from_numpy": lambda memory: torch.from_numpy(memory),
    "from_dlpack": lambda memory: torch.from_dlpack(memory),
    "frombuffer": lambda memory: torch.frombuffer(memory, dtype=torch.float32).view(3, 8),
    "asarray": lambda memory: torch.asarray(memory),
}


@pytest.mark.parametrize("way", FOREIGN)
@pytest.mark.parametrize("grad", [True, False])
def test_memory_that_torch_did_not_allocate_is_left_alone(grad, way):
    memory = np.ones((3, 8), dtype=np.float32)
    layer = c3a.C3ALinear(Given(lambda: FOREIGN[way](memory)), 4, init="gaussian")
    with torch.set_grad_enabled(grad):
        y = layer(torch.randn(3, 8))
    assert (memory == 1).all()
    assert not torch.equal(y, torch.ones(3, 8))


STRANGE = {
    "expanded": lambda: torch.ones(1).expand(3, 8),
    "overlapping": lambda: torch.arange(12.0).as_strided((3, 8), (2, 1)),
    "without memory": lambda: torch._efficientzerotensor(3, 8),
    "by columns": lambda: torch.ones(8, 3).T,
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("grad", [True, False])
def test_results_that_do_not_lie_one_after_the_other_are_added_onto_all_the_same(grad, kind):
    layer = c3a.C3ALinear(Given(STRANGE[kind]), 4, init="gaussian")
    x = torch.randn(3, 8)
    with torch.set_grad_enabled(grad):
        expected = STRANGE[kind]() + c3a.block_circ_conv(x, layer.c3a_kernel, layer.scale)
        torch.testing.assert_close(layer(x), expected)


def test_the_scale_of_a_merged_layer_may_change():
    layer, x = adapted(), torch.randn(3, 12)
    original = layer.base_layer.weight.detach().clone()
    layer.merge()
    layer.scale = 0.5
    assert layer.merged
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, original)
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    for wrong, error in (("x", TypeError), (float("nan"), ValueError), (0, ValueError)):
        with pytest.raises(error, match="expected .*scale"):
            layer.scale = wrong
    assert layer.scale == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_merging_refuses_what_would_not_be_finite(dtype):
    layer = adapted(base_dtype=dtype)
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        if dtype == torch.float16:  # finite, but more than the weight's dtype holds
            layer.c3a_kernel.fill_(1e6)
        else:
            layer.c3a_kernel[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="numbers of the weight infinite or NaN .* safe=False"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.base_layer.weight, before)
    layer.merge(safe=False)
    assert not layer.base_layer.weight.isfinite().all()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def test_merging_a_model_names_the_layer_that_would_not_be_finite():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    c3a.patch_model(model, ["0", "1"], 4)
    with torch.no_grad():
        model[1].c3a_kernel.fill_(float("inf"))
    for merge in (c3a.merge, lambda model: c3a.unpatch_model(model, merge=True)):
        with pytest.raises(ValueError, match="c3a: 1: merging would make"):
            merge(model)
        assert not model[0].merged
    c3a.merge(model, safe=False)
    assert model[1].merged


def quantised_by_torchao(config, base_dtype=torch.float32, **options):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 32).to(base_dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(model, getattr(quantization, config)(**options))
    return model[0]


@pytest.mark.parametrize(
    ("config", "options", "limit"),
    [
        ("Int8WeightOnlyConfig", {}, 0.01),
        ("Int8WeightOnlyConfig", {"base_dtype": torch.bfloat16}, 0.01),
        ("Float8WeightOnlyConfig", {}, 0.04),
        ("IntxWeightOnlyConfig", {"weight_dtype": torch.int4}, 0.15),
    ],
)
def test_merging_into_a_quantised_weight_says_what_it_loses_and_unmerging_restores_it(
    config, options, limit, device
):
    if device.type != "cpu":
        pytest.skip("torchao's kernels for the CPU")
    base = quantised_by_torchao(config, **options)
    layer = c3a.C3ALinear(base, 8)
    with torch.no_grad():
        layer.c3a_kernel.normal_(std=8)
    assert layer.weight is layer.base_layer.weight
    original, dtype = base.weight, base.weight.dtype
    x = torch.randn(5, 64, dtype=dtype)
    expected, of_base = layer(x).detach(), base(x).detach()
    with pytest.warns(UserWarning, match=r"merging into a Linear quantised the sum anew") as said:
        layer.merge()
    (told,) = re.findall(r"errs by (\S+) of the adapter's own norm", str(said[0].message))
    exact = original.dequantize().float() + layer.delta_weight().detach()
    error = (base.weight.dequantize().float() - exact).norm() / layer.delta_weight().norm()
    assert float(told) == pytest.approx(error.item(), rel=0.06)
    assert type(base.weight) is type(original)
    assert base.weight.dtype == dtype
    assert relative_error(layer(x).detach(), expected) < limit
    assert relative_error(of_base, expected) > 3 * limit
    layer.enabled = False
    assert torch.equal(layer(x), of_base)
    layer.enabled = True
    layer.unmerge()
    assert base.weight is original
    assert torch.equal(layer(x), expected)


def test_merging_into_a_weight_of_an_unknown_scheme_says_what_to_do():
    base = nn.Linear(12, 8)
    base.weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.uint8), requires_grad=False)
    base.forward = lambda x: x[..., :8]
    layer = c3a.C3ALinear(base, 4)
    with pytest.raises(TypeError, match="leave the adapter unmerged, or dequantise the layer"):
        layer.merge()


def test_a_weight_in_eight_bit_floats_with_factors_beside_it_is_not_taken_for_a_dense_one():
    base = nn.Linear(16, 8)
    base.weight = nn.Parameter(base.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    layer = c3a.C3ALinear(base, 4)
    with pytest.raises(TypeError, match=r"got a Parameter of torch.float8_e4m3fn"):
        layer.merge()


@pytest.mark.parametrize("what", ["weight", "kernel"])
def test_merging_without_values_is_refused(what):
    layer = adapted()
    (layer.base_layer if what == "weight" else layer).to("meta")
    if what == "kernel":
        layer.base_layer.to_empty(device="cpu")
    with pytest.raises(ValueError, match=f"cannot merge: the {what} is on the meta device"):
        layer.merge()
    assert not layer.merged


def test_the_kernel_on_an_offloaded_base_is_where_the_base_computes(device):
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(3, 12)
    before = model(x)
    accelerate.cpu_offload(model, execution_device=device)
    assert model[0].weight.is_meta
    c3a.patch_model(model, ["0", "2"], 4)
    for layer in (model[0], model[2]):
        assert layer.c3a_kernel.device.type == device.type
    torch.testing.assert_close(model(x), before)
    with torch.no_grad():
        model[0].c3a_kernel.normal_()
    assert not torch.allclose(model(x), before)
    for merge in (c3a.merge, lambda model: c3a.unpatch_model(model, merge=True)):
        with pytest.raises(ValueError, match="c3a: 0: cannot merge: the weight is on the meta"):
            merge(model)
        assert isinstance(model[0], c3a.C3ALinear)


# Merging while other threads run the layer


@pytest.mark.parametrize("exchange", ["merge", "enable"])
def test_calls_of_other_threads_see_the_weights_before_or_after_an_exchange(exchange):
    layer = adapted(64, 64, 16)
    if exchange == "enable":
        layer.merge()
    x = torch.randn(4, 64)
    with torch.no_grad():
        expected = [layer(x)]
        if exchange == "enable":
            layer.enabled = False
            expected.append(layer(x))
            layer.enabled = True
    stop, wrong, calls = threading.Event(), [], [0] * 4

    def call(number):
        while not stop.is_set():
            with torch.no_grad():
                y = layer(x)
            calls[number] += 1
            if min((y - e).abs().max().item() for e in expected) > 1e-4:
                wrong.append(y)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        until = time.monotonic() + 2
        while time.monotonic() < until:
            if exchange == "merge":
                layer.merge()
                layer.unmerge()
            else:
                layer.enabled = False
                layer.enabled = True
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(switching)
    assert min(calls) > 10
    assert not wrong, f"{len(wrong)} of {sum(calls)}"


# Dropout


def test_dropout_zeroes_the_adapters_input_alone_and_in_training_alone():
    layer = adapted(dropout=0.5)
    x = torch.randn(64, 12, requires_grad=True)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    seen = nn.functional.dropout(x, 0.5)
    expected = layer.base_layer(x) + seen @ layer.delta_weight().T
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    h = torch.randn_like(y)
    of = (x, layer.c3a_kernel)
    got, right = (torch.autograd.grad(z, of, h) for z in (y, expected))
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    layer.eval()
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dropout", "error"), [(1.0, ValueError), (-0.1, ValueError), ("x", TypeError)]
)
def test_a_wrong_dropout_is_refused(dropout, error):
    with pytest.raises(error, match="dropout"):
        adapted(dropout=dropout)
    layer = adapted(dropout=0.25)
    with pytest.raises(error, match="dropout"):
        layer.dropout = dropout
    assert layer.dropout == 0.25
    assert "dropout=0.25" in repr(layer)
