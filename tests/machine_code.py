"""What nvcc made of the CUDA sources: facts of every device function on every architecture.

    python tests/machine_code.py [LIBRARY]          prints a table; needs no GPU
    python tests/machine_code.py --loops 'convolve<7, 8>' sm_90 [LIBRARY]
                                                    prints what stands in each innermost loop

Read by cuobjdump and nvdisasm of the CUDA toolkit, or of the wheels nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm. ``tests/test_machine_code.py`` says what must hold.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

THREADS = 256  # kThreads in cuda/launch.h


class Multiprocessor(NamedTuple):
    """CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    threads: int
    shared_kib: int
    shared_kib_of_a_thread_block: int


REGISTERS = 65536  # of a multiprocessor, on every architecture here
MULTIPROCESSORS = {
    "sm_75": Multiprocessor(1024, 64, 64),
    "sm_80": Multiprocessor(2048, 164, 163),
    "sm_86": Multiprocessor(1536, 100, 99),
    "sm_90": Multiprocessor(2048, 228, 227),
    "sm_100": Multiprocessor(2048, 228, 227),
    "sm_120": Multiprocessor(1536, 100, 99),
}


@dataclass(frozen=True, order=True)
class DeviceFunction:
    name: str  # with its template arguments, as c3a::cuda has it
    architecture: str
    registers: int
    stack_bytes: int
    code: tuple[tuple[int, str, int | None], ...]  # address, opcode with modifiers, jump's target

    @functools.cached_property
    def instructions(self) -> Counter:
        return Counter(opcode for _, opcode, _ in self.code)

    def innermost_loops(self) -> list[Counter]:
        """Return the instructions of every loop that has no loop within."""
        at = {address: i for i, (address, _, _) in enumerate(self.code)}
        back = [
            (at[target], i)
            for i, (address, opcode, target) in enumerate(self.code)
            if opcode.startswith("BRA") and target is not None and target < address
        ]
        return [
            Counter(opcode.split(".")[0] for _, opcode, _ in self.code[begin : end + 1])
            for begin, end in back
            if not any(begin <= b and e < end for b, e in back)
        ]

    def count(self, pattern: str) -> int:
        return sum(n for opcode, n in self.instructions.items() if re.fullmatch(pattern, opcode))

    @property
    def is_double(self) -> bool:
        return "double" in self.name

    def shared_bytes(self, features: int = 1024) -> int:
        """What a launch asks for; the fused path's tile at so many features in."""
        if match := re.match(r"convolve<(\d+), (\d+)>", self.name):
            log, tokens = map(int, match.groups())
            group = 1 if log >= 9 else 512 >> log
            return (features + 2 * (group << log)) * tokens * 4
        if match := re.match(r"transform_kernel<(\d+)>", self.name):
            return 8 * 8 << int(match[1])
        if match := re.match(r"product_of_bins<(\w+), \w*<(\d+), (\d+),", self.name):
            entry = 16 if match[1] == "double" else 8
            return 16 * (int(match[2]) + 1 + int(match[3]) + 1) * entry
        return 0

    def thread_blocks(self) -> int:
        """How many are on a multiprocessor at once."""
        limits = MULTIPROCESSORS[self.architecture]
        registers = -(-self.registers // 8) * 8 * THREADS
        most = min(limits.threads // THREADS, REGISTERS // registers)
        if shared := self.shared_bytes():
            most = min(most, (limits.shared_kib << 10) // (shared + 1024))
        return most

    def occupancy(self) -> float:
        """Return the share of the multiprocessor's threads that are there at once."""
        return self.thread_blocks() * THREADS / MULTIPROCESSORS[self.architecture].threads


def _environment() -> dict[str, str]:
    """nvdisasm must be found by cuobjdump."""
    wheel = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    toolkits = [wheel, Path("/usr/local/cuda/bin")]
    path = os.pathsep.join([*map(str, toolkits), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path}


def tools_are_here() -> bool:
    path = _environment()["PATH"]
    return all(shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm"))


def _dump(library: Path, *options: str) -> str:
    environment = _environment()
    tool = shutil.which("cuobjdump", path=environment["PATH"])
    return subprocess.run(
        [tool, *options, library], env=environment, check=True, capture_output=True, text=True
    ).stdout


def _plain_names(mangled: list[str]) -> list[str]:
    text = subprocess.run(
        ["c++filt"], input="\n".join(mangled), check=True, capture_output=True, text=True
    ).stdout
    names = []
    for line in text.splitlines():
        # void c3a::cuda::(anonymous namespace)::load<float, half>(half const*, ...)
        name = re.sub(r"c3a::cuda::(\(anonymous namespace\)::|_GLOBAL__N\w+::)?", "", line)
        name = name.removeprefix("void ").replace("(int)", "").replace("__nv_", "")
        names.append(name.partition("(")[0].replace("> >", ">>"))
    return names


INSTRUCTION = re.compile(
    r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(?:[^;]*?(0x[0-9a-f]+)\s*;)?"
)


def device_functions(library: Path, architecture: str) -> list[DeviceFunction]:
    usage: dict[str, tuple[int, int]] = {}
    name = ""
    for line in _dump(library, "-res-usage", "-arch", architecture).splitlines():
        if match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            usage[name] = int(match[1]), int(match[2])
    code: dict[str, list[tuple[int, str, int | None]]] = {}
    for line in _dump(library, "-sass", "-arch", architecture).splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            code[match[1]] = []
            name = match[1]
        elif match := INSTRUCTION.match(line):
            address, opcode = int(match[1], 16), match[2]
            target = int(match[3], 16) if match[3] else None
            # ptxas writes some jumps past the next instruction as calls.
            if opcode.startswith("CALL.REL") and target == address + 0x20:
                opcode = "BRA"
            code[name].append((address, opcode, target))
    assert usage.keys() == code.keys()
    functions = [
        DeviceFunction(plain, architecture, *usage[mangled], tuple(code[mangled]))
        for mangled, plain in zip(usage, _plain_names(list(usage)), strict=True)
    ]
    return sorted(functions)


COLUMNS = [
    "registers",
    "stack",
    "16-byte loads",
    "16-byte stores",
    "FP32",
    "FP64",
    "shared KiB",
    "thread blocks",
    "occupancy",
]


def row(function: DeviceFunction) -> list[str]:
    return [
        str(function.registers),
        str(function.stack_bytes),
        str(function.count(LOAD_16)),
        str(function.count(STORE_16)),
        str(function.count(FP32)),
        str(function.count(FP64)),
        f"{function.shared_bytes() / 1024:.0f}",
        str(function.thread_blocks()),
        f"{100 * function.occupancy():.0f} %",
    ]


LOAD_16 = r"LDG\.E\.(\w+\.)*128(\.\w+)*"
STORE_16 = r"STG\.E\.(\w+\.)*128(\.\w+)*"
SPILL = r"(LDL|STL)(\.\w+)*"
CALL = r"CALL(\.\w+)*|CALL"
FP32 = r"(FADD|FMUL|FFMA|FADD2|FMUL2|FFMA2)(\.\w+)*"
FP64 = r"(DADD|DMUL|DFMA|DSETP|DMNMX|F2F\.F64\.F32|F2F\.F32\.F64|I2F\.F64|F2I\.F64)(\.\w+)*"


def print_loops(functions: list[DeviceFunction], name: str) -> None:
    (function,) = [f for f in functions if f.name == name]
    for loop in function.innermost_loops():
        kinds = ", ".join(f"{count} {kind}" for kind, count in loop.most_common(10))
        print(f"{loop.total():4} instructions: {kinds}")


def main() -> None:
    arguments = sys.argv[1:]
    loops_of = None
    if arguments[:1] == ["--loops"]:
        _, *loops_of = arguments[:3]
        arguments = arguments[3:]
    if arguments:
        library = Path(arguments[0])
    else:
        import c3a._library

        library = c3a._library._libraries("libc3a_cuda*.so")[0]
    if loops_of:
        return print_loops(device_functions(library, loops_of[1]), loops_of[0])
    width = 46
    for architecture in MULTIPROCESSORS:
        print(f"\n{architecture:<{width}}" + "".join(f"{column:>15}" for column in COLUMNS))
        for function in device_functions(library, architecture):
            print(f"{function.name:<{width}}" + "".join(f"{cell:>15}" for cell in row(function)))


if __name__ == "__main__":
    main()
