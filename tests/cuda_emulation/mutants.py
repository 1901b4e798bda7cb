"""Breaks the CUDA sources in one place after the other and sees whether the emulated tests notice.

    python tests/cuda_emulation/mutants.py [--only WORDS] [--jobs 2]

A mutant is caught if the tests that it names fail. Every mutant replaces a text that must be there
exactly once, in a copy of the sources; the copy without a mutant must pass.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
COPIED = ["CMakeLists.txt", "build_support", "cpp", "cuda", "python", "tests"]


class Mutant(NamedTuple):
    what: str
    file: str
    text: str
    replacement: str
    tests: str  # pytest's -k within tests/test_cuda.py
    sanitizer: str = "OFF"


TINY = "tiny"
MUTANTS = [
    # Barriers: seen by the order of threads, and by ThreadSanitizer at the line of the access.
    Mutant(
        "no barrier after a pass",
        "cuda/fft.h",
        "q << kRest)] = a[q];\n  }\n  __syncthreads();",
        "q << kRest)] = a[q];\n  }",
        TINY,
    ),
    Mutant(
        "no barrier after a pass, to ThreadSanitizer",
        "cuda/fft.h",
        "q << kRest)] = a[q];\n  }\n  __syncthreads();",
        "q << kRest)] = a[q];\n  }",
        TINY,
        "thread",
    ),
    Mutant(
        "no barrier after the split",
        "cuda/fft.h",
        "at_q = conj(kInverse ? s - t : s + t);\n  }\n  __syncthreads();",
        "at_q = conj(kInverse ? s - t : s + t);\n  }",
        TINY,
        "thread",
    ),
    Mutant(
        "no barrier after loading the tile",
        "cuda/fused.cu",
        "    });\n  });\n  __syncthreads();",
        "    });\n  });",
        TINY,
        "thread",
    ),
    Mutant(
        "no barrier after the fused product",
        "cuda/fused.cu",
        "= sums[o][t];\n      }\n    }\n  }\n  __syncthreads();",
        "= sums[o][t];\n      }\n    }\n  }",
        TINY,
        "thread",
    ),
    Mutant(
        "no barrier between groups of output blocks",
        "cuda/fused.cu",
        "      });\n    });\n  }\n  __syncthreads();",
        "      });\n    });\n  }",
        TINY,
        "thread",
    ),
    Mutant(
        "no barrier before a tile's product",
        "cuda/spectral.cu",
        "      __syncthreads();\n      // Summed tile by tile",
        "      // Summed tile by tile",
        TINY,
    ),
    Mutant(
        "no barrier after a tile's product",
        "cuda/spectral.cu",
        "        }\n      }\n      __syncthreads();\n    }",
        "        }\n      }\n    }",
        TINY,
        "thread",
    ),
    Mutant(
        "a barrier that not all threads come to",
        "cuda/fft.h",
        "q << kRest)] = a[q];\n  }\n  __syncthreads();",
        "q << kRest)] = a[q];\n    if (e < 7) __syncthreads();\n  }",
        TINY,
    ),
    # Bounds
    Mutant(
        "tokens beyond the last are read",
        "cuda/fused.cu",
        "if (first_row + row < rows) group",
        "group",
        "number_of_tokens",
        "address",
    ),
    Mutant(
        "tokens beyond the last are written",
        "cuda/fused.cu",
        "if (token < f.tokens) {",
        "{",
        "number_of_tokens",
        "address",
    ),
    Mutant(
        "output blocks beyond the last are read",
        "cuda/fused.cu",
        "o < left ? w[o * next_out]",
        "true ? w[o * next_out]",
        "number_of_blocks",
        "address",
    ),
    Mutant(
        "a product's factors are read beyond their edges",
        "cuda/spectral.cu",
        "x < left_x && ",
        "",
        "chunks_of_tokens",
        "address",
    ),
    Mutant(
        "a product's results are written beyond their edges",
        "cuda/spectral.cu",
        "row < sizes.rows && column < sizes.columns",
        "row < sizes.rows",
        "chunks_of_tokens",
    ),
    Mutant(
        "a part of a sum goes on into the next",
        "cuda/spectral.cu",
        "begin + terms_per_part < sizes.terms ? begin + terms_per_part : sizes.terms",
        "sizes.terms",
        "sums_are_cut",
    ),
    Mutant(
        "the last numbers of a conversion are left out",
        "cuda/spectral.cu",
        "e < size; e += grid_stride()) {\n    out[e] = added",
        "e < 0; e += grid_stride()) {\n    out[e] = added",
        "chunks_of_tokens",
    ),
    Mutant(
        "rows that fill up a batch are not zero",
        "cuda/spectral.cu",
        "e < padded_size; e += grid_stride()) out[e] = 0;",
        "e < size; e += grid_stride()) out[e] = 0;",
        "similar_sizes",
    ),
    Mutant(
        "a function's shared memory is what the last thread asked for",
        "cuda/launch.h",
        "static_cast<int>(most)",
        "static_cast<int>(most < 0 ? most : bytes)",
        "limit_of_shared_memory",
    ),
    Mutant(
        "too little shared memory is asked for",
        "cuda/fused.cu",
        "return (in_blocks + group) * tokens",
        "return (in_blocks + group - 1) * tokens",
        TINY,
        "address",
    ),
    Mutant(
        "memory is taken as aligned whatever it is",
        "cuda/numbers.h",
        "return reinterpret_cast<uintptr_t>(p) % 16 == 0;",
        "return true;",
        "need_not_be_aligned",
        "address",
    ),
    # Mathematics
    Mutant(
        "the kernel is not conjugated",
        "cuda/fused.cu",
        "sums[o][t].x += cross * x.y;\n          sums[o][t].y += other * x.y;\n"
        "          sums[o][t].y -= cross * x.x;",
        "sums[o][t].x -= cross * x.y;\n          sums[o][t].y += other * x.y;\n"
        "          sums[o][t].y += cross * x.x;",
        TINY,
    ),
    Mutant(
        "the kernel is not conjugated on cuFFT's path",
        "cuda/cuda.cpp",
        "Factor{1, in, per_bin, true}",
        "Factor{1, in, per_bin, false}",
        "similar_sizes",
    ),
    Mutant(
        "slot 0's two bins are multiplied with each other",
        "cuda/fused.cu",
        "cross = slot == 0 ? 0 : v.y;",
        "cross = v.y;",
        TINY,
    ),
    # Prepared kernels, and the input gradient's, which is the transposed one
    Mutant(
        "slot 0's two bins are conjugated",
        "cuda/fused.cu",
        "k.transposed && slot > 0 ? -1.0f",
        "k.transposed ? -1.0f",
        TINY,
    ),
    Mutant(
        "blocks stay where they are when a kernel is transposed",
        "cuda/fused.cu",
        "k.transposed ? block % k.n * k.m + block / k.n : block;",
        "block;",
        "number_of_blocks",
    ),
    Mutant(
        "a stack's kernels are laid out without room between them",
        "cuda/fused.cu",
        "kernel * k.stride",
        "kernel * blocks * h",
        "of_a_stack",
    ),
    Mutant(
        "every kernel of a stack is its first",
        "cuda/cuda.cpp",
        "operand(c.w, kernel * p_.m * p_.n * p_.b)",
        "operand(c.w, 0)",
        "of_a_stack",
    ),
    Mutant(
        "a transposed kernel is prepared as it is",
        "cuda/cuda.cpp",
        "c.transposed ? adjoint(w_hat) : w_hat",
        "c.transposed ? torch::stable::transpose(w_hat, 1, 2) : w_hat",
        "of_a_stack",
    ),
    Mutant(
        "blocks beyond the last are written",
        "cuda/fused.cu",
        "if (row >= rows) return;",
        "",
        "of_a_stack",
        "address",
    ),
    Mutant(
        "slots are taken for bins",
        "cuda/spectral.cu",
        "(__brev(slot) >> (32 - log))",
        "slot",
        "the_other_path",
    ),
    Mutant(
        "bin b / 2 is lost between the paths",
        "cuda/spectral.cu",
        "out[(blocks << log) + block] = {value.y, 0};",
        "out[(blocks << log) + block] = {0, 0};",
        "the_other_path",
    ),
    Mutant(
        "a prepared kernel is taken as aligned whatever it is",
        "cpp/dispatch.h",
        "return aligned ? w_hat : torch::stable::clone(w_hat)",
        "return aligned ? w_hat : w_hat",
        "prepared_kernel_need_not_be_aligned",
    ),
    Mutant(
        "a prepared kernel's layout follows the setting",
        "cuda/cuda.cpp",
        "if (has_fused_layout(b, type)) return steps",
        'if (has_fused_layout(b, type) && controls.path() != "cufft") return steps',
        "the_other_path",
    ),
    Mutant(
        "chunks of the kernel gradient are not added up",
        "cuda/spectral.cu",
        "Entry sum = accumulate ? out[e] : Entry{0, 0};",
        "Entry sum = accumulate && e < 0 ? out[e] : Entry{0, 0};",
        "chunks_of_tokens",
    ),
    # cuFFT
    Mutant(
        "wrong batch",
        "cuda/plans.cpp",
        "key.type, key.batch, &workspace_bytes_)\n                :",
        "key.type, key.batch - 1, &workspace_bytes_)\n                :",
        TINY,
    ),
    Mutant(
        "wrong stride",
        "cuda/plans.cpp",
        "/* ostride= */ key.batch, /* odist= */ 1",
        "/* ostride= */ 1, /* odist= */ key.batch",
        TINY,
    ),
    Mutant(
        "wrong distance",
        "cuda/plans.cpp",
        "/* idist= */ key.length, &bins",
        "/* idist= */ key.length + 1, &bins",
        TINY,
        "address",
    ),
    Mutant(
        "embeddings left out, for which cuFFT ignores strides",
        "cuda/plans.cpp",
        "/* rank= */ 1, &length, &reals,",
        "/* rank= */ 1, &length, nullptr,",
        TINY,
    ),
    Mutant(
        "wrong stream for cuFFT",
        "cuda/plans.cpp",
        "cufftSetStream(handle_, stream)",
        "cufftSetStream(handle_, nullptr)",
        "current_stream",
    ),
    Mutant(
        "wrong stream for a launch",
        "cuda/fused.cu",
        "kThreads, tile.shared_bytes, stream, problem",
        "kThreads, tile.shared_bytes, nullptr, problem",
        "current_stream",
    ),
    Mutant(
        "a plan of another device",
        "cuda/cuda.cpp",
        "get({device_.index, p_.b, batch, type}",
        "get({0, p_.b, batch, type}",
        "current_stream or their_device",
    ),
    Mutant(
        "no workspace",
        "cuda/plans.cpp",
        "cufftSetWorkArea(handle_, workspace)",
        "cufftSetWorkArea(handle_, nullptr)",
        TINY,
    ),
    Mutant(
        "a workspace that is too small",
        "cuda/cuda.cpp",
        "new_empty(like_, {bytes}",
        "new_empty(like_, {bytes - 8}",
        TINY,
        "address",
    ),
    Mutant(
        "spectra are used again after an inverse transform",
        "cuda/cuda.cpp",
        "if (as_it_is) return transform",
        "if (as_it_is) transform(kInverse<Real>, batch, a_hat.mutable_data_ptr(), out.data);\n"
        "    if (as_it_is) return transform",
        TINY,
    ),
    Mutant(
        "real numbers that are not aligned to complex ones",
        "cuda/cuda.cpp",
        "given == rows && is_aligned_to_complex<Real>(a.data);",
        "given == rows;",
        "need_not_be_aligned",
    ),
    Mutant(
        "a plan without a lock",
        "cuda/plans.cpp",
        "  const std::lock_guard lock(mutex_);\n  check_cufft(cufftSetStream",
        "  check_cufft(cufftSetStream",
        "threads_share",
    ),
    Mutant(
        "a cache without a bound",
        "cuda/plans.cpp",
        "if (!captured) evicted = evict_to(capacity_);",
        "",
        "least_recently",
    ),
    Mutant(
        "the most recently used plan goes first",
        "cuda/plans.cpp",
        "entries_.splice(entries_.begin(), entries_, place->second);",
        "entries_.splice(entries_.end(), entries_, place->second);",
        "least_recently or threads_share or kept_by",
    ),
    Mutant(
        "captured plans are dropped",
        "cuda/plans.cpp",
        "if (entry->plan->captured) continue;",
        "",
        "graph_captured",
    ),
    Mutant(
        "plans are made while a graph is captured",
        "cuda/plans.cpp",
        "    if (captured) {\n      throw",
        "    if (false) {\n      throw",
        "graph_captured",
    ),
    Mutant(
        "an error that is not taken back",
        "cuda/launch.h",
        "  cudaGetLastError();  // takes",
        "  // takes",
        "error_of_cuda",
    ),
]


class Workshop:
    """One copy of the sources with its builds, used by one mutant at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.sources = folder / "sources"
        if folder.exists():
            shutil.rmtree(folder)
        self.sources.mkdir(parents=True)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                skip = shutil.ignore_patterns("__pycache__", "*.so")
                shutil.copytree(source, self.sources / name, ignore=skip)
            else:
                shutil.copy(source, self.sources / name)

    def build(self, sanitizer: str) -> None:
        tree = self.folder / sanitizer
        import pybind11

        configure = [
            *("cmake", "-S", self.sources, "-B", tree, "-G", "Ninja"),
            *(
                "-DSKBUILD_PROJECT_VERSION=0",
                "-DSKBUILD_PROJECT_VERSION_FULL=0",
                "-DC3A_CUDA=OFF",
                "-DC3A_EMULATE_CUDA=CPU",
            ),
            *(f"-DC3A_SANITIZE={sanitizer}", "-DCMAKE_BUILD_TYPE=Release"),
            *(f"-DPython_EXECUTABLE={sys.executable}",),
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            # which mutants may leave behind
            "-DCMAKE_CXX_FLAGS=-Wno-unused-parameter -Wno-unused-variable",
        ]
        if not tree.exists():
            subprocess.run(configure, check=True, capture_output=True)
        built = subprocess.run(
            ["cmake", "--build", tree, "--parallel", "1"], capture_output=True, text=True
        )
        if built.returncode != 0:
            raise RuntimeError(f"does not compile:\n{built.stdout}{built.stderr}")
        package = tree / "package" / "c3a"
        if not package.exists():
            shutil.copytree(self.sources / "python" / "c3a", package)
        for library in tree.glob("*.so"):
            shutil.copy(library, package)

    def test(self, sanitizer: str, tests: str) -> subprocess.CompletedProcess:
        paths = [str(self.folder / sanitizer / "package"), sysconfig.get_path("purelib")]
        command = [sys.executable, "-S", "-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider"]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONDONTWRITEBYTECODE": "1",
            "C3A_EMULATED": "1",
            "OMP_NUM_THREADS": "1",
        }

        def library(name):
            return subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()

        if sanitizer == "address":
            environment["LD_PRELOAD"] = f"{library('libasan.so')} {library('libstdc++.so')}"
            environment["ASAN_OPTIONS"] = "detect_leaks=0"
        elif sanitizer == "thread":
            environment["LD_PRELOAD"] = library("libtsan.so")
            environment["TSAN_OPTIONS"] = "halt_on_error=1"
            command = ["setarch", "-R", *command]  # which it needs where addresses vary widely
        return subprocess.run(
            [*command, self.sources / "tests" / "test_cuda.py", "-k", tests],
            env=environment,
            cwd=self.sources,
            capture_output=True,
            text=True,
            timeout=900,
        )

    def try_mutant(self, mutant: Mutant | None, sanitizer: str, tests: str):
        original = path = None
        if mutant:
            path = self.sources / mutant.file
            original = path.read_text()
            path.write_text(original.replace(mutant.text, mutant.replacement))
        try:
            self.build(sanitizer)
            return self.test(sanitizer, tests)
        finally:
            if original is not None:
                path.write_text(original)


def without_a_place() -> list[str]:
    """Return what is said of mutants whose text is not in the sources exactly once."""
    said = []
    for mutant in MUTANTS:
        times = (ROOT / mutant.file).read_text().count(mutant.text)
        if times != 1:
            said.append(f"{mutant.what}: its text is {times} times in {mutant.file}")
    return said


def reason(run: subprocess.CompletedProcess) -> str:
    """Return the line that tells best how the mutant was caught."""
    output = run.stdout + run.stderr
    for pattern in (
        r"CUDA emulation: .*",
        r"SUMMARY: \w+Sanitizer: .*",
        r"runtime error: .*",
        r"^E +(?:RuntimeError|AssertionError|assert).*",
        r"Fatal Python error: .*",
    ):
        if found := re.search(pattern, output, re.MULTILINE):
            return re.sub(r"\S*/", "", found[0]).removeprefix("E").strip()[:100]
    return f"exit status {run.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="mutants whose description has these words")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutants")
    options = parser.parse_args()
    # cmake and ninja of the environment that this Python is of
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if lost := without_a_place():
        parser.error("\n".join(lost))
    mutants = [mutant for mutant in MUTANTS if options.only in mutant.what]
    workshops: Queue[Workshop] = Queue()
    for job in range(options.jobs):
        workshops.put(Workshop(options.folder / str(job)))
    survivors = []

    def judge(mutant: Mutant) -> None:
        workshop = workshops.get()
        start = time.monotonic()
        try:
            run = workshop.try_mutant(mutant, mutant.sanitizer, mutant.tests)
        except RuntimeError as error:
            survivors.append(f"{mutant.what}: {error}")
            return
        finally:
            workshops.put(workshop)
        # 5: no test was selected
        caught = run.returncode not in (0, 5)
        said = reason(run) if caught else "SURVIVED"
        if not caught:
            survivors.append(mutant.what)
        print(f"{mutant.what}: {said} [{time.monotonic() - start:.0f} s]", flush=True)

    # What is not broken must pass, by every sanitizer: else failures would mean nothing.
    whole: dict[str, set[str]] = {}
    for mutant in mutants:
        whole.setdefault(mutant.sanitizer, set()).add(mutant.tests)

    def check(item) -> None:
        sanitizer, tests = item
        workshop = workshops.get()
        try:
            run = workshop.try_mutant(None, sanitizer, " or ".join(sorted(tests)))
        finally:
            workshops.put(workshop)
        if run.returncode != 0:
            raise RuntimeError(
                f"the unbroken sources fail ({sanitizer}):\n{run.stdout}{run.stderr}"
            )
        print(f"unbroken, sanitizer {sanitizer}: passes", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(check, whole.items()))
        # Those of one build and one file together: less to compile again.
        list(pool.map(judge, sorted(mutants, key=lambda mutant: (mutant.sanitizer, mutant.file))))
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} mutants caught")
    for survivor in survivors:
        print(f"survived: {survivor}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
