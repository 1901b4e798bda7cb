"""Loads the operator libraries: the CPU's, which defines the schemas, then CUDA's if it fits."""

import ctypes
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

# One folder, or two where an editable install keeps what is built apart from the sources.
_FOLDERS = [Path(folder) for folder in sys.modules[__package__].__path__]

# The operators' namespace in torch.ops, and the libraries' prefix. A copy of this package beside
# the installed one has another (build_support/hub.py).
NAMESPACE = "c3a"
OPS = getattr(torch.ops, NAMESPACE)

# The majors of CUDA that the sources build a library for, and where their compilers come from.
_TOOLKITS = {
    "13": "pip install 'cuda-toolkit[nvcc,cufft,cccl]==13.*'",
    "12": "with nvcc 12.8 or newer of NVIDIA's toolkit (pip has none of it)",
}


def _libraries(pattern: str) -> list[Path]:
    return sorted(library for folder in _FOLDERS for library in folder.glob(pattern))


class CudaLibrary(NamedTuple):
    """What serves CUDA tensors; without a library ATen's FFTs do, as on other devices."""

    path: Path | None
    reason: str  # why it is this one, or none
    remedy: str = ""  # what a user can do to have one

    def __str__(self) -> str:
        if self.path is not None:
            return f"loaded, {self.reason}"
        return f"not loaded: {self.reason}" + (f"; {self.remedy}" if self.remedy else "")


def cuda_library() -> CudaLibrary:
    """Return the CUDA library that this torch can load."""
    if torch.version.cuda is None:
        return CudaLibrary(None, "this torch is built without CUDA")
    major = torch.version.cuda.split(".")[0]
    if fitting := _libraries(f"lib{NAMESPACE}_cuda{major}.so"):
        return CudaLibrary(fitting[0], f"built for CUDA {major}, as this torch")
    built = [path.stem.partition("_cuda")[2] for path in _libraries(f"lib{NAMESPACE}_cuda*.so")]
    has = f"has CUDA {', '.join(built)} only" if built else "is built without CUDA"
    if major in _TOOLKITS:
        remedy = (
            f"{_TOOLKITS[major]} and, in the folder of c3a's sources, "
            "C3A_CUDA=ON pip install --force-reinstall --no-deps ."
        )
    else:
        remedy = ""
    if major != max(_TOOLKITS):
        remedy += f"{', or ' if remedy else ''}install a torch built for CUDA {max(_TOOLKITS)}"
    return CudaLibrary(None, f"this torch has CUDA {major}, this build of c3a {has}", remedy)


def cpu_library() -> Path:
    """Return the library that defines the operators."""
    if found := _libraries(f"lib{NAMESPACE}_cpu.so"):
        return found[0]
    folders = ", ".join(map(str, _FOLDERS))
    if any(parent.is_file() for folder in _FOLDERS for parent in folder.parents):
        raise ImportError(
            f"c3a: cannot be imported from an archive, {folders}, for its libraries are loaded "
            "from files; install c3a with pip"
        )
    raise ImportError(f"c3a: lib{NAMESPACE}_cpu.so is not in {folders}; install c3a with pip")


def _refuse_a_second(library: Path) -> None:
    """Raise ImportError if another copy has defined the operators, which is done once only."""
    if not hasattr(OPS, "block_circ_conv"):
        return
    # address permissions offset device inode path
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = {fields[5] for fields in maps if len(fields) == 6 and library.name in fields[5]}
    if str(library.resolve()) not in mapped:
        raise ImportError(
            f"c3a: the operators torch.ops.{NAMESPACE} are loaded already, from "
            f"{', '.join(sorted(mapped)) or 'another library'}, so those of {library} cannot "
            "be: one copy of c3a in a process; after an installation, start Python again"
        )


def function(name: str) -> Callable[..., bytes | None]:
    """Return a C function of the CPU's library: one that returns a text, or null."""
    found = getattr(ctypes.CDLL(str(cpu_library())), name)
    found.restype = ctypes.c_char_p
    return found  # type: ignore[no-any-return]


def fact(name: str) -> str | None:
    """Return what ``cpp/facts.h`` knows of this build."""
    text = function(f"c3a_{name}")()
    return text.decode() if text is not None else None


def cpu_level() -> str:
    """Return the instruction-set level in use, for instance 'x86-64-v3'."""
    level = ctypes.c_char_p()
    if wrong := function("c3a_cpu_level")(ctypes.byref(level)):
        raise RuntimeError(wrong.decode())
    return (level.value or b"").decode()


def _cause(error: OSError) -> BaseException:
    """Return what the system said of a library, which torch's error only refers to."""
    return error.__cause__ or error


def _load() -> CudaLibrary:
    library = cpu_library()
    _refuse_a_second(library)
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"c3a: {_cause(error)}; needs torch 2.10 or newer and a build for this machine, this "
            f"is torch {torch.__version__} on {platform.machine()}"
        ) from None
    cuda = cuda_library()
    if cuda.path is not None:
        try:
            torch.ops.load_library(cuda.path)
        except OSError as error:  # what it takes from torch's CUDA libraries is not there
            cuda = CudaLibrary(None, str(_cause(error)))
    # Nothing is lost on a machine without a GPU, where CUDA builds of torch are common. Devices are
    # counted without starting CUDA, which processes forked later would not survive.
    if cuda.path is None and torch.version.cuda is not None and torch.cuda.device_count() > 0:
        warnings.warn(
            f"c3a: on this machine's GPU it goes through torch's own FFTs, several times slower; "
            f"CUDA library {cuda}",
            stacklevel=2,
        )
    return cuda


loaded_cuda_library = _load()
