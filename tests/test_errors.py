"""Bad operands: the rule and the values are named, in the same words for real and fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

OPS = torch.ops.c3a


def of(*shape, dtype=torch.float32):
    return shape, dtype


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
        "block_circ_conv_backward",
        [of(3, 2, 8), of(2, 12), of(2, 3, 4)],
        "expected grad_output and x to have the same leading dimensions, got (3, 2, 8) and (2, 12)",
    ),
]


def call(op, arguments, device):
    tensors = [
        torch.ones(a[0], dtype=a[1], device=device) if isinstance(a, tuple) else a
        for a in arguments
    ]
    getattr(OPS, op)(*tensors)


@pytest.mark.parametrize(("op", "arguments", "message"), BAD)
@pytest.mark.parametrize("kind", ["real", "fake", "meta"])
def test_bad_operands_are_named_with_the_rule(op, arguments, message, kind, device):
    with pytest.raises(RuntimeError) as raised:
        if kind == "fake":
            with FakeTensorMode():
                call(op, arguments, device)
        else:
            call(op, arguments, "meta" if kind == "meta" else device)
    assert str(raised.value).splitlines()[0] == f"c3a.{op}: {message}"


def test_operands_on_two_devices_are_named(device):
    x, w = torch.ones(2, 8, device=device), torch.ones(2, 2, 4, device="meta")
    with pytest.raises(RuntimeError, match="expected x and w on one device, got .* and meta"):
        OPS.block_circ_conv(x, w)
