"""Everything that only a GPU can tell, in one run and one report. Needs no network.

    python tests/gpu_report.py [--steps facts build suite memcheck racecheck bench] [--out FILE]

It needs a GPU, nvcc 13, and a Python with a CUDA 13 build of torch, pytest, NumPy, SciPy, cmake and
ninja; compute-sanitizer, pybind11, peft and rich for the steps that use them. The package is built
for this GPU alone and run from build/gpu; nothing is installed. What a step prints goes to FILE
(build/gpu_report.txt) as it comes, and a summary at the end; the exit status is 1 if a step failed.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "gpu"
PACKAGE = BUILD / "package"
# The tests that take a device. The others know the CPU only.
SUITE = ["operator", "cuda", "errors", "rules", "linear", "patch"]
# compute-sanitizer slows device code down a hundredfold: shapes are tiny.
WATCHED = ["tests/test_cuda.py", "-k", "tiny or number_of_blocks or need_not_be_aligned or threads"]


class Report:
    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.file = path.open("w")
        self.steps: list[tuple[str, str, float]] = []

    def print(self, text: str = "") -> None:
        print(text, flush=True)
        self.file.write(text + "\n")
        self.file.flush()

    def run(self, *command, **environment) -> int:
        """Run a command; its output goes into the report line by line."""
        self.print("$ " + " ".join(map(str, command)))
        with subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            for line in process.stdout:
                self.print(line.rstrip("\n"))
        return process.returncode

    def step(self, name: str, function) -> bool:
        self.print(f"\n== {name}")
        start = time.monotonic()
        try:
            status = function()
        except Exception as error:
            self.print(f"{type(error).__name__}: {error}")
            status = 1
        # A number is an exit status, a text the reason why nothing was done.
        outcome = status if isinstance(status, str) else "failed" if status else "passed"
        self.steps.append((name, outcome, time.monotonic() - start))
        return status == 0

    def summary(self) -> int:
        self.print("\n== summary")
        for name, outcome, seconds in self.steps:
            self.print(f"{name:<10} {seconds:6.0f} s  {outcome}")
        return int(any(outcome == "failed" for _, outcome, _ in self.steps))


def with_package() -> dict[str, str]:
    """The environment in which ``import c3a`` finds what was built."""
    return {"PYTHONPATH": os.pathsep.join([str(PACKAGE), str(ROOT / "tests")])}


def facts(report: Report) -> int:
    import torch

    report.run("nvcc", "--version")
    if shutil.which("nvidia-smi"):
        report.run("nvidia-smi")
    report.print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version}")
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU here")
    for index in range(torch.cuda.device_count()):
        report.print(f"cuda:{index} {torch.cuda.get_device_properties(index)}")
    return 0


def build(report: Report, architectures: str | None) -> int:
    if architectures is None:
        import torch

        major, minor = torch.cuda.get_device_capability()
        architectures = f"{major}{minor}-real"
    pybind11 = importlib.util.find_spec("pybind11")
    options = [f"-DCMAKE_CUDA_ARCHITECTURES={architectures}", "-DC3A_CUDA=ON"]
    if pybind11:
        import pybind11

        options += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    else:
        options += ["-DC3A_PYBIND=OFF"]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    status = report.run(
        *("cmake", "-S", ROOT, "-B", BUILD / "tree", *generator, *options),
        *(
            "-DSKBUILD_PROJECT_VERSION=0",
            "-DSKBUILD_PROJECT_VERSION_FULL=0",
            "-DCMAKE_BUILD_TYPE=Release",
        ),
        f"-DPython_EXECUTABLE={sys.executable}",
    )
    status = status or report.run("cmake", "--build", BUILD / "tree", "--parallel")
    if status:
        return status
    shutil.rmtree(PACKAGE, ignore_errors=True)
    shutil.copytree(ROOT / "python", PACKAGE)
    for library in (BUILD / "tree").glob("*.so"):
        shutil.copy(library, PACKAGE / "c3a")
    metadata = PACKAGE / "c3a-0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: c3a\nVersion: 0\n")
    where = "import c3a; print(c3a.__file__)"
    used = subprocess.check_output(
        [sys.executable, "-c", where], env={**os.environ, **with_package()}, text=True
    )
    if not used.startswith(str(PACKAGE)):
        raise RuntimeError(f"another c3a goes before the one built here: uninstall {used.strip()}")
    return report.run(sys.executable, "-m", "c3a", "info", **with_package())


def suite(report: Report) -> int:
    files = [f"tests/test_{name}.py" for name in SUITE]
    return report.run(
        *(sys.executable, "-m", "pytest", "-q", "--device", "cuda", *files), **with_package()
    )


def sanitizer(report: Report, tool: str) -> int | str:
    if shutil.which("compute-sanitizer") is None:
        return "not done: compute-sanitizer is not here"
    return report.run(
        *("compute-sanitizer", "--tool", tool, "--error-exitcode", "9"),
        *(sys.executable, "-m", "pytest", "-q", "--device", "cuda", *WATCHED),
        # Otherwise torch's allocator hides what lies beyond a tensor's end.
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        **with_package(),
    )


def bench(report: Report) -> int | str:
    missing = [name for name in ("peft", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        return f"not done: {' and '.join(missing)} not here"
    figures = report.path.with_suffix(".json")
    return report.run(
        *(sys.executable, "bench/bench.py", "--device", "cuda", "--json", figures), **with_package()
    )


def main() -> int:
    names = ["facts", "build", "suite", "memcheck", "racecheck", "bench"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_report.txt")
    parser.add_argument("--architectures", help="CMake's; the GPU's own if not given")
    options = parser.parse_args()
    # cmake and ninja of the environment that this Python is of
    scripts = sysconfig.get_path("scripts")
    os.environ["PATH"] = os.pathsep.join([scripts, os.environ["PATH"], "/usr/local/cuda/bin"])
    report = Report(options.out)
    report.print(f"c3a on a GPU, {time.strftime('%Y-%m-%d %H:%M:%S')}")
    functions = {
        "facts": lambda: facts(report),
        "build": lambda: build(report, options.architectures),
        "suite": lambda: suite(report),
        "memcheck": lambda: sanitizer(report, "memcheck"),
        "racecheck": lambda: sanitizer(report, "racecheck"),
        "bench": lambda: bench(report),
    }
    for name in options.steps:
        right = report.step(name, functions[name])
        # Without a GPU or a build, nothing that follows means anything.
        if not right and name in ("facts", "build"):
            break
    return report.summary()


if __name__ == "__main__":
    sys.exit(main())
