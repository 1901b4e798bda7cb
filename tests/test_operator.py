"""The operators against the dense definition in float64, pocketfft, PyTorch's rounding."""

import numpy as np
import pytest
import scipy.fft
import torch

import c3a
from cases import (
    DTYPES,
    SHAPES,
    TOLERANCE,
    operands,
    relative_error,
    rounds_spectra,
    tolerance,
)

OPS = torch.ops.c3a


def dense_results(x, w, g):
    """y, dx and dw by the definition, in float64."""
    x, w, g = x.double().cpu(), w.double().cpu(), g.double().cpu()
    w = w.requires_grad_()
    matrix = c3a.circulant(w)
    y = x @ matrix.T
    dx = g @ matrix
    (dw,) = torch.autograd.grad(y, w, g)
    return y.detach(), dx.detach(), dw


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_product_equals_the_dense_definition(shape, dtype, device):
    x, w, g = operands(*shape, dtype=dtype, device=device)
    y, dx, dw = dense_results(x, w, g)
    pair = OPS.block_circ_conv_backward(g, x, w)
    in_place = g.clone()
    OPS.block_circ_conv_add_(in_place, x, w)
    onto = x.clone()
    onto_dw = OPS.block_circ_conv_backward_add_(onto, g, x, w)
    results = [
        (OPS.block_circ_conv(x, w), y),
        (OPS.block_circ_conv_input_grad(g, w), dx),
        (OPS.block_circ_conv_kernel_grad(g, x, w.shape[-1]), dw),
        (pair[0], dx),
        (pair[1], dw),
        (OPS.block_circ_conv_add(g, x, w), g.double().cpu() + y),
        (in_place, g.double().cpu() + y),
        (onto, x.double().cpu() + dx),
        (onto_dw, dw),
    ]
    for got, expected in results:
        assert got.dtype == dtype
        assert got.shape == expected.shape
        assert got.is_contiguous()
        assert relative_error(got.cpu(), expected) < tolerance(dtype, device)


@pytest.mark.parametrize("library", [np.fft, scipy.fft], ids=["numpy", "scipy"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if 0 not in s[0]], ids=str)
def test_every_product_equals_pocketfft(shape, library, device):
    x, w, g = operands(*shape, device=device)
    m, n, b = w.shape

    def spectra(a, blocks):
        return library.rfft(a.cpu().numpy().reshape(-1, blocks, b), axis=-1)

    x_hat, g_hat, w_hat = spectra(x, n), spectra(g, m), spectra(w, n)
    expected = [
        (OPS.block_circ_conv(x, w), np.einsum("ijk,tjk->tik", w_hat.conj(), x_hat)),
        (OPS.block_circ_conv_input_grad(g, w), np.einsum("ijk,tik->tjk", w_hat, g_hat)),
        (
            OPS.block_circ_conv_kernel_grad(g, x, b),
            np.einsum("tik,tjk->ijk", g_hat.conj(), x_hat),
        ),
    ]
    for got, result_hat in expected:
        result = torch.from_numpy(library.irfft(result_hat, n=b, axis=-1)).reshape(got.shape)
        assert relative_error(got.cpu(), result) < 1e-13


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[5], SHAPES[8], SHAPES[14]], ids=str)
def test_onto_a_linear_layer_it_equals_the_dense_definition(shape, dtype, mode, device):
    x, w, g = operands(*shape, dtype=dtype, device=device)
    weight = operands((g.shape[-1],), 1, 1, x.shape[-1], dtype=dtype, device=device)[0]
    bias = torch.arange(g.shape[-1], device=device).to(dtype)
    of_x = torch.float32 if dtype == torch.bfloat16 else dtype  # the layer's dtype may be another
    with mode():
        y = OPS.block_circ_conv_linear(x.to(of_x), weight, bias, w, 0.5)
        no_bias = OPS.block_circ_conv_linear(x, weight, None, w)
    matrix = c3a.circulant(w.double())
    expected = x.double() @ (weight.double() + 0.5 * matrix).T + bias.double()
    assert y.dtype == no_bias.dtype == dtype
    assert relative_error(y, expected) < tolerance(dtype, device)
    assert relative_error(no_bias, x.double() @ (weight.double() + matrix).T) < tolerance(
        dtype, device
    )


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("b", [2, 3, 4, 5, 7, 8, 9, 16, 22, 24, 26, 32, 35, 49, 64, 96, 100, 101])
def test_errors_in_low_precision_are_no_worse_than_those_of_torch(b, dtype, device):
    x, w, g = operands((64,), 2, 3, b, dtype=dtype, device=device)
    y, dx, dw = dense_results(x, w, g)

    def spectra(a):
        a_hat = torch.fft.rfft(a.float())
        if rounds_spectra(device, dtype):
            a_hat = torch.view_as_complex(torch.view_as_real(a_hat).bfloat16().float())
        return a_hat

    x_hat, g_hat = spectra(x.unflatten(-1, (3, b))), spectra(g.unflatten(-1, (2, b)))
    w_hat = spectra(w)

    def inverse(product, *spectra):
        return torch.fft.irfft(torch.einsum(product, *spectra), n=b).to(dtype)

    pairs = [
        (c3a.block_circ_conv(x, w), inverse("tjk,ijk->tik", x_hat, w_hat.conj()), y),
        (OPS.block_circ_conv_input_grad(g, w), inverse("tik,ijk->tjk", g_hat, w_hat), dx),
        (
            OPS.block_circ_conv_kernel_grad(g, x, b),
            inverse("tik,tjk->ijk", g_hat.conj(), x_hat),
            dw,
        ),
    ]
    for ours, torchs, expected in pairs:
        limit = 1.5 * relative_error(torchs.cpu().reshape(expected.shape), expected)
        assert relative_error(ours.cpu(), expected) <= limit


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w_dtype", DTYPES, ids=str)
def test_dtypes_may_differ_and_results_follow_their_own_operand(x_dtype, w_dtype, device):
    x, w, g = operands((9,), 2, 3, 12, device=device)
    x, w, g = x.to(x_dtype), w.to(w_dtype), g.to(x_dtype)
    y, dx, dw = dense_results(x, w, g)
    x.requires_grad_()
    w.requires_grad_()
    got = c3a.block_circ_conv(x, w)
    got_dx, got_dw = torch.autograd.grad(got, (x, w), g)
    assert (got.dtype, got_dx.dtype, got_dw.dtype) == (x_dtype, x_dtype, w_dtype)
    activations = () if w_dtype == torch.float64 else (x_dtype,)
    for result, expected in ((got, y), (got_dx, dx), (got_dw, dw)):
        limit = tolerance(result.dtype, device, *activations)
        assert relative_error(result.detach().cpu(), expected) < limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_scale_is_a_factor_of_every_result_before_it_is_rounded(dtype, device):
    x, w, g = operands((9,), 2, 3, 16, dtype=dtype, device=device)
    y, dx, dw = dense_results(x, w, g)
    x.requires_grad_()
    w.requires_grad_()
    scale = 1 / 768
    got = c3a.block_circ_conv(x, w, scale)
    results = [(got, y)]
    results += zip(torch.autograd.grad(got, (x, w), g, retain_graph=True), (dx, dw), strict=True)
    results += [(torch.autograd.grad(got, x, g, retain_graph=True)[0], dx)]
    results += [(torch.autograd.grad(got, w, g)[0], dw)]
    for result, expected in results:
        error = relative_error(result.detach().cpu(), expected * scale)
        assert error < 2 * tolerance(dtype, device)  # float16: subnormal numbers


def test_a_gradient_in_float64_is_not_computed_in_float32(device):
    x, w, g = operands((9,), 2, 3, 16, device=device)
    x, w = x.float(), w.float()
    expected = torch.ops.c3a.block_circ_conv_backward(g, x.double(), w.double())
    got = torch.ops.c3a.block_circ_conv_backward(g, x, w)
    for result, exact in zip(got, expected, strict=True):
        assert result.dtype == torch.float32
        assert relative_error(result.cpu(), exact.cpu()) < 1e-7


def test_a_gradient_is_not_rounded_to_the_other_operands_dtype_on_the_way(device):
    x, w, g = operands((9,), 2, 3, 16, device=device)
    v = w.flip(0)
    x, w, half = x.float(), w.float().requires_grad_(), g.half()
    dx, _ = OPS.block_circ_conv_backward(half, x, w)  # differentiable: by its two halves
    expected = half.double().cpu() @ c3a.circulant(w.detach().double()).cpu()
    assert relative_error(dx.detach().cpu(), expected) < TOLERANCE[torch.float32]
    wide, narrow = g.float().requires_grad_(), x.half()
    dw = OPS.block_circ_conv_kernel_grad(wide, narrow, 16)
    (dg,) = torch.autograd.grad(dw, wide, v.to(dw.dtype))
    expected = narrow.double().cpu() @ c3a.circulant(v.to(dw.dtype).double()).T.cpu()
    assert relative_error(dg.cpu(), expected) < TOLERANCE[torch.float32]


def test_a_kernel_gradient_is_not_rounded_to_the_dtype_of_the_activations(device):
    x, _, g = operands((64,), 1, 2, 32, dtype=torch.bfloat16, device=device)
    expected = dense_results(x, torch.zeros(1, 2, 32), g)[2]
    dw = OPS.block_circ_conv_kernel_grad(g, x, 32, torch.float32)
    assert dw.dtype == torch.float32
    limit = tolerance(torch.float32, device, x.dtype)
    assert relative_error(dw.cpu(), expected) < limit
    assert not torch.equal(dw, dw.to(x.dtype).float())


@pytest.mark.parametrize("b", [6, 32])
def test_a_result_may_be_wider_than_its_operands(b, device):
    x, w, g = operands((9,), 2, 3, b, device=device)
    x, g = x.float(), g.float()
    expected = dense_results(x, w, g)[2]
    dw = OPS.block_circ_conv_kernel_grad(g, x, b, torch.float64)
    w.requires_grad_()
    (through_autograd,) = torch.autograd.grad(c3a.block_circ_conv(x, w), w, g)
    for got in (dw, through_autograd):
        assert got.dtype == torch.float64
        assert relative_error(got.cpu(), expected) < TOLERANCE[torch.float64]


def test_layout_of_the_operands_does_not_matter(device):
    x, w, g = operands((6, 4), 2, 3, 8, device=device)
    y, (dx, dw) = OPS.block_circ_conv(x, w), OPS.block_circ_conv_backward(g, x, w)

    def strided(t):
        return torch.stack([t, t], dim=-1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1)

    x_s, w_s, g_s = strided(x), strided(w), strided(g)
    assert not any(t.is_contiguous() for t in (x_s, w_s, g_s))
    torch.testing.assert_close(OPS.block_circ_conv(x_s, w_s), y)
    torch.testing.assert_close(OPS.block_circ_conv_input_grad(g_s, w_s), dx)
    torch.testing.assert_close(OPS.block_circ_conv_kernel_grad(g_s, x_s, 8), dw)
    torch.testing.assert_close(OPS.block_circ_conv_backward(g_s, x_s, w_s), (dx, dw))
    expanded = x[:1, :1].expand(6, 4, -1)
    torch.testing.assert_close(OPS.block_circ_conv(expanded, w)[5, 3], y[0, 0])


def test_the_sum_in_place_writes_the_base_itself_however_it_lies(device):
    x, w, base = operands((6, 4), 2, 3, 8, device=device)
    expected = OPS.block_circ_conv_add(base, x, w, 0.5)
    whole = base.clone()
    OPS.block_circ_conv_add_(whole, x, w, 0.5)
    assert torch.equal(whole, expected)
    rows = torch.zeros(6, 4, 32, device=device, dtype=base.dtype)
    rows[..., :16] = base
    OPS.block_circ_conv_add_(rows[..., :16], x, w, 0.5)
    assert torch.equal(rows[..., :16], expected)
    assert torch.equal(rows[..., 16:], torch.zeros_like(rows[..., 16:]))


def test_the_pair_writes_the_gradient_itself_however_it_lies(device):
    x, w, g = operands((6, 4), 2, 3, 8, device=device)
    dx, dw = OPS.block_circ_conv_backward(g, x, w, 0.5)
    given = x.cos()
    rows = torch.zeros(6, 4, 48, device=device, dtype=x.dtype)
    for onto in (given.clone(), rows[..., 24:], rows.mT.contiguous().mT[..., :24]):
        onto.copy_(given)
        got = OPS.block_circ_conv_backward_add_(onto, g, x, w, 0.5)
        torch.testing.assert_close(onto, given + dx)
        assert torch.equal(got, dw)
    assert torch.equal(rows[..., :24], torch.zeros_like(rows[..., :24]))


@pytest.mark.parametrize("shift", [0, 1, 5])
@pytest.mark.parametrize("shared", ["grad_output", "x", "w"])
def test_the_pair_in_place_may_overlap_with_what_it_reads(shared, shift, device):
    memory = operands((40,), 2, 2, 8, device=device)[0].flatten()
    x, w, g = operands((32,), 2, 2, 8, device=device)
    given = {"grad_output": g, "x": x, "w": w}
    place = memory[shift : shift + given[shared].numel()]
    given[shared] = place.view(given[shared].shape)
    dx = memory[: 32 * 16].view(32, 16)
    before = {name: t.clone() for name, t in given.items()}
    expected, dw = OPS.block_circ_conv_backward(*before.values())
    expected += dx
    got = OPS.block_circ_conv_backward_add_(dx, *given.values())
    torch.testing.assert_close(dx, expected)
    assert torch.equal(got, dw)


@pytest.mark.parametrize("dtypes", [(0, 1, 0), (1, 0, 0), (2, 0, 0), (0, 2, 1)])
def test_a_gradient_that_is_added_onto_keeps_its_dtype(dtypes, device):
    kinds = (torch.float32, torch.bfloat16, torch.float64)
    x, w, g = operands((9,), 2, 3, 8, device=device)
    x, w, g = x.bfloat16(), w.bfloat16(), g.bfloat16()  # exact in each of them
    onto = x.to(kinds[dtypes[0]], copy=True)
    dw = OPS.block_circ_conv_backward_add_(onto, g.to(kinds[dtypes[1]]), x, w.to(kinds[dtypes[2]]))
    _, dx, exact_dw = dense_results(x, w, g)
    activations = () if 2 in dtypes else (x.dtype,)
    for got, exact in ((onto, x.double().cpu() + dx), (dw, exact_dw)):
        assert relative_error(got.cpu(), exact) < tolerance(got.dtype, device, *activations)
    assert (onto.dtype, dw.dtype) == (kinds[dtypes[0]], kinds[dtypes[2]])


@pytest.mark.parametrize("shift", [0, 1, 5])
def test_the_sum_in_place_may_overlap_with_what_it_reads(shift, device):
    memory = operands((40,), 2, 2, 8, device=device)[0].flatten()
    w = operands((1,), 2, 2, 8, device=device)[1]
    base, x = memory[: 32 * 16].view(32, 16), memory[shift : shift + 32 * 16].view(32, 16)
    expected = OPS.block_circ_conv_add(base, x, w)
    OPS.block_circ_conv_add_(base, x, w)
    assert torch.equal(base, expected)


def test_inputs_are_not_changed_and_results_are_new(device):
    x, w, g = operands((3,), 2, 2, 4, device=device)
    copies = [t.clone() for t in (x, w, g)]
    OPS.block_circ_conv(x, w)
    OPS.block_circ_conv_backward(g, x, w)
    OPS.block_circ_conv_add(g, x, w)
    assert all(torch.equal(a, b) for a, b in zip((x, w, g), copies, strict=True))


def test_a_kernel_of_no_tokens_has_zero_gradient(device):
    x, w, _ = operands((0,), 2, 3, 4, device=device)
    x.requires_grad_()
    w.requires_grad_()
    y = c3a.block_circ_conv(x, w)
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert y.shape == (0, 8)
    assert dx.shape == (0, 12)
    assert torch.equal(dw, torch.zeros_like(w))
    with torch.no_grad():
        dw = OPS.block_circ_conv_backward_add_(dx, y, x, w)
    assert torch.equal(dw, torch.zeros_like(w))


def test_inference_mode_and_no_grad_give_the_same_result(device):
    x, w, _ = operands((3,), 2, 2, 4, device=device)
    with torch.no_grad():
        expected = c3a.block_circ_conv(x, w.requires_grad_())
    with torch.inference_mode():
        assert torch.equal(c3a.block_circ_conv(x, w), expected)
    assert not expected.requires_grad
