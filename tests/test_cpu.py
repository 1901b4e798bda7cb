"""The CPU's kernels: block sizes, instruction sets, numbers of threads, groupings of tokens."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import c3a
from c3a import _library
from c3a.memory import peak_allocated
from cases import TOLERANCE, operands, relative_error, rounds_spectra, tolerance

OPS = torch.ops.c3a
LEVELS = ("x86-64-v4-bf16", "x86-64-v4", "x86-64-v3", "x86-64-v2", "aarch64", "generic", "aten")


def results(x, w, g):
    return (
        OPS.block_circ_conv(x, w),
        OPS.block_circ_conv_add(g, x, w),
        OPS.block_circ_conv_input_grad(g, w),
        OPS.block_circ_conv_kernel_grad(g, x, w.shape[-1]),
        *OPS.block_circ_conv_backward(g, x, w),
    )


# Beside 1 to 130: every radix, alone and after others, odd and even.
LARGE = [143, 162, 168, 192, 243, 256, 286, 288, 343, 384, 500, 512, 625, 686, 720, 729, 768, 896]
LARGE += [1000, 1001, 1024, 1155, 1280, 1536, 1792, 2048, 2187, 2310, 3072, 4096]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_block_size_is_right(dtype):
    for b in [*range(1, 131), *LARGE]:
        x, w, g = operands((3,), 1, 2, b, dtype=dtype)
        exact = results(x.double(), w.double(), g.double())
        matrix = c3a.circulant(w.double())
        assert relative_error(exact[0], x.double() @ matrix.T) < 1e-13
        assert relative_error(exact[2], g.double() @ matrix) < 1e-13
        for got, expected in zip(results(x, w, g), exact, strict=True):
            assert relative_error(got, expected) < TOLERANCE[dtype], b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_full_vectors_of_tokens_end_where_their_tensors_do(dtype):
    for b in range(1, 40):
        x, w, g = operands((32,), 1, 1, b, dtype=dtype)
        exact = results(x.double(), w.double(), g.double())
        for got, expected in zip(results(x, w, g), exact, strict=True):
            assert relative_error(got, expected) < tolerance(dtype, "cpu"), b


@pytest.mark.parametrize("b", [128, 768, 945, 1024, 2048, 4096])
def test_errors_at_large_block_sizes_are_those_of_torch(b):
    """The accuracy of the smaller ones is in test_operator.py."""
    x, w, _ = operands((32,), 1, 2, b, dtype=torch.float32)
    exact = OPS.block_circ_conv(x.double(), w.double())
    y_hat = torch.einsum(
        "tjk,ijk->tik", torch.fft.rfft(x.unflatten(-1, (2, b))), torch.fft.rfft(w).conj()
    )
    torchs = relative_error(torch.fft.irfft(y_hat, n=b).flatten(1), exact)
    assert relative_error(OPS.block_circ_conv(x, w), exact) <= 1.5 * torchs


# Tokens around the lanes of every instruction set; few blocks (tokens are lanes) and many.
@pytest.mark.parametrize(("m", "n"), [(3, 2), (1, 1), (16, 16), (17, 33), (32, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_token_has_the_same_bits_in_any_company(m, n, dtype):
    x, w, g = operands((67,), m, n, 24, dtype=dtype)
    y, dx = OPS.block_circ_conv(x, w), OPS.block_circ_conv_input_grad(g, w)
    for count in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 66):
        assert torch.equal(OPS.block_circ_conv(x[:count], w), y[:count])
        assert torch.equal(OPS.block_circ_conv(x[-count:], w), y[-count:])
        assert torch.equal(OPS.block_circ_conv_input_grad(g[:count], w), dx[:count])


@pytest.mark.parametrize("blocks", [(3, 2), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_in_its_token(blocks, dtype):
    x, w, _ = operands((35,), *blocks, 12, dtype=dtype)
    y = OPS.block_circ_conv(x, w)
    spoiled = x.clone()
    spoiled[4, 3] = float("nan")
    spoiled[20, 0] = float("inf")
    got = OPS.block_circ_conv(spoiled, w)
    rest = [t for t in range(35) if t not in (4, 20)]
    assert torch.equal(got[rest], y[rest])
    assert not got[[4, 20]].isfinite().any()


@pytest.mark.skipif("C3A_SANITIZED" in os.environ, reason="takes minutes there")
@pytest.mark.parametrize("shape", [(200_000, 16, 16, 4), (100_000, 4, 4, 16)])
def test_sums_over_many_tokens_err_no_more_than_a_matrix_product(shape):
    tokens, m, n, b = shape
    x, g = torch.full((tokens, n * b), 0.37), torch.full((tokens, m * b), 0.73)
    exact = tokens * b * x[0, 0].double() * g[0, 0].double()
    dense = (g.T @ x)[0, 0].double()  # a sum of as many equal terms
    limit = max(4 * (dense * b - exact).abs(), 1e-5 * exact)
    assert (OPS.block_circ_conv_kernel_grad(g, x, b).double() - exact).abs().max() < limit


@pytest.mark.parametrize(
    "shape", [((2051,), 6, 6, 128), ((700,), 32, 16, 64), ((1500,), 1, 1, 768)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_number_of_threads_nor_vary(shape, dtype):
    x, w, g = operands(*shape, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = results(x, w, g)
        for count in (2, 3, 5, 8, 2):
            torch.set_num_threads(count)
            for got, one in zip(results(x, w, g), expected, strict=True):
                assert torch.equal(got, one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_a_low_precision_passes_unchanged_and_sums_round_to_even(dtype):
    """The identity's kernel, and sums onto a base: every bit pattern, and torch's own rounding."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    rows = numbers.view(-1, 1)
    one = torch.ones(1, 1, 1)
    y = OPS.block_circ_conv(rows, one)
    if rounds_spectra("cpu", dtype):  # takes what is subnormal for zero
        rows = torch.where(rows.abs() < torch.finfo(dtype).smallest_normal, 0, rows)
    finite = rows.isfinite()
    assert torch.equal(y[finite], rows[finite])
    assert torch.equal(y.isnan(), rows.isnan())
    assert torch.equal(y.isinf(), rows.isinf())
    base = numbers.flip(0).view(-1, 1)
    total = OPS.block_circ_conv_add(base, rows, one)
    torch.testing.assert_close(total, base + rows, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("b", [32, 48, 64, 100])
@pytest.mark.parametrize(("m", "n"), [(3, 2), (16, 16)])
def test_results_in_bfloat16_are_those_in_float32_rounded_as_torch_rounds(m, n, b):
    """Whole squares of them, and their edges; among them subnormal numbers and what is not one."""
    x, w, _ = operands((37,), m, n, b, dtype=torch.bfloat16)
    x[20, 3], x[21:24] = float("inf"), 0
    wide = OPS.block_circ_conv_add(torch.zeros(37, m * b), x, w)
    assert torch.equal(OPS.block_circ_conv(x, w).nan_to_num(), wide.bfloat16().nan_to_num())
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, wide.shape, generator=generator, dtype=torch.int16)
    bits[22] &= 0x7F  # subnormal, in a token of zeros
    base = bits.view(torch.bfloat16)
    total, expected = OPS.block_circ_conv_add(base, x, w), (base.float() + wide).bfloat16()
    torch.testing.assert_close(total, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(total[22], base[22])


def test_workspace_does_not_grow_with_the_tokens():
    _, w, _ = operands((1,), 16, 16, 256, dtype=torch.float32)

    def workspace(tokens):
        x = torch.zeros(tokens, 4096)
        forward = peak_allocated(lambda: OPS.block_circ_conv(x, w)) - x.nbytes
        backward = peak_allocated(lambda: OPS.block_circ_conv_backward(x, x, w))
        return forward, backward - x.nbytes - w.nbytes

    threads = torch.get_num_threads()
    for forward, backward in (workspace(512), workspace(4096)):
        # the kernel's spectra and the parts of its gradient are shared by all threads
        assert forward <= w.nbytes + threads * 2**20
        assert backward <= w.nbytes + 8 * 2**20 + threads * 2**20


def test_one_training_step_peaks_below_what_in_place_transforms_were_published_with():
    """rdFFT's case: 4096 features, batch 256, block 512, float32, without the frozen weight."""
    layer = c3a.C3ALinear(torch.nn.Linear(4096, 4096), 512)
    layer.base_layer.requires_grad_(False)
    optimizer = torch.optim.SGD([layer.c3a_kernel], lr=0.1)

    def step():
        x = torch.randn(256, 4096).requires_grad_()
        layer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    # x, the result's gradient and x's: the layer's result is gone when those are made
    assert 3 * 4 * 256 * 4096 <= peak_allocated(step) < 14.7e6


def test_a_training_step_that_keeps_the_result_has_four_activations_at_its_peak():
    layer = c3a.C3ALinear(torch.nn.Linear(4096, 4096), 512)

    def step():
        x = torch.randn(256, 4096).requires_grad_()
        y = layer(x)
        y.sum().backward()

    step()
    assert 4 * 4 * 256 * 4096 <= peak_allocated(step) < 18.9e6


def run(code: str, level: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "C3A_CPU_LEVEL": level},
        capture_output=True,
        text=True,
    )


def test_a_level_is_forced_by_the_environment_and_an_unknown_one_is_named():
    code = "import c3a, torch as t; print(c3a.block_circ_conv(t.ones(2), t.ones(1, 1, 2)))"
    assert run(code, "aten").stdout == "tensor([2., 2.])\n"
    failed = run(code, "x86-64-v9")
    assert failed.returncode != 0
    said = "expected C3A_CPU_LEVEL to be one of this machine's levels"
    assert said in failed.stderr
    assert "got 'x86-64-v9'" in failed.stderr


FLAGS = {
    "x86-64-v2": "pni ssse3 cx16 sse4_1 sse4_2 popcnt lahf_lm",
    "x86-64-v3": "fma movbe avx f16c avx2 bmi1 bmi2 abm",
    "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
    "x86-64-v4-bf16": "avx512_bf16",
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")
def test_the_level_is_the_highest_whose_instructions_the_system_lists():
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    expected = "aten"
    for level, needed in FLAGS.items():
        if not set(needed.split()) <= flags:
            break
        expected = level
    assert (
        run("from c3a import _library; print(_library.cpu_level())", "").stdout == f"{expected}\n"
    )


@pytest.mark.skipif("C3A_SANITIZED" not in os.environ, reason="for make sanitize")
def test_the_library_under_test_is_the_sanitized_one():
    (library,) = _library._libraries("libc3a_cpu.so")
    assert b"__asan_report_load" in library.read_bytes()


def results_at(level: str, path) -> list[torch.Tensor]:
    """Return operands, y, dx and dw, of float32 and then of bfloat16, that a level computes."""
    code = f"""
import torch, c3a
torch.manual_seed(0)
x, w, g = torch.randn(67, 4 * 96), torch.randn(2, 4, 96), torch.randn(67, 2 * 96)
ops, saved = torch.ops.c3a, []
for x, g in ((x, g), (x.bfloat16(), g.bfloat16())):
    y, (dx, dw) = ops.block_circ_conv(x, w), ops.block_circ_conv_backward(g, x, w)
    saved += [x, w, g, y, dx, dw]
torch.save(saved, {str(path)!r})
"""
    ran = run(code, level)
    if "expected C3A_CPU_LEVEL to be one of" in ran.stderr:
        pytest.skip("not a level of this machine")
    assert ran.returncode == 0, ran.stderr
    return torch.load(path)


@pytest.mark.skipif("C3A_CPU_LEVEL" in os.environ, reason="a level is forced already")
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_of_this_machine_gives_the_same_to_rounding(level, tmp_path):
    x, w, g, *got = results_at(level, tmp_path / "results.pt")[:6]
    exact = results(x.double(), w.double(), g.double())
    for result, expected in zip(got, (exact[0], *exact[4:]), strict=True):
        assert relative_error(result, expected) < TOLERANCE[torch.float32]


@pytest.mark.skipif("C3A_CPU_LEVEL" in os.environ, reason="a level is forced already")
def test_the_level_of_bfloat16_differs_in_bfloat16_alone_and_can_be_left(tmp_path):
    rounded = results_at("x86-64-v4-bf16", tmp_path / "rounded.pt")
    plain = results_at("x86-64-v4", tmp_path / "plain.pt")
    assert all(torch.equal(one, other) for one, other in zip(rounded[:6], plain[:6], strict=True))
    x, w, g = rounded[6:9]
    exact = results(x.double(), w.double(), g.double())
    exact = exact[0], *exact[4:]
    for one, other, expected in zip(rounded[9:], plain[9:], exact, strict=True):
        assert not torch.equal(one, other)
        assert relative_error(other, expected) < TOLERANCE[other.dtype]
    assert relative_error(plain[9], exact[0]) < 1.8e-3
    assert 2.5e-3 < relative_error(rounded[9], exact[0]) < 3.2e-3


@pytest.mark.skipif(not rounds_spectra("cpu", torch.bfloat16), reason="bfloat16 is not multiplied")
@pytest.mark.parametrize("shape", [((1024,), 6, 6, 128), ((512,), 16, 16, 48), ((512,), 2, 3, 243)])
def test_bfloat16_errs_at_most_a_quarter_more_than_torchs_products_of_a_lora(shape):
    """Whose two factors are in bfloat16 as well; at any rank, since roundings add to each other."""
    _, m, n, b = shape
    x, w, g = operands(*shape, dtype=torch.bfloat16)

    def products(x, first, second, g):
        x, first, second = (t.clone().requires_grad_() for t in (x, first, second))
        y = x @ first.T @ second.T
        return y.detach(), *torch.autograd.grad(y, (x, first, second), g)

    generator = torch.Generator().manual_seed(0)
    first = torch.randn(16, n * b, generator=generator).bfloat16() / 64
    second = torch.randn(m * b, 16, generator=generator).bfloat16()
    exact = products(x.double(), first.double(), second.double(), g.double())
    lora = [
        relative_error(got, expected)
        for got, expected in zip(products(x, first, second, g), exact, strict=True)
    ]
    y, *_, dx, dw = results(x, w, g)
    exact_y, *_, exact_dx, exact_dw = results(x.double(), w.double(), g.double())
    assert relative_error(y, exact_y) <= 1.25 * lora[0]
    assert relative_error(dx, exact_dx) <= 1.25 * lora[1]
    assert relative_error(dw, exact_dw) <= 1.25 * min(lora[2:])
    # In its own dtype, as autocast leaves it, a kernel's gradient has no rounding of its own.
    dw = OPS.block_circ_conv_kernel_grad(g, x, b, torch.float32)
    assert relative_error(dw, exact_dw) <= 1.05 * min(lora[2:])


@pytest.mark.skipif(not rounds_spectra("cpu", torch.bfloat16), reason="bfloat16 is not multiplied")
def test_subnormal_numbers_are_zero_in_products_of_bfloat16():
    tiny = 2.0**-130
    x, w = torch.full((3, 16), tiny), torch.ones(1, 2, 8)
    assert (OPS.block_circ_conv(x, w) == 16 * tiny).all()
    assert not OPS.block_circ_conv(x.bfloat16(), w).any()
    assert not OPS.block_circ_conv(torch.ones(3, 16).bfloat16(), tiny * w).any()
    # A product is where its sum is, and onto a base it is added by float32's rules.
    base = torch.full((3, 8), 2.0**-128, dtype=torch.bfloat16)
    assert torch.equal(OPS.block_circ_conv_add(base, x.bfloat16(), w), base)


@pytest.mark.skipif(not rounds_spectra("cpu", torch.bfloat16), reason="bfloat16 is not multiplied")
def test_a_layer_rounds_spectra_where_autocast_makes_its_result_bfloat16():
    layer = c3a.C3ALinear(torch.nn.Linear(256, 256), 32, init="gaussian")
    torch.nn.init.zeros_(layer.base_layer.weight)
    torch.nn.init.zeros_(layer.base_layer.bias)
    x, kernel = torch.randn(64, 256), layer.c3a_kernel
    exact = OPS.block_circ_conv(x, kernel, layer.scale).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), y)  # with a prepared kernel
    assert relative_error(layer(x).detach(), exact) < 1e-6
    assert y.dtype == torch.bfloat16
    assert 2.5e-3 < relative_error(y.detach(), exact) < 3.2e-3
    g = torch.randn_like(y)
    exact = OPS.block_circ_conv_backward(g.float(), x, kernel.detach(), layer.scale)
    (dw,) = torch.autograd.grad(y, kernel, g)
    assert 2e-3 < relative_error(dw, exact[1]) < 2.8e-3
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.requires_grad_())
    dx, dw = torch.autograd.grad(y, (x, kernel), g)
    assert not torch.equal(dx, dx.bfloat16().float())
    for got, expected in zip((dx, dw), exact, strict=True):
        assert got.dtype == torch.float32
        assert 2e-3 < relative_error(got, expected) < 2.8e-3
