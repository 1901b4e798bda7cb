"""The CUDA library's two paths, its plan cache, its limits and errors.

On a GPU with ``--device cuda``; elsewhere on the emulated machine of ``tests/cuda_emulation``
(``make emulated``), where more can be asked: other devices, failing calls, captured streams.
"""

import ctypes
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

import c3a
from c3a import _library, cuda
from cases import DTYPES, TOLERANCE, operands, relative_error
from test_operator import dense_results

OPS = torch.ops.c3a
LENGTHS = [32, 64, 128, 256, 512, 1024, 2048]


def _has_cuda_library() -> bool:
    try:
        cuda.path()
    except RuntimeError:
        return False
    return True


pytestmark = pytest.mark.skipif(not _has_cuda_library(), reason="needs the CUDA library, loaded")


@pytest.fixture(autouse=True)
def on_the_librarys_device(device):
    if "C3A_EMULATED" not in os.environ and device.type != "cuda":
        pytest.skip("needs --device cuda")


@pytest.fixture(autouse=True)
def settings():
    """Leaves the library's settings as they were."""
    path, limit = cuda.path(), cuda.temporary_limit()
    capacity = cuda.plan_cache()["capacity"]
    yield
    cuda.set_path(path)
    cuda.set_temporary_limit(limit)
    cuda.set_plan_cache_capacity(capacity)


class Machine:
    """The emulated machine, by its library's functions."""

    def __init__(self):
        preloaded = ctypes.CDLL(None)
        has = hasattr(preloaded, "c3a_emulation_events")
        self._library = preloaded if has else ctypes.CDLL(_library._libraries("libc3a_cpu.so")[0])
        self._library.c3a_emulation_events.restype = ctypes.c_char_p

    def events(self) -> list[str]:
        """Return the launches and executions of cuFFT since the last call."""
        return self._library.c3a_emulation_events().decode().split("\n")[:-1]

    def fail(self, call: str, code: int) -> None:
        """Let the next call of that name return ``code``."""
        self._library.c3a_emulation_fail(call.encode(), code)

    def use(self, device: int = 0, stream: int = 0) -> None:
        self._library.c3a_emulation_use(device, stream)

    def capture(self, on: bool) -> None:
        self._library.c3a_emulation_capture(int(on))

    def be(self, capability: int = 90, shared_kib: int = 227, has_code: bool = True) -> None:
        self._library.c3a_emulation_device(capability, shared_kib << 10, int(has_code))


@pytest.fixture
def machine():
    if "C3A_EMULATED" not in os.environ:
        pytest.skip("needs the emulated machine")
    machine = Machine()
    machine.events()
    yield machine
    machine.use()
    machine.be()


def every_product(x, w, g):
    """y, dx, dw; x + dx in place with dw; base + y with g for the base, and the same in place."""
    in_place, onto = g.clone(), x.clone()
    OPS.block_circ_conv_add_(in_place, x, w)
    dx, dw = OPS.block_circ_conv_backward(g, x, w)
    pair = [onto, OPS.block_circ_conv_backward_add_(onto, g, x, w)]
    return [OPS.block_circ_conv(x, w), dx, dw, *pair, OPS.block_circ_conv_add(g, x, w), in_place]


def expected_products(x, w, g):
    y, dx, dw = dense_results(x, w, g)
    pair = [x.double().cpu() + dx, dw]
    return [y, dx, dw, *pair, y + g.double().cpu(), y + g.double().cpu()]


def assert_right(x, w, g):
    for got, expected in zip(every_product(x, w, g), expected_products(x, w, g), strict=True):
        assert got.dtype == x.dtype
        assert relative_error(got.cpu(), expected) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("path", ["fused", "cufft"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", LENGTHS)
def test_both_paths_are_right_for_every_length_of_the_fused_one(b, dtype, path, device):
    cuda.set_path(path)
    m, n = (2, 3) if b < 512 else (1, 2)
    assert_right(*operands((5,), m, n, b, dtype=dtype, device=device))


@pytest.mark.parametrize("tokens", [1, 3, 4, 7, 8, 9, 17])
def test_the_fused_path_is_right_for_every_number_of_tokens(tokens, device):
    cuda.set_path("fused")
    assert_right(*operands((tokens,), 2, 9, 64, dtype=torch.float32, device=device))


@pytest.mark.parametrize(("shared_kib", "tile"), [(227, 8), (40, 4)])
def test_a_tile_has_as_many_tokens_as_shared_memory_has_room_for(shared_kib, tile, device, machine):
    machine.be(shared_kib=shared_kib)
    for tokens in (1, 4, 5, 8, 17):
        x, w, g = operands((tokens,), 2, 9, 64, dtype=torch.float32, device=device)
        machine.events()
        OPS.block_circ_conv(x, w)
        (launch,) = [event for event in machine.events() if "convolve" in event]
        assert f" {-(-tokens // tile)} x " in launch
        assert_right(x, w, g)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 40), (33, 1), (5, 18), (17, 3)])
def test_the_fused_path_is_right_for_any_number_of_blocks(m, n, device):
    cuda.set_path("fused")
    assert_right(*operands((9,), m, n, 32, dtype=torch.float32, device=device))


@pytest.mark.parametrize("path", ["fused", "cufft"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_memory_need_not_be_aligned(shift, dtype, path, device):
    """Results of single operators are new and aligned; in place, the base itself is shifted."""
    cuda.set_path(path)

    def shifted(t):
        memory = torch.empty(t.numel() + shift, dtype=t.dtype, device=t.device)
        memory[shift:] = t.flatten()
        return memory[shift:].view(t.shape)

    x, w, g = operands((5,), 2, 3, 32, dtype=dtype, device=device)
    x_s, w_s, g_s = shifted(x), shifted(w), shifted(g)
    assert all(t.data_ptr() % 16 for t in (x_s, w_s, g_s))
    results = every_product(x_s, w_s, g_s)
    OPS.block_circ_conv_add_(g_s, x_s, w_s)
    expected = expected_products(x, w, g)
    for got, exact in zip([*results, g_s], [*expected, expected[-1]], strict=True):
        assert relative_error(got.cpu(), exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES[1:], ids=str)
def test_the_base_may_have_another_dtype(base_dtype, x_dtype, device):
    x, w, g = operands((5,), 2, 3, 64, device=device)
    x, w, base = x.to(x_dtype), w.float(), g.to(base_dtype)
    got = OPS.block_circ_conv_add(base, x, w)
    exact = dense_results(x, w, base)[0] + base.double().cpu()
    assert got.dtype == base_dtype
    assert relative_error(got.cpu(), exact) < TOLERANCE[base_dtype]


@pytest.mark.parametrize(
    ("path", "b"), [("fused", 32), ("fused", 64), ("cufft", 6), ("cufft", 7), ("cufft", 64)]
)
def test_a_tokens_result_does_not_depend_on_its_batch(path, b, device):
    """To the bit on the fused path; cuFFT promises no equal bits for batches of other sizes."""
    cuda.set_path(path)
    x, w, g = operands((21,), 3, 2, b, dtype=torch.float32, device=device)
    y, dx = OPS.block_circ_conv(x, w), OPS.block_circ_conv_input_grad(g, w)
    for t in (0, 7, 8, 20):
        for alone, whole in (
            (OPS.block_circ_conv(x[t], w), y[t]),
            (OPS.block_circ_conv_input_grad(g[t], w), dx[t]),
        ):
            if path == "fused":
                assert torch.equal(alone, whole)
            else:
                assert relative_error(alone.cpu(), whole.cpu()) < TOLERANCE[torch.float32]


def test_a_thread_block_goes_through_several_groups_of_output_blocks(device):
    """Enough tiles of tokens that groups of output blocks do not get thread blocks of their own."""
    cuda.set_path("fused")
    assert_right(*operands((60,), 5, 1, 512, dtype=torch.float32, device=device))


# Every device function, as small as it can be: for the slowest of the sanitizers.
@pytest.mark.parametrize(
    ("path", "tokens", "m", "n", "b"),
    [
        *[("fused", 9, 2, 1, b) for b in (32, 64, 256)],
        ("fused", 70, 3, 1, 512),  # several groups of output blocks in a thread block
        ("cufft", 3, 2, 2, 2),
        ("cufft", 40, 2, 9, 2),  # long tiles: narrow for the forward, wide for the input gradient
        ("cufft", 160, 2, 2, 2),  # a cut sum
    ],
)
def test_tiny_shapes_through_every_device_function(path, tokens, m, n, b, device):
    cuda.set_path(path)
    x, w, g = operands((tokens,), m, n, b, dtype=torch.float32, device=device)
    y, dx, dw = dense_results(x, w, g)
    for got, expected in (
        (OPS.block_circ_conv(x, w), y),
        (OPS.block_circ_conv_input_grad(g, w), dx),
        (OPS.block_circ_conv_kernel_grad(g, x, b) if path == "cufft" else dw, dw),
    ):
        assert relative_error(got.cpu(), expected) < TOLERANCE[torch.float32]


def test_what_is_not_finite_stays_in_its_token(device):
    x, w, _ = operands((9,), 2, 3, 64, dtype=torch.float32, device=device)
    expected = OPS.block_circ_conv(x, w)
    x[4, 17] = float("nan")
    got = OPS.block_circ_conv(x, w)
    others = [t for t in range(9) if t != 4]
    assert torch.equal(got[others], expected[others])
    assert got[4].isnan().any()


@pytest.mark.parametrize("b", [6, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_tokens_give_the_same_results(b, dtype, device):
    cuda.set_path("cufft")
    x, w, g = operands((23,), 2, 3, b, dtype=dtype, device=device)
    whole = every_product(x, w, g)
    # Room for five tokens: spectra of 2 and of 3 blocks, and twice those of 3. 5, 5, 5, 5 and 3.
    complex_bytes = 16 if dtype == torch.float64 else 8
    cuda.set_temporary_limit(5 * (2 + 3 + 2 * 3) * (b // 2 + 1) * complex_bytes)
    for got, exact in zip(every_product(x, w, g), whole, strict=True):
        assert relative_error(got.cpu(), exact.cpu()) < TOLERANCE[dtype]


def test_the_limit_decides_how_many_chunks_there_are(device, machine):
    cuda.set_path("cufft")
    x, w, _ = operands((23,), 2, 3, 6, dtype=torch.bfloat16, device=device)

    def transforms():
        machine.events()
        OPS.block_circ_conv(x, w)
        return sum("cufftExecR2C" in event for event in machine.events())

    assert transforms() == 1 + 1  # the kernel's and the activations'
    per_token = (2 + 3 + 2 * 3) * 4 * 8
    for tokens, chunks in ((12, 2), (11, 3), (5, 5), (1, 23)):
        cuda.set_temporary_limit(tokens * per_token)
        assert transforms() == 1 + chunks
    cuda.set_temporary_limit(1)
    assert transforms() == 1 + 23


@pytest.mark.parametrize("shape", [((700,), 2, 3, 6), ((300,), 1, 1, 64), ((129,), 20, 33, 2)])
def test_the_kernel_gradient_is_right_and_deterministic_when_its_sums_are_cut(shape, device):
    x, w, g = operands(*shape, dtype=torch.float32, device=device)
    b = w.shape[-1]
    results = [OPS.block_circ_conv_kernel_grad(g, x, b) for _ in range(3)]
    assert all(torch.equal(result, results[0]) for result in results)
    assert relative_error(results[0].cpu(), dense_results(x, w, g)[2]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("m", "n", "tokens"), [(32, 33, 32), (40, 32, 33), (31, 40, 40)])
def test_large_products_by_cublas_are_right(m, n, tokens, device):
    cuda.set_path("cufft")
    for dtype in (torch.float64, torch.float32):
        assert_right(*operands((tokens,), m, n, 4, dtype=dtype, device=device))


# Which path


def launched(machine, *arguments) -> str:
    machine.events()
    OPS.block_circ_conv(*arguments)
    events = " ".join(machine.events())
    return "fused" if "convolve" in events else "cufft" if "cufftExec" in events else events


def test_the_path_follows_the_rule(device, machine):
    def path(tokens, m, n, b, dtype=torch.float32):
        return launched(machine, *operands((tokens,), m, n, b, dtype=dtype, device=device)[:2])

    assert path(2, 1, 2, 64) == "fused"
    assert path(2, 1, 2, 64, torch.bfloat16) == "fused"
    assert path(2, 1, 2, 64, torch.float64) == "cufft"
    assert path(2, 1, 2, 96) == "cufft"
    assert path(2, 1, 2, 16) == "cufft"
    assert path(2, 1, 1, 4096) == "cufft"
    machine.be(shared_kib=64)
    assert path(2, 1, 10, 256) == "fused"
    assert path(2, 1, 20, 256) == "cufft"  # no tile fits
    # With tiles of 4, kernel spectra that pass through the cache too often: about m n > 32 (m + n)
    assert path(8, 15, 60, 32) == "fused"
    assert path(64, 80, 80, 32) == "cufft"


def test_paths_can_be_forced_and_names_are_checked(device, machine):
    x, w, _ = operands((2,), 1, 2, 64, dtype=torch.float32, device=device)
    for path in ("fused", "cufft", "auto"):
        cuda.set_path(path)
        assert cuda.path() == path
        assert launched(machine, x, w) == ("cufft" if path == "cufft" else "fused")
    with pytest.raises(
        RuntimeError, match="expected the CUDA path to be auto, fused or cufft, got fast"
    ):
        cuda.set_path("fast")
    assert cuda.path() == "auto"


# Prepared kernels


def every_prepared_product(x, w_hat, g, b):
    """Y, base + y with g for the base, and the same in place."""
    in_place = g.clone()
    OPS.block_circ_conv_prepared_add_(in_place, x, w_hat, b)
    return [
        OPS.block_circ_conv_prepared(x, w_hat, b),
        OPS.block_circ_conv_prepared_add(g, x, w_hat, b),
        in_place,
    ]


def assert_equal_bits_when_prepared(x, w, g, w_hat, w_hat_transposed, scale):
    in_place = g.clone()
    OPS.block_circ_conv_add_(in_place, x, w, scale)
    expected = [OPS.block_circ_conv(x, w, scale), OPS.block_circ_conv_add(g, x, w, scale), in_place]
    b = w.shape[-1]
    for got, exact in zip(every_prepared_product(x, w_hat, g, b), expected, strict=True):
        assert torch.equal(got, exact)
    dx = OPS.block_circ_conv_prepared(g, w_hat_transposed, b)
    assert torch.equal(dx, OPS.block_circ_conv_input_grad(g, w, scale))


@pytest.mark.parametrize(
    ("dtype", "b"),
    [
        *[(dtype, b) for dtype in (torch.float32, torch.bfloat16) for b in (6, 7, 32, 128, 2048)],
        *[(torch.float64, b) for b in (6, 7, 32)],
    ],
    ids=str,
)
def test_a_prepared_kernel_gives_the_bits_that_the_kernel_gives(dtype, b, device):
    x, w, g = operands((9,), 2, 3, b, dtype=dtype, device=device)
    w_hat, w_hat_transposed = (OPS.prepare(w, None, transposed, 1 / 3) for transposed in (0, 1))
    assert_equal_bits_when_prepared(x, w, g, w_hat, w_hat_transposed, 1 / 3)
    y, dx, _ = dense_results(x, w, g)
    for got, exact in (
        (3 * OPS.block_circ_conv_prepared(x, w_hat, b).double(), y),
        (3 * OPS.block_circ_conv_prepared(g, w_hat_transposed, b).double(), dx),
    ):
        assert relative_error(got.cpu(), exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("b", [6, 32, 256])
def test_every_kernel_of_a_stack_is_prepared(b, device):
    stack = torch.randn(2, 3, 3, 2, b, device=device)
    x, _, g = operands((5,), 3, 2, b, dtype=torch.float32, device=device)
    w_hats, transposed = OPS.prepare(stack), OPS.prepare(stack, transposed=True)
    assert w_hats.shape[:4] == (2, 3, 3, 2)
    assert transposed.shape[:4] == (2, 3, 2, 3)
    for i in range(2):
        for j in range(3):
            where = (x, stack[i, j], g, w_hats[i, j], transposed[i, j], 1.0)
            assert_equal_bits_when_prepared(*where)


@pytest.mark.parametrize("b", [6, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_prepared_kernel_need_not_be_aligned(dtype, b, device):
    x, w, g = operands((5,), 2, 3, b, dtype=dtype, device=device)
    w_hat = OPS.prepare(w)
    memory = torch.empty(w_hat.numel() + 1, dtype=dtype, device=device)
    shifted = memory[1:].view(w_hat.shape).copy_(w_hat)
    expected = every_prepared_product(x, w_hat, g, b)
    for got, exact in zip(every_prepared_product(x, shifted, g, b), expected, strict=True):
        assert torch.equal(got, exact)


@pytest.mark.parametrize("b", LENGTHS)
def test_a_prepared_kernel_is_understood_by_the_other_path(b, device):
    """It is laid out for the fused path, whatever the setting was and is."""
    x, w, g = operands((5,), 3, 2, b, dtype=torch.float32, device=device)
    made = {}
    for path in ("fused", "cufft"):
        cuda.set_path(path)
        made[path] = [OPS.prepare(w), OPS.prepare(w, transposed=True)]
    for one, other in zip(*made.values(), strict=True):
        assert torch.equal(one, other)
    y, dx, _ = dense_results(x, w, g)
    base = g.double().cpu()
    w_hat, w_hat_transposed = made["cufft"]
    got = every_prepared_product(x, w_hat, g, b)
    got.append(OPS.block_circ_conv_prepared(g, w_hat_transposed, b))
    for result, exact in zip(got, [y, y + base, y + base, dx], strict=True):
        assert relative_error(result.cpu(), exact) < TOLERANCE[torch.float32]


def test_a_prepared_kernel_is_multiplied_by_cublas_where_a_kernel_is(device):
    for dtype in (torch.float64, torch.float32):
        x, w, g = operands((33,), 32, 40, 4, dtype=dtype, device=device)
        got = OPS.block_circ_conv_prepared(x, OPS.prepare(w), 4)
        transposed = OPS.block_circ_conv_prepared(g, OPS.prepare(w, transposed=True), 4)
        y, dx, _ = dense_results(x, w, g)
        assert relative_error(got.cpu(), y) < TOLERANCE[dtype]
        assert relative_error(transposed.cpu(), dx) < TOLERANCE[dtype]


def test_a_prepared_kernel_is_not_transformed_again(device, machine):
    def steps(tokens, m, n, b, path="auto"):
        x, w, _ = operands((tokens,), m, n, b, dtype=torch.float32, device=device)
        w_hat = OPS.prepare(w)
        cuda.set_path(path)
        machine.events()
        OPS.block_circ_conv_prepared(x, w_hat, b)
        launches = [event for event in machine.events() if "limit" not in event]
        return [re.search(r"\w+", event)[0] for event in launches]

    assert steps(1, 3, 2, 128) == ["convolve"]
    by_cufft = ["cufftExecR2C", "product_of_bins", "cufftExecC2R"]
    assert steps(1, 3, 2, 6) == by_cufft
    assert steps(1, 3, 2, 128, "cufft") == ["slots_to_bins", *by_cufft]
    machine.be(shared_kib=64)
    assert steps(64, 80, 80, 32) == ["convolve"]  # where a kernel would go by cuFFT
    assert steps(1, 3, 80, 128) == ["slots_to_bins", *by_cufft]  # no tile fits


def test_a_graph_captures_a_prepared_kernel_without_a_plan(device, machine):
    x, w, _ = operands((1,), 3, 2, 64, dtype=torch.float32, device=device)
    w_hat = OPS.prepare(w)
    cuda.clear_plan_cache()
    machine.capture(True)
    try:
        got = OPS.block_circ_conv_prepared(x, w_hat, 64)
    finally:
        machine.capture(False)
    assert torch.equal(got, OPS.block_circ_conv(x, w))
    assert kept() == set()


# The plan cache


def run_cufft(tokens, b, device, dtype=torch.float32):
    x, w, _ = operands((tokens,), 1, 1, b, dtype=dtype, device=device)
    return OPS.block_circ_conv(x, w)


def kept() -> set[tuple]:
    plans = cuda.plan_cache()["plans"]
    return {(p["length"], p["batch"], p["transform"]) for p in plans}


def test_plans_are_kept_by_length_batch_and_type(device):
    cuda.set_path("cufft")
    cuda.clear_plan_cache()
    before = cuda.plan_cache()
    run_cufft(3, 6, device)
    # The kernel, one transform, the activations, three, and those back.
    assert kept() == {(6, 1, "R2C"), (6, 3, "R2C"), (6, 3, "C2R")}
    run_cufft(3, 6, device)
    cache = cuda.plan_cache()
    assert cache["misses"] - before["misses"] == 3
    assert cache["hits"] - before["hits"] == 3
    run_cufft(3, 6, device, torch.float64)
    run_cufft(3, 7, device)
    assert len(kept()) == 9
    cuda.clear_plan_cache()
    assert kept() == set()


def test_batches_of_similar_sizes_share_plans(device):
    cuda.set_path("cufft")
    cuda.clear_plan_cache()
    for tokens in range(129, 257):
        OPS.block_circ_conv_kernel_grad(
            *(torch.ones(tokens, 3, device=device, dtype=torch.bfloat16) for _ in range(2)), 3
        )
    assert len({batch for _, batch, kind in kept() if kind == "R2C"}) == 8
    for tokens in (15, 16, 17, 31, 33, 100):
        assert_right(*operands((tokens,), 1, 2, 5, dtype=torch.float32, device=device))


def test_the_least_recently_used_plans_are_dropped(device):
    cuda.set_path("cufft")
    cuda.clear_plan_cache()
    cuda.set_plan_cache_capacity(6)
    for b in (5, 6):
        run_cufft(2, b, device)
    run_cufft(2, 5, device)
    run_cufft(2, 7, device)
    assert {length for length, _, _ in kept()} == {5, 7}
    cuda.set_plan_cache_capacity(2)
    assert len(kept()) == 2
    x, w, g = operands((2,), 1, 1, 9, dtype=torch.float32, device=device)
    assert_right(x, w, g)  # more plans than room
    for wrong in (0, -1):
        with pytest.raises(RuntimeError, match=f"capacity >= 1, got {wrong}"):
            cuda.set_plan_cache_capacity(wrong)
        with pytest.raises(RuntimeError, match=f"a limit in bytes >= 1, got {wrong}"):
            cuda.set_temporary_limit(wrong)


def test_threads_share_the_cache(device):
    """Many threads, few plans, constant eviction: every result right, no plan used by two."""
    cuda.set_path("cufft")
    cuda.set_plan_cache_capacity(3)
    cases = [
        operands((t,), 2, 1, b, dtype=torch.float32, device=device)
        for t, b in ((2, 5), (3, 6), (2, 7), (2, 6))
    ]
    expected = [OPS.block_circ_conv(x, w) for x, w, _ in cases]
    results = []

    def work(seed):
        for i in range(8):
            case = (seed + i) % len(cases)
            x, w, _ = cases[case]
            results.append((case, OPS.block_circ_conv(x, w)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 * 8
    assert all(torch.equal(result, expected[case]) for case, result in results)
    assert len(kept()) <= 3


def test_a_functions_limit_of_shared_memory_is_the_same_for_every_launch(device, machine):
    """Between one thread's setting it and its launch, another thread may set it."""
    cuda.set_path("fused")
    for n in (8, 16):
        OPS.block_circ_conv(*operands((2,), 1, n, 256, dtype=torch.float32, device=device)[:2])
    limits = {event for event in machine.events() if event.startswith("shared memory limit")}
    assert limits == {f"shared memory limit {227 << 10}"}


def test_threads_launch_the_fused_path_with_different_amounts_of_shared_memory(device):
    cuda.set_path("fused")
    cases = [operands((2,), 1, n, 256, dtype=torch.float32, device=device) for n in (1, 4, 8, 16)]
    expected = [OPS.block_circ_conv(x, w) for x, w, _ in cases]
    results = []

    def work(case):
        for _ in range(6):
            results.append((case, OPS.block_circ_conv(*cases[case][:2])))

    threads = [threading.Thread(target=work, args=(case,)) for case in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6 * len(cases)
    assert all(torch.equal(result, expected[case]) for case, result in results)


def test_a_plan_that_a_graph_captured_is_never_dropped(device, machine):
    cuda.set_path("cufft")
    cuda.clear_plan_cache()
    machine.use(stream=1)
    expected = run_cufft(2, 11, device)
    machine.use(stream=2)
    machine.capture(True)
    try:
        assert torch.equal(run_cufft(2, 11, device), expected)
        with pytest.raises(
            RuntimeError,
            match=r"plan for 1 R2C transforms of length 10 on cuda:0 is "
            r"needed while a CUDA graph is captured.*run the operator once",
        ):
            run_cufft(2, 10, device)
    finally:
        machine.capture(False)
    captured = kept()
    assert all(plan["captured"] for plan in cuda.plan_cache()["plans"])
    cuda.set_plan_cache_capacity(1)
    run_cufft(2, 10, device)
    assert captured <= kept()
    cuda.clear_plan_cache()
    assert kept() == captured


def test_plans_belong_to_their_device(device, machine):
    cuda.set_path("cufft")
    cuda.clear_plan_cache()
    for which in (0, 1):
        machine.use(device=which)
        run_cufft(2, 6, device)
    plans = cuda.plan_cache()["plans"]
    devices = [plan["device"] for plan in plans if plan["length"] == 6]
    assert sorted(devices) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("path", ["fused", "cufft"])
def test_everything_is_enqueued_on_the_current_stream_of_the_current_device(path, device, machine):
    """The emulated machine stops the process at work on any other stream."""
    cuda.set_path(path)
    case = operands((5,), 2, 3, 64, dtype=torch.bfloat16, device=device)
    for which in (0, 1):
        for stream in (1, 2, 1, 0):
            machine.use(device=which, stream=stream)
            assert_right(*case)


# Errors

CUFFT_FAILURES = [
    ("cufftCreate", 5, "CUFFT_INTERNAL_ERROR"),
    ("cufftSetAutoAllocation", 1, "CUFFT_INVALID_PLAN"),
    ("cufftMakePlanMany64", 2, "CUFFT_ALLOC_FAILED"),
    ("cufftSetStream", 1, "CUFFT_INVALID_PLAN"),
    ("cufftSetWorkArea", 4, "CUFFT_INVALID_VALUE"),
    ("cufftExecR2C", 6, "CUFFT_EXEC_FAILED"),
    ("cufftExecC2R", 99, "an unknown cuFFT error"),
]


@pytest.mark.parametrize(("call", "code", "name"), CUFFT_FAILURES)
def test_an_error_of_cufft_is_named_and_nothing_is_broken_by_it(call, code, name, device, machine):
    cuda.set_path("cufft")
    cuda.clear_plan_cache()
    machine.fail(call, code)
    shown = "cufftExec" if call.startswith("cufftExec") else call
    with pytest.raises(
        RuntimeError,
        match=rf"c3a.block_circ_conv: {shown} failed for \d .* transforms of length 6 "
        rf"on cuda:0: {name}",
    ):
        run_cufft(2, 6, device)
    assert_right(*operands((2,), 1, 1, 6, dtype=torch.float32, device=device))


@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("cufft", "cudaStreamIsCapturing"),
        ("cufft", "launch"),
        ("fused", "launch"),
        ("fused", "cudaFuncSetAttribute"),
    ],
)
def test_an_error_of_cuda_is_named_and_nothing_is_broken_by_it(path, call, device, machine):
    cuda.set_path(path)
    case = operands((2,), 1, 30, 64, dtype=torch.bfloat16, device=device)
    machine.fail(call, 2)
    with pytest.raises(RuntimeError, match=rf"conv: {call}.* failed: cudaErrorMemoryAllocation"):
        OPS.block_circ_conv(*case[:2])
    assert_right(*case)


@pytest.mark.parametrize("facts", [{"capability": 70}, {"capability": 110, "has_code": False}])
def test_an_unsupported_device_is_named(facts, device, machine):
    machine.be(**facts)
    machine.use(device=1)
    capability = facts["capability"] / 10
    with pytest.raises(
        RuntimeError,
        match=rf"cuda:1 has compute capability {capability}, and this "
        "build of the CUDA library has code for .*: use a build for that device",
    ):
        run_cufft(2, 6, device)


def in_another_process(code: str, **environment) -> str:
    options = ["-S"] if sys.flags.no_site else []
    run = subprocess.run(
        [sys.executable, *options, "-c", f"import torch, c3a; from c3a import cuda; {code}"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode >= 0, run.stderr
    return (run.stdout + run.stderr).strip().splitlines()[-1]


def test_settings_start_from_the_environment(device):
    facts = "cuda.path(), cuda.temporary_limit(), cuda.plan_cache()['capacity']"
    settings = {"C3A_CUDA_PATH": "cufft", "C3A_CUDA_TEMPORARY_MIB": "3", "C3A_CUDA_PLANS": "7"}
    assert in_another_process(f"print({facts})", **settings) == f"cufft {3 << 20} 7"
    empty = dict.fromkeys(settings, "")
    assert in_another_process(f"print({facts})", **empty) == f"auto {256 << 20} 64"


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("C3A_CUDA_PATH", "fast", "expected C3A_CUDA_PATH to be auto, fused or cufft, got fast"),
        (
            "C3A_CUDA_PLANS",
            "0",
            "expected C3A_CUDA_PLANS to be a number from 1 to 1073741824, got '0'",
        ),
        ("C3A_CUDA_TEMPORARY_MIB", "1e3", "C3A_CUDA_TEMPORARY_MIB to be a number .* got '1e3'"),
    ],
)
def test_a_wrong_setting_is_named_at_first_use_and_not_before(variable, value, said, machine):
    # CPU tensors are the emulated machine's only where there is no CUDA build of torch.
    where = "cuda" if torch.version.cuda else "cpu"
    tensors = f"torch.empty(2, 4, device='{where}'), torch.empty(1, 1, 4, device='{where}')"
    use = f"c3a.block_circ_conv({tensors})"
    for code in (use, "cuda.path()"):
        assert re.search(said, in_another_process(code, **{variable: value}))
    assert in_another_process("print('imported')", **{variable: value}) == "imported"


def test_out_of_memory_is_torchs_own_error(device):
    if device.type != "cuda":
        pytest.skip("needs --device cuda: torch's allocator for it")
    w = torch.ones(1 << 20, 1, 2, device=device)
    x = torch.ones(1, 2, device=device)
    with pytest.raises(torch.OutOfMemoryError, match=r"c3a\.block_circ_conv: .*out of memory"):
        c3a.block_circ_conv(x.expand(1 << 27, 2), w)  # 2^50 bytes
    assert_right(*operands((3,), 2, 1, 6, dtype=torch.float32, device=device))


# What only a GPU has


@pytest.fixture
def gpu(device):
    if device.type != "cuda" or "C3A_EMULATED" in os.environ:
        pytest.skip("needs a GPU")
    return device


@pytest.mark.parametrize("path", ["fused", "cufft"])
def test_a_captured_graph_replays_forward_and_backward(path, gpu):
    cuda.set_path(path)
    x, w, g = operands((64,), 3, 2, 128, dtype=torch.float32, device=gpu)
    x.requires_grad_()
    w.requires_grad_()

    def step():
        y = c3a.block_circ_conv(x, w)
        return y, *torch.autograd.grad(y, (x, w), g)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        for got, expected in zip(results, step(), strict=True):
            assert torch.equal(got, expected)


def test_streams_run_side_by_side(gpu):
    case = operands((256,), 3, 2, 96, dtype=torch.float32, device=gpu)
    expected = OPS.block_circ_conv(*case[:2])
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(OPS.block_circ_conv(*case[:2]))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_temporaries_stay_within_the_limit(gpu):
    cuda.set_path("cufft")
    x, w, g = operands((8192,), 4, 4, 96, dtype=torch.bfloat16, device=gpu)
    limit = 8 << 20
    cuda.set_temporary_limit(limit)
    OPS.block_circ_conv_backward(g, x, w)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = OPS.block_circ_conv_backward(g, x, w)
    torch.cuda.synchronize()
    held = sum(t.numel() * t.element_size() for t in results)
    assert torch.cuda.max_memory_allocated() - before - held < 2 * limit
