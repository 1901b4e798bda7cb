"""cpp/bindings.cpp, which has the documentation."""

from typing import Literal, TypedDict

class _CudaBuild(TypedDict):
    version: str
    architectures: str

class _Build(TypedDict):
    version: str
    compiler: str
    torch_target: str
    cuda: _CudaBuild | None

class _Plan(TypedDict):
    device: int
    length: int
    batch: int
    transform: str
    captured: bool

class _PlanCache(TypedDict):
    capacity: int
    hits: int
    misses: int
    plans: list[_Plan]

def build_info() -> _Build: ...
def cpu_capability() -> str: ...
def cuda_plan_cache() -> _PlanCache: ...
def set_cuda_plan_cache_capacity(capacity: int) -> None: ...
def clear_cuda_plan_cache() -> None: ...
def cuda_temporary_limit() -> int: ...
def set_cuda_temporary_limit(bytes: int) -> None: ...
def cuda_path() -> Literal["auto", "fused", "cufft"]: ...
def set_cuda_path(path: Literal["auto", "fused", "cufft"]) -> None: ...
