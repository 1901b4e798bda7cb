"""Each known defect of the PEFT library's C3A layers (0.21.2), and what right looks like here.

Where a row needs more than a line, its full tests stand in the other files; the first test also
shows the defect itself, so that it fails once PEFT mends it.
"""

import peft
import pytest
import torch
from peft.tuners.c3a.utils import BlockCircularConvolution
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.pytorch_utils import Conv1D

import c3a
from c3a.memory import saved_for_backward


@pytest.mark.parametrize("b", [4, 64, 1024])
def test_the_input_gradient_is_the_transpose_where_that_of_peft_is_not(b):
    x = torch.randn(8, 2 * b, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2, b, dtype=torch.float64)
    g = torch.randn(8, 2 * b, dtype=torch.float64)
    expected = g @ c3a.circulant(w)
    (ours,) = torch.autograd.grad(c3a.block_circ_conv(x, w), x, g)
    (theirs,) = torch.autograd.grad(BlockCircularConvolution.apply(x, w), x, g)
    torch.testing.assert_close(ours, expected)
    assert (theirs - expected).norm() > 0.5 * expected.norm()


def test_forward_and_kernel_gradient_equal_those_of_peft():
    x, w, g = torch.randn(8, 12), torch.randn(2, 3, 4, requires_grad=True), torch.randn(8, 8)
    ours, theirs = c3a.block_circ_conv(x, w), BlockCircularConvolution.apply(x, w)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(ours, w, g), torch.autograd.grad(theirs, w, g), rtol=1e-4, atol=1e-5
    )


def test_two_adapters_on_one_layer_add_up_also_where_it_is_not_square():
    base = nn.Linear(12, 8)
    inner = c3a.C3ALinear(base, 4, init="gaussian")
    outer = c3a.C3ALinear(inner, 2, init="gaussian")
    x = torch.randn(5, 12)
    expected = base(x) + x @ (inner.delta_weight() + outer.delta_weight()).T
    torch.testing.assert_close(outer(x), expected, rtol=1e-5, atol=1e-5)


def test_adapter_names_for_a_mixed_batch_are_a_clear_error_not_ignored():
    layer = c3a.C3ALinear(nn.Linear(4, 4), 2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'adapter_names'"):
        layer(torch.ones(2, 4), adapter_names=["a", "b"])


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12)])
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(shape):
    layer = c3a.C3ALinear(nn.Linear(12, 8), 4, init="gaussian")
    x = torch.ones(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 8)
    assert x.grad.shape == shape
    assert torch.equal(layer.c3a_kernel.grad, torch.zeros_like(layer.c3a_kernel))


@pytest.mark.parametrize("merged", [False, True])
def test_conv1d_of_transformers_works(merged):
    base = Conv1D(8, 12)  # 12 in, 8 out
    layer = c3a.C3ALinear(base, 4, init="gaussian")
    x = torch.randn(2, 5, 12)
    expected = base(x) + x @ layer.delta_weight().T
    original = base.weight
    if merged:
        layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    assert base.weight is original


def test_gpt2_is_patched_trained_and_merged():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    model = GPT2LMHeadModel(config).eval()
    c3a.patch_model(model, ["c_attn"], 8, init="gaussian")
    tokens = torch.arange(12).view(2, 6)
    model(tokens, labels=tokens).loss.backward()
    assert model.transformer.h[0].attn.c_attn.c3a_kernel.grad.abs().sum() > 0
    expected = model(tokens).logits
    torch.testing.assert_close(c3a.merge(model)(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sizes", "b"), [((10, 7), 4), ((7, 10), 4), ((3, 3), 5), ((12, 8), 4)])
def test_sizes_that_the_block_size_does_not_divide_are_padded(sizes, b):
    base = nn.Linear(*sizes).double()
    layer = c3a.C3ALinear(base, b, pad=True, init="gaussian", dtype=torch.float64)
    x = torch.randn(5, sizes[0], dtype=torch.float64, requires_grad=True)
    m, n, _ = layer.c3a_kernel.shape
    assert (m * b, n * b) >= sizes[::-1]
    padded = c3a.circulant(layer.c3a_kernel)
    expected = base(x) + layer.scale * x @ padded[: sizes[1], : sizes[0]].T
    torch.testing.assert_close(layer(x), expected)
    assert torch.autograd.gradcheck(layer, x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)


class PackedLinear(nn.Module):
    """A quantised layer in miniature: eight-bit integers, packed into a column, and a scale."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        packed = (linear.weight.detach() / scale).round().to(torch.int8).view(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        weight = (self.weight.float() * self.scale).view(self.out_features, self.in_features)
        return nn.functional.linear(x, weight, self.bias)


def test_a_quantised_base_works_and_merging_into_it_is_a_clear_error():
    base = PackedLinear(nn.Linear(12, 8))
    layer = c3a.C3ALinear(base, 4, init="gaussian")
    x = torch.randn(5, 12)
    expected = base(x) + x @ layer.delta_weight().T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    expected = r"expected a dense floating-point weight of shape \(8, 12\)"
    got = r"got a Parameter of torch.int8 and shape \(96, 1\)"
    with pytest.raises(TypeError, match=f"cannot merge into a PackedLinear: {expected}, {got}"):
        layer.merge()
    assert not layer.merged


def test_merging_in_bfloat16_rounds_once_where_peft_rounds_the_delta_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(768, 768).bfloat16())
    ours = c3a.C3ALinear(model[0], 64, init="xavier_uniform")
    original = model[0].weight.detach().clone()
    exact = original.double() + ours.scale * c3a.circulant(ours.c3a_kernel.detach().double())
    ours.merge()
    merged = ours.base_layer.weight.double()
    ours.unmerge()
    assert torch.equal(ours.base_layer.weight, original)
    once = exact.to(torch.bfloat16).double()
    assert (merged != once).double().mean() < 1e-3  # ties of the float32 sum

    config = peft.C3AConfig(target_modules=["0"], block_size=64)
    theirs = peft.get_peft_model(model, config)
    with torch.no_grad():
        theirs.base_model.model[0].c3a_kernel["default"].copy_(ours.c3a_kernel)
    delta = theirs.base_model.model[0].get_delta_weight("default").double()
    exact_delta = exact - original.double()
    assert (delta - exact_delta).norm() / exact_delta.norm() > 1e-3  # rounded before it is added


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_copy_of_the_input_is_kept_for_the_backward(dtype):
    x = torch.randn(64, 96, dtype=dtype, requires_grad=True)
    ours = c3a.C3ALinear(nn.Linear(96, 96).to(dtype), 16)
    with saved_for_backward(ours) as saved:
        ours(x)
    assert saved.total == x.nbytes


def test_transforms_are_real_and_only_wanted_gradients_are_computed():
    layer = c3a.C3ALinear(nn.Linear(12, 8), 4, init="gaussian")
    x = torch.randn(5, 12)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        layer(x).sum().backward()
    called = {event.name for event in record.events()}
    assert "aten::_fft_c2c" not in called
    assert "c3a::block_circ_conv_kernel_grad" in called
    assert "c3a::block_circ_conv_input_grad" not in called
    assert "c3a::block_circ_conv_backward" not in called


def test_merging_is_an_index_gather_without_any_transform():
    layer = c3a.C3ALinear(nn.Linear(12, 8), 4, init="gaussian")
    with profile(activities=[ProfilerActivity.CPU]) as record:
        layer.merge()
    called = {event.name for event in record.events()}
    assert "aten::gather" in called
    assert not any("fft" in name or "eye" in name for name in called)


def test_the_model_is_unchanged_at_step_0_by_default():
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(5, 8)
    expected = base(x)
    assert torch.equal(c3a.patch_model(base, "all-linear", 2)(x), expected)


def test_a_layer_has_vmap_forward_mode_and_second_derivatives():
    layer = c3a.C3ALinear(nn.Linear(8, 4).double(), 4, init="gaussian", dtype=torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    assert torch.autograd.gradcheck(layer, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x).sin(), x)
