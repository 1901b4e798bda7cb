"""A CUDA build of torch without a driver: what it takes besides the doubles.

    python tests/cuda_emulation/driverless.py build FOLDER    a stub of libcuda, the doubles, c3a
    python tests/cuda_emulation/driverless.py pytest FOLDER [arguments of pytest]
    python tests/cuda_emulation/driverless.py run FOLDER SCRIPT [its arguments]

``make emulated-torch`` does the first two. Results are emulated: the project's CUDA sources run on
the CPU, in memory that torch's own CUDA allocator takes for a GPU's; torch's own operators run on
the CPU.
"""

import ctypes
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def stub_of_the_driver(header: str) -> str:
    """Return C source for a libcuda whose functions do nothing, from the toolkit's cuda.h."""
    special = {
        "cuInit": "int cuInit(unsigned flags) { (void)flags; return 0; }",
        "cuDriverGetVersion": "int cuDriverGetVersion(int* v) { *v = 13000; return 0; }",
        "cuGetErrorString": "int cuGetErrorString(int e, const char** s)"
        ' { (void)e; *s = "emulated"; return 0; }',
        "cuDevicePrimaryCtxGetState": "int cuDevicePrimaryCtxGetState(int d, unsigned* f, int* a)"
        " { (void)d; *f = 0; *a = 1; return 0; }",
    }
    not_supported = 801
    names = sorted(set(re.findall(r"CUDAAPI\s+(cu[A-Z]\w+)\s*\(", header)))
    lines = [special.get(name, f"int {name}(void) {{ return {not_supported}; }}") for name in names]
    return "\n".join(lines) + "\n"


def build(folder: Path) -> None:
    packages = Path(sysconfig.get_path("purelib"))
    stub = folder / "driver"
    stub.mkdir(parents=True, exist_ok=True)
    header = (packages / "nvidia" / "cu13" / "include" / "cuda.h").read_text()
    (stub / "cuda.c").write_text(stub_of_the_driver(header))
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "cuda.c", "-o", "libcuda.so.1"],
        cwd=stub,
        check=True,
    )
    package = folder / "package"
    subprocess.run(["rm", "-rf", package], check=True)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"),
            *("--target", package, ROOT),
        ],
        env={**os.environ, "C3A_CUDA": "OFF", "C3A_EMULATE_CUDA": "TORCH"},
        check=True,
    )


def run_there(folder: Path, command: list[str]) -> int:
    package = folder / "package"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(package), str(HERE), sysconfig.get_path("purelib")]),
        "LD_LIBRARY_PATH": str(folder / "driver"),
        "LD_PRELOAD": str(package / "c3a" / "libc3a_emulation.so"),
        "C3A_EMULATED": "1",
    }
    return subprocess.run([sys.executable, "-S", *command], env=environment, cwd=ROOT).returncode


def torchs_own_on_the_cpu():
    """Return what runs torch's own operators on the CPU as long as it is entered."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map

    def is_cuda(value) -> bool:
        return type(value) in (torch.Tensor, torch.nn.Parameter) and value.is_cuda

    def alias(t: torch.Tensor) -> torch.Tensor:
        """A CPU tensor on the memory of a CUDA tensor, which is the host's."""
        if t._is_zerotensor():
            return torch._efficientzerotensor(t.size(), dtype=t.dtype, device="cpu")
        storage = t.untyped_storage()
        size = storage.nbytes()
        on_cpu = torch.empty(0, dtype=t.dtype, device="cpu")
        if size == 0:
            return on_cpu.as_strided(t.size(), t.stride()) if t.numel() == 0 else on_cpu
        memory = (ctypes.c_byte * size).from_address(storage.data_ptr())
        buffer = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
        on_cpu.set_(buffer, t.storage_offset(), t.size(), t.stride())
        if t.is_conj():
            on_cpu = on_cpu.conj()
        if t.is_neg():
            on_cpu = torch._neg_view(on_cpu)
        return on_cpu

    def to_device(t: torch.Tensor, device) -> torch.Tensor:
        if t._is_zerotensor():
            return torch._efficientzerotensor(t.size(), dtype=t.dtype, device=device)
        t = t.resolve_conj().resolve_neg()
        result = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device)
        if t.numel():
            last = sum(
                (size - 1) * stride for size, stride in zip(t.size(), t.stride(), strict=True)
            )
            ctypes.memmove(result.data_ptr(), t.data_ptr(), (last + 1) * t.element_size())
        return result

    def on_the_cpu(func, args, kwargs):
        """Run an operator on aliases of its CUDA tensors; its new tensors go to their device."""
        pairs = []
        device = None

        def enter(value):
            nonlocal device
            if is_cuda(value):
                device = device or value.device
                pairs.append((value, alias(value)))
                return pairs[-1][1]
            if isinstance(value, torch.device) and value.type == "cuda":
                return torch.device("cpu")
            return value

        asked = kwargs.get("device")
        args, kwargs = tree_map(enter, args), tree_map(enter, kwargs)
        device = torch.device(asked) if asked is not None else device
        out = func(*args, **kwargs)

        def leave(value):
            for original, on_cpu in pairs:
                if value is on_cpu:
                    return original
            new = type(value) is torch.Tensor and value.device.type == "cpu"
            if new and device is not None and device.type == "cuda":
                return to_device(value, device)
            return value

        return tree_map(leave, out)

    # They need no device function: views, which share memory, and new memory.
    native = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "set_"}
    native |= {
        "_unsafe_view",
        "_reshape_alias",
        "lift_fresh",
        "resize_",
        "is_pinned",
        "record_stream",
    }

    class TorchsOwnOnTheCpu(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            library, name = func._schema.name.split("::")
            usual = all(t in (torch.Tensor, torch.nn.Parameter) for t in types)
            if library != "aten" or func.is_view or name in native or not usual:
                return func(*args, **kwargs)
            return on_the_cpu(func, args, kwargs)

    # What the library calls from C++ does not pass through the mode.
    overrides = torch.library.Library("aten", "IMPL")

    def override(name: str, func) -> None:
        overrides.impl(name, lambda *args, **kwargs: on_the_cpu(func, args, kwargs), "CUDA")

    aten = torch.ops.aten
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they replace torch's
        override("copy_", aten.copy_.default)
        override("bmm", aten.bmm.default)
        override("zero_", aten.zero_.default)
        override("fill_.Scalar", aten.fill_.Scalar)
    mode = TorchsOwnOnTheCpu()
    mode.overrides = overrides  # which live as long
    return mode


# As a plugin of pytest


def pytest_configure(config):
    config._c3a_mode = torchs_own_on_the_cpu()
    config._c3a_mode.__enter__()


def pytest_unconfigure(config):
    config._c3a_mode.__exit__(None, None, None)


def pytest_collection_modifyitems(items):
    import pytest

    # They compile; the emulated tests without a CUDA build of torch include them.
    reason = "torch.compile does not work within a dispatch mode, which torch's operators need here"
    for item in items:
        if any(word in item.name for word in ("compile", "opcheck")):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_report_header(config):
    return "CUDA: emulated; no figure of this run was seen on a GPU"


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    folder = Path(where).resolve()
    if what == "build":
        build(folder)
    elif what == "pytest":
        command = ["-m", "pytest", "-p", "driverless", "--device", "cuda"]
        sys.exit(run_there(folder, [*command, *rest]))
    elif what == "run":
        enter = "import driverless, runpy, sys; sys.argv = sys.argv[1:]"
        enter += "; mode = driverless.torchs_own_on_the_cpu(); mode.__enter__()"
        enter += "; runpy.run_path(sys.argv[0], run_name='__main__')"
        sys.exit(run_there(folder, ["-c", enter, *rest]))
