"""Bad operands: the rule and the values are named, in the same words for real and fake tensors."""

import os
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import c3a
from c3a import _private

OPS = torch.ops.c3a


def of(*shape, dtype=torch.float32):
    return shape, dtype


class Prepared(NamedTuple):
    m: int
    n: int
    b: int
    dtype: torch.dtype = torch.float32
    stack: tuple[int, ...] = ()

    def on(self, device) -> torch.Tensor:
        shape = (*self.stack, self.m, self.n, self.b)
        return OPS.prepare(torch.zeros(shape, dtype=self.dtype, device=device))


def index(rows, dtype=torch.int64):
    return (rows,), dtype


BAD = [
    (
        "block_circ_conv",
        [of(2, 770), of(4, 3, 256)],
        "expected x.size(-1) == n * b = 768 for a kernel of shape (4, 3, 256), got 770",
    ),
    (
        "block_circ_conv",
        [of(), of(1, 1, 1)],
        "expected x to have at least 1 dimension, got shape ()",
    ),
    (
        "block_circ_conv",
        [of(2, 8), of(2, 8)],
        "expected a kernel w of shape (m, n, b) with m, n, b >= 1, got (2, 8)",
    ),
    (
        "block_circ_conv",
        [of(2, 8), of(0, 2, 4)],
        "expected a kernel w of shape (m, n, b) with m, n, b >= 1, got (0, 2, 4)",
    ),
    (
        "block_circ_conv",
        [of(2, 8, dtype=torch.int64), of(2, 2, 4)],
        "expected x to be float64, float32, bfloat16 or float16, got int64",
    ),
    (
        "block_circ_conv",
        [of(2, 8), of(2, 2, 4, dtype=torch.complex64)],
        "expected w to be float64, float32, bfloat16 or float16, got complex64",
    ),
    (
        "block_circ_conv_linear",
        [of(2, 12), of(12, 8), None, of(2, 3, 4)],
        "expected weight of shape (8, 12), as the kernel's, got (12, 8)",
    ),
    (
        "block_circ_conv_linear",
        [of(2, 12), of(8, 12), of(1, 8), of(2, 3, 4)],
        "expected bias of shape (8,), got (1, 8)",
    ),
    (
        "block_circ_conv_linear",
        [of(2, 12), of(8, 12), of(8, dtype=torch.bfloat16), of(2, 3, 4)],
        "expected bias in float32, as weight is, got bfloat16",
    ),
    (
        "block_circ_conv_linear",
        [of(2, 12), of(8, 12, dtype=torch.int8), None, of(2, 3, 4)],
        "expected weight to be float64, float32, bfloat16 or float16, got int8",
    ),
    (
        "block_circ_conv_linear",
        [of(2, 8), of(8, 12), None, of(2, 3, 4)],
        "expected x.size(-1) == n * b = 12 for a kernel of shape (2, 3, 4), got 8",
    ),
    (
        "block_circ_conv_add",
        [of(2, 7), of(2, 12), of(2, 3, 4)],
        "expected base of shape (2, 8), got (2, 7)",
    ),
    (
        "block_circ_conv_add",
        [of(1, 8), of(12), of(2, 3, 4)],
        "expected base of shape (8,), got (1, 8)",
    ),
    (
        "block_circ_conv_add",
        [of(2, 8, dtype=torch.int32), of(2, 12), of(2, 3, 4)],
        "expected base to be float64, float32, bfloat16 or float16, got int32",
    ),
    (
        "block_circ_conv_add_",
        [of(2, 3, 8), of(3, 2, 12), of(2, 3, 4)],
        "expected base of shape (3, 2, 8), got (2, 3, 8)",
    ),
    (
        "block_circ_conv_add_",
        [of(2, 8), of(2, 13), of(2, 3, 4)],
        "expected x.size(-1) == n * b = 12 for a kernel of shape (2, 3, 4), got 13",
    ),
    (
        "block_circ_conv_input_grad",
        [of(2, 12), of(2, 3, 4)],
        "expected grad_output.size(-1) == m * b = 8 for a kernel of shape (2, 3, 4), got 12",
    ),
    (
        "block_circ_conv_kernel_grad",
        [of(2, 8), of(3, 12), 4],
        "expected grad_output and x to have the same leading dimensions, got (2, 8) and (3, 12)",
    ),
    (
        "block_circ_conv_kernel_grad",
        [of(2, 8), of(2, 13), 4],
        "expected x.size(-1) to be a positive multiple of block_size = 4, got 13",
    ),
    (
        "block_circ_conv_kernel_grad",
        [of(2, 2), of(2, 12), 4],
        "expected grad_output.size(-1) to be a positive multiple of block_size = 4, got 2",
    ),
    (
        "block_circ_conv_kernel_grad",
        [of(2, 8, dtype=torch.bool), of(2, 12), 4],
        "expected grad_output to be float64, float32, bfloat16 or float16, got bool",
    ),
    (
        "block_circ_conv_backward",
        [of(2, 12), of(2, 12), of(2, 3, 4)],
        "expected grad_output.size(-1) == m * b = 8 for a kernel of shape (2, 3, 4), got 12",
    ),
    (
        "block_circ_conv_kernel_grad",
        [of(2, 8), of(2, 12), 0],
        "expected block_size >= 1, got 0",
    ),
    (
        "block_circ_conv_kernel_grad",
        [of(2, 8), of(2, 12), 4, torch.int32],
        "expected dtype to be float64, float32, bfloat16 or float16, got int32",
    ),
    (
        "block_circ_conv_backward",
        [of(2, 8), of(2, 13), of(2, 3, 4)],
        "expected x.size(-1) == n * b = 12 for a kernel of shape (2, 3, 4), got 13",
    ),
    (
        "block_circ_conv",
        [of(2, 8, dtype=torch.bits8), of(2, 2, 4)],
        "expected x to be float64, float32, bfloat16 or float16, got bits8",
    ),
    (
        "block_circ_conv",
        [of(2, 8, dtype=torch.float8_e4m3fn), of(2, 2, 4)],
        "expected x to be float64, float32, bfloat16 or float16, got float8_e4m3fn",
    ),
    (
        "block_circ_conv_kernel_grad",
        [of(2, 8), of(2, 12), 4, torch.bits8],
        "expected dtype to be float64, float32, bfloat16 or float16, got bits8",
    ),
    (
        "prepare",
        [of(2, 4)],
        "expected kernels w of shape (..., m, n, b) with m, n, b >= 1, got (2, 4)",
    ),
    (
        "prepare",
        [of(5, 2, 0, 4)],
        "expected kernels w of shape (..., m, n, b) with m, n, b >= 1, got (5, 2, 0, 4)",
    ),
    (
        "prepare",
        [of(2, 3, 4, dtype=torch.float64), torch.float32],
        "expected dtype to be float32 or bfloat16, or float64 for kernels in float64 too, got "
        "float32 for w in float64",
    ),
    (
        "prepare",
        [of(2, 3, 4), torch.float16],
        "expected dtype to be float32 or bfloat16, or float64 for kernels in float64 too, got "
        "float16 for w in float32",
    ),
    (
        "block_circ_conv_prepared",
        [of(2, 8), of(2, 2, 4, dtype=torch.bfloat16), 4],
        "expected w_hat in float32 or float64, as c3a.prepare makes it, got bfloat16",
    ),
    (
        "block_circ_conv_prepared",
        [of(2, 8), of(2, 4), 4],
        "expected a prepared kernel w_hat of shape (m, n, numbers), got (2, 4)",
    ),
    (
        "block_circ_conv_prepared",
        [of(2, 8), Prepared(2, 2, 4), 0],
        "expected 1 <= block_size <= x.size(-1) = 8, got 0",
    ),
    (
        "block_circ_conv_prepared",
        [of(2, 9), Prepared(2, 2, 4), 4],
        "expected x.size(-1) == n * block_size = 8 for a prepared kernel of shape PREPARED, got 9",
    ),
    (
        "block_circ_conv_prepared",
        [of(2, 8, dtype=torch.float64), Prepared(2, 2, 4), 4],
        "expected w_hat in float64, as x is: c3a.prepare(w, torch.float64)",
    ),
    (
        "block_circ_conv_prepared",
        [of(2, 12), Prepared(2, 3, 4), 4, Prepared(2, 3, 4)],
        "expected w_hat_transposed of shape (n, m, numbers) with n = 3 and m = 2, got PREPARED",
    ),
    (
        "block_circ_conv_prepared",
        [of(2, 12), Prepared(2, 3, 4), 4, Prepared(3, 2, 4, dtype=torch.float64)],
        "expected w_hat and w_hat_transposed of one dtype, got float32 and float64",
    ),
    (
        "block_circ_conv_prepared_add",
        [of(2, 7), of(2, 12), Prepared(2, 3, 4), 4],
        "expected base of shape (2, 8), got (2, 7)",
    ),
    (
        "block_circ_conv_prepared_add_",
        [of(2, 8, dtype=torch.float64), of(2, 12), Prepared(2, 3, 4), 4],
        "expected w_hat in float64, as base is: c3a.prepare(w, torch.float64)",
    ),
    (
        "block_circ_conv_backward",
        [of(3, 2, 8), of(2, 12), of(2, 3, 4)],
        "expected grad_output and x to have the same leading dimensions, got (3, 2, 8) and (2, 12)",
    ),
    (
        "block_circ_conv_backward_add_",
        [of(2, 8), of(2, 8), of(2, 12), of(2, 3, 4)],
        "expected grad_input of shape (2, 12), got (2, 8)",
    ),
    (
        "block_circ_conv_backward_add_",
        [of(2, 12, dtype=torch.int64), of(2, 8), of(2, 12), of(2, 3, 4)],
        "expected grad_input to be float64, float32, bfloat16 or float16, got int64",
    ),
    (
        "block_circ_conv_backward_add_",
        [of(2, 12), of(3, 8), of(2, 12), of(2, 3, 4)],
        "expected grad_output and x to have the same leading dimensions, got (3, 8) and (2, 12)",
    ),
    (
        "block_circ_conv_backward_add_",
        [of(2, 12), of(2, 12), of(2, 12), of(2, 3, 4)],
        "expected grad_output.size(-1) == m * b = 8 for a kernel of shape (2, 3, 4), got 12",
    ),
    (
        "block_circ_conv_many",
        [of(2, 12), of(2, 3, 4), index(2)],
        "expected kernels w of shape (adapters, m, n, b), each >= 1, got (2, 3, 4)",
    ),
    (
        "block_circ_conv_many",
        [of(2, 12), of(0, 2, 3, 4), index(2)],
        "expected kernels w of shape (adapters, m, n, b), each >= 1, got (0, 2, 3, 4)",
    ),
    (
        "block_circ_conv_many",
        [of(12), of(5, 2, 3, 4), index(1)],
        "expected x of shape (rows, ..., features), got (12,)",
    ),
    (
        "block_circ_conv_many",
        [of(2, 8), of(5, 2, 3, 4), index(2)],
        "expected x.size(-1) == n * b = 12 for kernels of shape (5, 2, 3, 4), got 8",
    ),
    (
        "block_circ_conv_many",
        [of(2, 12), of(5, 2, 3, 4), index(2, torch.int32)],
        "expected index to be int64, got int32",
    ),
    (
        "block_circ_conv_many",
        [of(2, 7, 12), of(5, 2, 3, 4), index(7)],
        "expected index of shape (2,), an entry for each row of x, got (7,)",
    ),
    (
        "block_circ_conv_many_add_",
        [of(2, 8), of(2, 12), of(5, 2, 3, 4), of(2, 1, dtype=torch.int64)],
        "expected index of shape (2,), an entry for each row of x, got (2, 1)",
    ),
    (
        "block_circ_conv_many_add_",
        [of(2, 9), of(2, 12), of(5, 2, 3, 4), index(2)],
        "expected base of shape (2, 8), got (2, 9)",
    ),
    (
        "block_circ_conv_many_input_grad",
        [of(2, 12), of(5, 2, 3, 4), index(2)],
        "expected grad_output.size(-1) == m * b = 8 for kernels of shape (5, 2, 3, 4), got 12",
    ),
    (
        "block_circ_conv_many_input_grad",
        [of(2, 8), of(5, 2, 3, 4), index(3)],
        "expected index of shape (2,), an entry for each row of grad_output, got (3,)",
    ),
    (
        "block_circ_conv_many_kernel_grad",
        [of(2, 8), of(2, 12), index(2), 0, 4],
        "expected adapters >= 1, got 0",
    ),
    (
        "block_circ_conv_many_kernel_grad",
        [of(2, 8), of(2, 13), index(2), 5, 4],
        "expected x.size(-1) to be a positive multiple of block_size = 4, got 13",
    ),
    (
        "block_circ_conv_many_kernel_grad",
        [of(2, 8), of(2, 12), index(3), 5, 4],
        "expected index of shape (2,), an entry for each row of x, got (3,)",
    ),
    (
        "block_circ_conv_many_prepared",
        [of(2, 8), Prepared(2, 2, 4), index(2), 4],
        "expected prepared kernels w_hat of shape (adapters, m, n, numbers), got PREPARED",
    ),
    (
        "block_circ_conv_many_prepared",
        [of(2, 9), Prepared(2, 2, 4, stack=(5,)), index(2), 4],
        "expected x.size(-1) == n * block_size = 8 for prepared kernels of shape PREPARED, got 9",
    ),
    (
        "block_circ_conv_many_prepared",
        [of(2, 12), Prepared(2, 3, 4, stack=(5,)), index(2), 4, Prepared(3, 2, 4, stack=(4,))],
        "expected w_hat_transposed of shape (adapters, n, m, numbers) with adapters = 5, n = 3 and "
        "m = 2, got PREPARED",
    ),
    (
        "block_circ_conv_many_prepared_add_",
        [of(2, 8), of(2, 12), Prepared(2, 3, 4, stack=(5,)), index(1), 4],
        "expected index of shape (2,), an entry for each row of x, got (1,)",
    ),
    (
        "block_circ_conv_many_prepared_add_",
        [of(2, 8, dtype=torch.float64), of(2, 12), Prepared(2, 3, 4, stack=(5,)), index(2), 4],
        "expected w_hat in float64, as base is: c3a.prepare(w, torch.float64)",
    ),
]


def call(op, arguments, device) -> str:
    """Call the operator; return the shape of the last prepared kernel among its arguments."""
    shape, values = "", []
    for a in arguments:
        if isinstance(a, Prepared):
            a = a.on(device)
            shape = str(tuple(a.shape))
        elif isinstance(a, tuple):
            a = torch.zeros(a[0], dtype=a[1], device=device)
        values.append(a)
    with pytest.raises(RuntimeError) as raised:
        getattr(OPS, op)(*values)
    return str(raised.value).splitlines()[0].replace(shape or "PREPARED", "PREPARED")


@pytest.mark.parametrize(("op", "arguments", "message"), BAD)
@pytest.mark.parametrize("kind", ["real", "fake", "meta"])
def test_bad_operands_are_named_with_the_rule(op, arguments, message, kind, device):
    if "C3A_EMULATED" in os.environ and "bits8" in message:
        pytest.skip("torch cannot fill such memory with what is not a number")
    with FakeTensorMode() if kind == "fake" else nullcontext():
        got = call(op, arguments, "meta" if kind == "meta" else device)
    assert got == f"c3a.{op}: {message}"


def test_a_prepared_kernel_of_another_length_is_named(device):
    x, w_hat = torch.ones(2, 8, device=device), torch.zeros(2, 2, 3, device=device)
    message = (
        r"expected w_hat.size\(-1\) == \d+, as c3a.prepare makes it for block_size = 4 on this"
    )
    for mode in (nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode, pytest.raises(RuntimeError, match=message):
            OPS.block_circ_conv_prepared(x, w_hat, 4)


def test_operands_on_two_devices_are_named(device):
    x, w = torch.ones(2, 8, device=device), torch.ones(2, 2, 4, device="meta")
    with pytest.raises(RuntimeError, match="expected x and w on one device, got .* and meta"):
        OPS.block_circ_conv(x, w)


def quantised(x):
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


def nested(layout):
    return lambda x: torch.nested.nested_tensor([x, x], layout=layout)


DENSE = "to be a dense tensor (torch.strided), got"
ODD = {
    "None": (lambda x: None, "to be a tensor, got None"),
    "sparse": (torch.Tensor.to_sparse, f"{DENSE} torch.sparse_coo"),
    "compressed sparse": (torch.Tensor.to_sparse_csr, f"{DENSE} torch.sparse_csr"),
    "mkldnn": (torch.Tensor.to_mkldnn, f"{DENSE} torch._mkldnn"),
    "quantised": (quantised, "to be float64, float32, bfloat16 or float16, got qint8"),
    "nested": (nested(torch.strided), f"{DENSE} a nested tensor; pass its values(), of shape"),
    "jagged": (nested(torch.jagged), f"{DENSE} a nested tensor; pass its values(), of shape"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of prototypes
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_tensors_of_another_kind_are_named_with_the_rule(odd, mode):
    make, message = ODD[odd]
    x, w, base = torch.ones(2, 8), torch.ones(2, 2, 4), torch.ones(2, 8)
    w_hat = torch.ops.c3a.prepare(w)
    calls = {
        ("block_circ_conv", "x"): lambda t: OPS.block_circ_conv(t, w),
        ("block_circ_conv_add", "base"): lambda t: OPS.block_circ_conv_add(t, x, w),
        ("block_circ_conv_add_", "x"): lambda t: OPS.block_circ_conv_add_(base, t, w),
        ("block_circ_conv_backward", "x"): lambda t: OPS.block_circ_conv_backward(base, t, w),
        ("block_circ_conv_backward_add_", "grad_input"): lambda t: (
            OPS.block_circ_conv_backward_add_(t, base, x, w)
        ),
        ("block_circ_conv_prepared", "x"): lambda t: OPS.block_circ_conv_prepared(t, w_hat, 4),
    }
    for (op, name), run in calls.items():
        with mode(), pytest.raises(RuntimeError) as raised:
            run(make(x))
        assert str(raised.value).startswith(f"c3a.{op}: expected {name} {message}")
    if odd != "None":  # which it may be
        with mode(), pytest.raises(RuntimeError) as raised:
            OPS.block_circ_conv_prepared(x, w_hat, 4, make(x))
        said = f"c3a.block_circ_conv_prepared: expected w_hat_transposed {message}"
        assert str(raised.value).startswith(said)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_an_expanded_base_is_not_written(mode):
    base, x, w = torch.zeros(1, 8), torch.ones(2, 8), torch.ones(2, 2, 4)
    message = r"expected a base that is not expanded, got strides \(0, 1\) for shape \(2, 8\)"
    for x_in, w_in in ((x, w), (torch._neg_view(x), w), (x, w.clone().requires_grad_())):
        with mode(), pytest.raises(RuntimeError, match=message):
            OPS.block_circ_conv_add_(base.expand(2, 8), x_in, w_in)
        with mode(), pytest.raises(RuntimeError, match="expected base to be a tensor, got None"):
            OPS.block_circ_conv_add_(None, x_in, w_in)
        with mode(), pytest.raises(RuntimeError, match="a grad_input that is not expanded, got"):
            OPS.block_circ_conv_backward_add_(base.expand(2, 8), x_in, x_in, w_in)
    assert torch.equal(base, torch.zeros(1, 8))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_negative_views_are_read_and_written_as_what_they_are(mode):
    x, w = torch.randn(2, 8), torch.randn(2, 2, 4)
    with mode():
        base = torch._neg_view(torch.ones(2, 8))
        assert base.is_neg()
        OPS.block_circ_conv_add_(base, torch._neg_view(x), w)
        torch.testing.assert_close(base, -1 - OPS.block_circ_conv(x, w))
        dx, g = torch._neg_view(torch.ones(2, 8)), torch.randn(2, 8)
        dw = OPS.block_circ_conv_backward_add_(dx, torch._neg_view(g), x, w)
        expected = OPS.block_circ_conv_backward(-g, x, w)
        torch.testing.assert_close((dx.resolve_neg(), dw), (expected[0] - 1, expected[1]))


def test_torchs_own_errors_keep_their_message_and_no_path():
    w = torch.ones(1, 1, 1).expand(2**45, 1, 1)
    with pytest.raises(RuntimeError) as raised:
        OPS.block_circ_conv(torch.ones(1, 1), w)
    said = str(raised.value)
    assert said.startswith("c3a.block_circ_conv: ")
    if torch.__version__ >= "2.13":
        assert "you tried to allocate 140737488355328 bytes" in said
    assert ".h" not in said
    assert "API call" not in said


def test_out_of_memory_has_torchs_type(monkeypatch):
    def fail(*_):
        raise RuntimeError("c3a.block_circ_conv: CUDA out of memory. Tried to allocate 2 EiB.")

    monkeypatch.setattr(_private, "below_autograd", fail)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2 EiB"):
        OPS.block_circ_conv(torch.ones(1, 1), torch.ones(1, 1, 1))


@pytest.mark.parametrize("grad", [True, False])
def test_out_of_memory_has_torchs_type_in_a_layer(grad, monkeypatch):
    def fail():
        raise RuntimeError("c3a.block_circ_conv_add_: CUDA out of memory. Tried to allocate 2 EiB.")

    layer = c3a.C3ALinear(torch.nn.Linear(4, 4), 2)
    for entered_before_a_call in ("kernels_only", "autocast_disabled"):
        monkeypatch.setattr(_private, entered_before_a_call, fail)
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2 EiB"),
    ):
        layer(torch.ones(1, 4))


def test_out_of_memory_has_torchs_type_in_inference_mode(monkeypatch):
    class Failing:
        def block_circ_conv(self, *_):
            raise RuntimeError("c3a.block_circ_conv: CUDA out of memory. Tried to allocate 2 EiB.")

    monkeypatch.setattr(c3a.ops, "_OPS", Failing())
    with torch.inference_mode(), pytest.raises(torch.OutOfMemoryError, match="allocate 2 EiB"):
        c3a.block_circ_conv(torch.ones(1, 1), torch.ones(1, 1, 1))


def test_a_tensor_of_inference_mode_is_written_within_it_only():
    with torch.inference_mode():
        base = torch.zeros(2, 4)
        OPS.block_circ_conv_add_(base, torch.ones(2, 4), torch.ones(1, 1, 4))
    with pytest.raises(RuntimeError, match="c3a.block_circ_conv_add_: expected to write a tensor"):
        OPS.block_circ_conv_add_(base, torch.ones(2, 4), torch.ones(1, 1, 4))
    x = torch.ones(2, 4)
    with pytest.raises(RuntimeError, match="within inference mode only; call grad_input.clone"):
        OPS.block_circ_conv_backward_add_(base, x, x, torch.ones(1, 1, 4))
    assert torch.equal(base, torch.full((2, 4), 4.0))


@pytest.mark.parametrize("block_size", [0, -1, 25, 2**63 - 1])
def test_block_sizes_of_a_prepared_kernel_are_within_the_features(block_size):
    x, w_hat = torch.ones(5, 24), torch.ops.c3a.prepare(torch.ones(2, 3, 8))
    message = rf"expected 1 <= block_size <= x.size\(-1\) = 24, got {block_size}"
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError, match=message):
            OPS.block_circ_conv_prepared(x.to(device), w_hat.to(device), block_size)
