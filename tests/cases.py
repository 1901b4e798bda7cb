"""The inputs that every test of the operator shares, and how errors are measured."""

import torch
from torch import Tensor

from c3a._library import cpu_level

# (tokens as leading sizes, m, n, b): block size 1, odd, prime, power of two, composite, large;
# square and not; no token, one, some; no, one and two leading dimensions.
SHAPES = [
    ((5,), 3, 2, 1),
    ((5,), 2, 3, 2),
    ((7,), 1, 1, 5),
    ((4,), 2, 3, 6),
    ((3,), 3, 2, 7),
    ((), 2, 2, 8),
    ((1,), 3, 1, 16),
    ((2, 3), 1, 4, 15),
    ((2, 1, 3), 4, 2, 12),
    ((17,), 2, 3, 64),
    ((3,), 2, 1, 101),
    ((2,), 1, 2, 257),
    ((2,), 1, 1, 768),
    ((1,), 1, 1, 4096),
    ((0,), 2, 3, 4),
    ((2, 0, 3), 1, 2, 6),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# Relative errors against float64 (norm of the difference over norm of the result).
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}


def rounds_spectra(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Return whether products of activations and results of these dtypes have rounded spectra."""
    on_cpu = torch.device(device).type == "cpu"
    return on_cpu and torch.bfloat16 in dtypes and cpu_level() == "x86-64-v4-bf16"


def tolerance(dtype: torch.dtype, device: torch.device, *dtypes: torch.dtype) -> float:
    """Return TOLERANCE of a result that float32 sums on these dtypes gave.

    Both spectra of a product may be rounded to bfloat16, an error of 1.7e-3 each by the root of the
    mean square, as has the result's own rounding. A few numbers have up to 1.7 times that.
    """
    if not rounds_spectra(device, dtype, *dtypes):
        return TOLERANCE[dtype]
    return 6e-3 if dtype == torch.bfloat16 else 5e-3


def operands(leading, m, n, b, dtype=torch.float64, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Return random (x, w, g)."""
    generator = torch.Generator().manual_seed(hash((leading, m, n, b)) % 2**31)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return normal(*leading, n * b), normal(m, n, b), normal(*leading, m * b)


def relative_error(got: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    if expected.numel() == 0:
        assert got.shape == expected.shape
        return 0.0
    norm = expected.norm().item()
    difference = (got.double() - expected).norm().item()
    return difference / norm if norm else difference


class Net(torch.nn.Module):
    """Three layers, of which adapters take ``down`` and ``up``."""

    def __init__(self):
        super().__init__()
        self.down = torch.nn.Linear(24, 12)
        self.up = torch.nn.Linear(12, 24)
        self.head = torch.nn.Linear(24, 4)

    def forward(self, x):
        return self.head(self.up(self.down(x).relu()).relu())
