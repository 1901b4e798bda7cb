"""The weight of an adapted layer: read by code that does not call the layer, it has the adapter."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jvp, vmap
from transformers.pytorch_utils import Conv1D

import c3a
from c3a.weight import AdaptedWeight

pytestmark = pytest.mark.usefixtures("default_device")


def adapted(base=None, block_size=4, **options):
    options.setdefault("init", "gaussian")
    return c3a.C3ALinear(nn.Linear(12, 8) if base is None else base, block_size, **options)


def dense(layer):
    base = layer.base_layer.weight
    delta = layer.delta_weight().detach()
    return base.detach() + (delta.T if isinstance(layer.base_layer, Conv1D) else delta).to(base)


@pytest.fixture
def additions(monkeypatch):
    """How often a weight was added up."""
    calls = []
    add = c3a.C3ALinear.add_delta
    monkeypatch.setattr(
        c3a.C3ALinear, "add_delta", lambda self, *args: calls.append(self) or add(self, *args)
    )
    return calls


def test_dtype_device_and_shape_need_no_sum(additions, device):
    layer = adapted(nn.Linear(12, 8).to(torch.bfloat16))
    weight = layer.weight
    assert (weight.dtype, weight.device.type) == (torch.bfloat16, device.type)
    assert weight.data.dtype == torch.bfloat16
    assert (weight.shape, weight.stride(), weight.numel()) == ((8, 12), (12, 1), 96)
    assert (weight.size(0), weight.dim(), weight.ndim, len(weight)) == (8, 2, 2, 8)
    assert weight.is_floating_point()
    assert weight.requires_grad
    assert not weight.is_meta
    assert not additions


KINDS = {
    "linear": adapted,
    "bfloat16": lambda: adapted(nn.Linear(12, 8).to(torch.bfloat16)),
    "by columns": lambda: adapted(Conv1D(8, 12)),
    "padded": lambda: adapted(nn.Linear(11, 7), pad=True),
    "of two adapters": lambda: adapted(adapted()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_that_by_which_the_layer_is_linear(kind):
    layer = KINDS[kind]()
    x = torch.randn(5, layer.in_features, dtype=layer.weight.dtype)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            weight = layer.weight.T if kind == "by columns" else layer.weight
            expected = layer(x)
            limit = 0.1 if kind == "bfloat16" else 1e-5
            torch.testing.assert_close(
                F.linear(x, weight, layer.bias), expected, rtol=limit, atol=limit
            )


def test_gradients_reach_the_kernel_any_number_of_times():
    layer = adapted(nn.Linear(12, 8).double(), dtype=torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    kernel = layer.c3a_kernel

    def function(x, _):
        return F.linear(x, layer.weight, layer.bias).tanh()

    assert torch.autograd.gradcheck(function, (x, kernel))
    assert torch.autograd.gradgradcheck(function, (x, kernel))
    layer.base_layer.weight.requires_grad_()
    read = torch.autograd.grad(layer.weight.square().sum(), layer.base_layer.weight)[0]
    torch.testing.assert_close(read, 2 * dense(layer))


class Product(torch.autograd.Function):
    """As extensions do: the weight goes into a function of their own."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, g.T @ x


def test_gradients_reach_the_kernel_through_functions_of_others():
    layer, x = adapted(), torch.randn(5, 12, requires_grad=True)
    inputs = (x, layer.c3a_kernel)
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    got = torch.autograd.grad((Product.apply(x, layer.weight) + layer.bias).square().sum(), inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_compiled_exported_and_transformed_code_gets_the_sum():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = adapted()

        def forward(self, x):
            return F.linear(x, self.layer.weight.to(x.dtype), self.layer.bias)

    reader, x = Reader(), torch.randn(5, 12)
    expected = reader.layer(x)
    torch.compiler.reset()
    compiled = torch.compile(reader, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    (of_compiled,) = torch.autograd.grad(compiled(x).sum(), reader.layer.c3a_kernel)
    (of_layer,) = torch.autograd.grad(reader.layer(x).sum(), reader.layer.c3a_kernel)
    torch.testing.assert_close(of_compiled, of_layer)
    torch.testing.assert_close(torch.export.export(reader, (x,)).module()(x), expected)
    parameters = dict(reader.named_parameters())
    torch.testing.assert_close(
        vmap(lambda x: functional_call(reader, parameters, (x,)))(x), expected
    )
    kernel = parameters["layer.c3a_kernel"].detach()
    along = torch.randn_like(kernel)
    _, tangent = jvp(
        lambda kernel: functional_call(reader, {"layer.c3a_kernel": kernel}, (x,)),
        (kernel,),
        (along,),
    )
    _, expected = jvp(
        lambda kernel: functional_call(reader.layer, {"c3a_kernel": kernel}, (x,)),
        (kernel,),
        (along,),
    )
    torch.testing.assert_close(tangent, expected)


WRITES = {
    "copy_": lambda w: w.copy_(torch.zeros(8, 12)),
    "data.zero_": lambda w: w.data.zero_(),
    "an element": lambda w: w.__setitem__(0, 1.0),
    "an element of data": lambda w: w.data.__setitem__((0, 0), 1.0),
    "a view": lambda w: w.data[2].view(3, 4).T.fill_(1),
    "one of the views": lambda w: w.data.unbind()[1].zero_(),
    "+=": lambda w: w.__iadd__(1),
    "out": lambda w: torch.add(torch.zeros(8, 12), 1, out=w),
    "foreach": lambda w: torch._foreach_add_([w.data], 1.0),
    "init": lambda w: nn.init.normal_(w),
    "data": lambda w: setattr(w, "data", torch.zeros(8, 12)),
    "a parameter": lambda w: nn.Parameter(w),
    "a frozen parameter": lambda w: nn.Parameter(w, requires_grad=False),
}


@pytest.mark.parametrize("way", WRITES)
@pytest.mark.parametrize("grad", [True, False])
def test_writing_to_it_is_refused(way, grad):
    layer = adapted()
    before = [t.detach().clone() for t in (layer.base_layer.weight, layer.c3a_kernel)]
    flags = [p.requires_grad for p in layer.parameters()]
    message = "base_layer.weight, or take|out=... arguments don't support"
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=message):
        WRITES[way](layer.weight)
    assert torch.equal(layer.base_layer.weight, before[0])
    assert torch.equal(layer.c3a_kernel, before[1])
    assert [p.requires_grad for p in layer.parameters()] == flags


def test_a_weight_read_before_the_layer_changed_is_refused():
    layer = adapted()
    for change in (
        lambda: nn.init.zeros_(layer.c3a_kernel),
        lambda: nn.init.ones_(layer.base_layer.weight),
        lambda: setattr(layer, "scale", 0.5),
    ):
        weight = layer.weight
        change()
        assert weight.dtype == torch.float32
        with pytest.raises(RuntimeError, match="changed since its weight was read; read layer.wei"):
            weight + 1
        torch.testing.assert_close(layer.weight + 0, dense(layer))


def test_freezing_it_freezes_the_weight_of_the_base():
    layer = adapted()
    assert layer.weight.requires_grad_().requires_grad
    assert layer.base_layer.weight.requires_grad
    layer.weight.requires_grad = False
    assert not layer.base_layer.weight.requires_grad
    assert layer.weight.requires_grad  # through the kernel
    layer.c3a_kernel.requires_grad_(False)
    assert not layer.weight.requires_grad


def test_merged_or_disabled_it_is_the_own_weight_of_the_base():
    layer = adapted()
    original = layer.base_layer.weight
    layer.enabled = False
    assert layer.weight is original
    layer.enabled = True
    layer.merge()
    assert layer.weight is layer.base_layer.weight
    assert layer.weight is not original


def test_quantised_offloaded_and_missing_weights_are_the_own_ones_of_the_base():
    base = nn.Linear(12, 8)
    base.weight = nn.Parameter(torch.ones(96, 1, dtype=torch.int8), requires_grad=False)
    assert adapted(base).weight is base.weight
    layer = adapted()
    layer.base_layer.to("meta")
    assert layer.weight is layer.base_layer.weight
    with torch.device("meta"):
        assert isinstance(adapted(nn.Linear(12, 8)).weight, AdaptedWeight)


def test_copies_files_and_arrays_hold_the_sum(device):
    layer = adapted()
    expected = dense(layer)
    buffer = io.BytesIO()
    torch.save(layer.weight, buffer)
    buffer.seek(0)
    for taken in (
        torch.load(buffer),
        copy.deepcopy(layer.weight),
        copy.copy(layer.weight),
        torch.tensor(layer.weight.tolist()),
        layer.weight.clone().detach(),
        layer.weight.cpu().to(device),
    ):
        torch.testing.assert_close(taken, expected)
    if device.type == "cpu":
        torch.testing.assert_close(torch.from_numpy(layer.weight.detach().numpy()), expected)
    with pytest.raises(RuntimeError, match=r"requires grad; use layer.weight.detach\(\).numpy"):
        layer.weight.numpy()
    with pytest.raises(RuntimeError, match="no memory of its own"):
        layer.weight.data_ptr()
    assert repr(layer.weight).startswith("AdaptedWeight(tensor([[")


# Modules that read the weights of the layers that they hold


def without_adapters(model):
    return c3a.unpatch_model(copy.deepcopy(model), merge=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_layers_of_torch_that_read_weights_are_adapted(training, grad):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).train(training)
    c3a.patch_model(model, "all-linear", 4, init="gaussian", scale=0.5)
    assert len(c3a.summary(model).layers) == 6
    x = torch.randn(3, 5, 8)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    with torch.set_grad_enabled(grad):
        for options in ({}, {"src_key_padding_mask": mask}):
            expected = without_adapters(model)(x, **options)
            with c3a.disabled(model):
                assert not torch.allclose(model(x, **options)[1:], expected[1:], atol=1e-2)
            torch.testing.assert_close(model(x, **options)[1:], expected[1:])
    if grad:
        model(x).square().sum().backward()
        for found in model.modules():
            if isinstance(found, c3a.C3ALinear):
                assert found.c3a_kernel.grad.abs().max() > 0


def test_an_adapted_layer_put_into_attention_by_hand_is_not_ignored():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    attention.out_proj = adapted(attention.out_proj, 4, scale=0.5)
    x = torch.randn(3, 5, 8)
    expected = without_adapters(nn.Sequential(attention))[0](x, x, x)[0]
    for mode in (True, False):
        attention.train(mode)
        torch.testing.assert_close(attention(x, x, x)[0], expected)
        with torch.no_grad():
            torch.testing.assert_close(attention(x, x, x)[0], expected)
    torch.compiler.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x, x)[0], expected)


def test_projections_that_are_fused_take_their_adapters_along():
    query, key = adapted(), adapted()
    fused = nn.Linear(12, 16)
    with torch.no_grad():
        fused.weight.copy_(torch.cat([query.weight.data, key.weight.data]))
        fused.bias.copy_(torch.cat([query.bias, key.bias]))
    x = torch.randn(5, 12)
    torch.testing.assert_close(fused(x), torch.cat([query(x), key(x)], -1))


def test_mamba_that_multiplies_by_its_layers_weights_is_adapted():
    from transformers import MambaConfig, MambaModel

    sizes = {"vocab_size": 11, "hidden_size": 8, "state_size": 4, "time_step_rank": 4}
    sizes["initializer_range"] = 1.0
    model = MambaModel(MambaConfig(num_hidden_layers=1, **sizes)).eval()
    c3a.patch_model(model, ["dt_proj"], 4, init="gaussian", scale=2.0)
    tokens = torch.tensor([[1, 2, 3, 4]])
    expected = without_adapters(model)(tokens).last_hidden_state
    with c3a.disabled(model):
        assert not torch.allclose(model(tokens).last_hidden_state, expected, atol=1e-4)
    y = model(tokens).last_hidden_state
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    assert model.layers[0].mixer.dt_proj.c3a_kernel.grad.abs().max() > 0
