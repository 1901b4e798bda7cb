"""cpp/bindings.cpp, which has the documentation."""

from typing import TypedDict

class _CudaBuild(TypedDict):
    version: str
    architectures: str

class _Build(TypedDict):
    version: str
    compiler: str
    torch_target: str
    cuda: _CudaBuild | None

def build_info() -> _Build: ...
def cpu_capability() -> str: ...
