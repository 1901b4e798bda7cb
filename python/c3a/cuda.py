"""The CUDA library's settings and plan cache; without it every function raises RuntimeError.

They are C functions of ``libc3a_cpu.so``, to which the CUDA library gives its controls when it is
loaded (``cpp/cuda_controls.h``).
"""

import ctypes
from typing import Literal, TypedDict, cast

from ._library import function

__all__ = [
    "Plan",
    "PlanCache",
    "clear_plan_cache",
    "path",
    "plan_cache",
    "set_path",
    "set_plan_cache_capacity",
    "set_temporary_limit",
    "temporary_limit",
]

Path = Literal["auto", "fused", "cufft"]


class Plan(TypedDict):
    """A plan of cuFFT; ``captured`` by a CUDA graph, which needs it, it is never dropped."""

    device: int
    length: int
    batch: int
    transform: str
    captured: bool


class PlanCache(TypedDict):
    """The cache's state; plans with the most recently used first."""

    capacity: int
    hits: int
    misses: int
    plans: list[Plan]


def _call(name: str, *arguments: object) -> None:
    said = function(name)(*arguments)
    if said is not None:
        raise RuntimeError(said.decode(errors="replace"))


def _text(name: str) -> str:
    result = ctypes.c_char_p()
    _call(name, ctypes.byref(result))
    return (result.value or b"").decode()


def _int64(value: int) -> ctypes.c_int64:
    """ctypes would cut off what does not fit; a limit beyond that is no limit."""
    return ctypes.c_int64(min(value, 2**63 - 1))


def path() -> Path:
    """Return how forward and input gradient choose their path: 'auto', 'fused' or 'cufft'."""
    return cast(Path, _text("c3a_cuda_path"))


def set_path(path: Path) -> None:
    """Set that choice (at first C3A_CUDA_PATH, or 'auto'); 'fused' is wherever that path exists."""
    _call("c3a_set_cuda_path", path.encode())


def temporary_limit() -> int:
    """Return how many bytes a call's temporary activations may take on cuFFT's path."""
    result = ctypes.c_int64()
    _call("c3a_cuda_temporary_limit", ctypes.byref(result))
    return result.value


def set_temporary_limit(bytes: int) -> None:
    """Set that limit (at first C3A_CUDA_TEMPORARY_MIB, or 256 MiB); tokens go in fitting chunks."""
    _call("c3a_set_cuda_temporary_limit", _int64(bytes))


def plan_cache() -> PlanCache:
    """Return the cache of cuFFT plans: its capacity, hits and misses, and the plans in it."""
    counts, *lines = _text("c3a_cuda_plan_cache").split("\n")
    plans: list[Plan] = []
    for line in lines:
        device, length, batch, transform, captured = line.split()
        plans.append(
            {
                "device": int(device),
                "length": int(length),
                "batch": int(batch),
                "transform": transform,
                "captured": captured == "1",
            }
        )
    capacity, hits, misses = map(int, counts.split())
    return {"capacity": capacity, "hits": hits, "misses": misses, "plans": plans}


def set_plan_cache_capacity(capacity: int) -> None:
    """Keep at most ``capacity`` plans (at first C3A_CUDA_PLANS, or 64) and the captured ones."""
    _call("c3a_set_cuda_plan_cache_capacity", _int64(capacity))


def clear_plan_cache() -> None:
    """Drop all plans but captured ones."""
    _call("c3a_clear_cuda_plan_cache")
