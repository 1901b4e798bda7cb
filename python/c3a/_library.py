"""Loads the operator libraries: the CPU's, which defines the schemas, then the CUDA one if it fits."""

from pathlib import Path

import torch

_HERE = Path(__file__).parent


def cuda_library() -> tuple[Path | None, str]:
    """Return the CUDA library that this torch can load, or None, and the reason in words."""
    if torch.version.cuda is None:
        return None, "this torch is built without CUDA"
    major = torch.version.cuda.split(".")[0]
    library = _HERE / f"libc3a_cuda{major}.so"
    if library.exists():
        return library, f"built for CUDA {major}, as this torch"
    built = sorted(p.stem.removeprefix("libc3a_cuda") for p in _HERE.glob("libc3a_cuda*.so"))
    has = f"has CUDA {', '.join(built)} only" if built else "is built without CUDA"
    return None, f"this torch has CUDA {major}, this build of c3a {has}"


torch.ops.load_library(_HERE / "libc3a_cpu.so")
if (_cuda := cuda_library()[0]) is not None:
    torch.ops.load_library(_cuda)
