"""The build before anything is compiled: what it finds, and the sentence that it ends in if not."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "build_support"))
import c3a_backend  # noqa: E402
import find_torch  # noqa: E402


def fake_torch(folder: Path, version: str, cuda: str | None = None) -> Path:
    """A torch package with no more than the build's configuration looks at."""
    major, minor = version.split(".")[:2]
    files = {
        "version.py": f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n",
        "include/torch/csrc/stable/library.h": "",
    }
    if (int(major), int(minor)) >= (2, 10):
        files["include/torch/headeronly/version.h"] = (
            f"#define TORCH_VERSION_MAJOR {major}\n#define TORCH_VERSION_MINOR {minor}\n"
            '#define TORCH_VERSION \\\n  "unread"\n'
        )
    if cuda:
        files["lib/libtorch_cuda.so"] = ""
    for name, text in files.items():
        (folder / "torch" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "torch" / name).write_text(text)
    return folder / "torch"


@pytest.fixture
def configure(tmp_path):
    """Run CMake on the sources with a torch 2.10; return it and, in one line, what it said."""

    def configure(*options: str, torch: Path | None = None, **env: str):
        torch = torch or fake_torch(tmp_path, "2.10.0")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        bare = {name: value for name, value in os.environ.items() if not name.startswith("C3A_")}
        run = subprocess.run(
            [
                *("cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path / "build"),
                *(
                    "-DSKBUILD_PROJECT_VERSION=0",
                    "-DSKBUILD_PROJECT_VERSION_FULL=0",
                    f"-DPython_EXECUTABLE={sys.executable}",
                ),
                *(f"-DC3A_TORCH_ROOT={torch}", "-DC3A_PYBIND=OFF", "-DC3A_CUDA=OFF", *options),
            ],
            env=bare | {"PATH": path} | env,
            capture_output=True,
            text=True,
        )
        return run, " ".join((run.stdout + run.stderr).split())

    return configure


def test_headers_of_torch_2_10_are_taken_and_those_of_2_9_refused(configure, tmp_path):
    run, said = configure()
    assert run.returncode == 0, said
    assert "torch headers: 2.10, " in said
    run, said = configure(torch=fake_torch(tmp_path / "old", "2.9.1+cpu"))
    assert run.returncode != 0
    assert "needs the headers of torch 2.10 or newer, found torch: 2.9.1+cpu, in '/" in said
    assert "C3A_TORCH_ROOT" in said
    run, said = configure(torch=tmp_path / "none")
    assert run.returncode != 0
    assert "found torch: none, in '/" in said


def test_a_compiler_that_lacks_what_is_used_is_named_before_anything_is_compiled(
    configure, tmp_path
):
    old = tmp_path / "old-c++"
    old.write_text('#!/bin/sh\nexec c++ "$@" -std=gnu++14\n')
    old.chmod(0o755)
    run, said = configure(CXX=str(old))
    assert run.returncode != 0
    assert (
        f"needs a compiler for C++20 with vector extensions, GCC 11 or Clang 14 or newer; {old}"
        in (said)
    )
    assert "error:" in said  # the compiler's own first


def test_without_a_compiler_it_says_what_to_install(configure):
    run, said = configure(CXX="/bin/false")
    assert run.returncode != 0
    assert "found none: install one (on Debian and Ubuntu: apt install g++)" in said


COMPILERS = ["g++", *(f"g++-{n}" for n in range(11, 17)), *(f"clang++-{n}" for n in range(14, 24))]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="for x86-64")
@pytest.mark.parametrize("compiler", [*filter(shutil.which, COMPILERS)])
def test_every_compiler_at_hand_optimises_products_of_pairs(compiler, tmp_path):
    """Clang 16 crashed, on the optimised code only, which the check of the compiler is not."""
    product = tmp_path / "product.cpp"
    product.write_text(
        f'#include "{ROOT}/cpp/product.h"\n'
        "namespace c3a::cpu::tried {\n"
        "void f(Complex<float>& sum, const Pair* x, const Pair* y) {\n"
        "  using A = Arithmetic<Pair>;\n"
        "  A::add<Product::left>(sum, A::scalar(x, 16), A::column(y, 16));\n"
        "}\n"
        "}\n"
    )
    flags = ["-std=c++20", "-O2", "-DC3A_LEVEL=tried", "-march=x86-64-v4", "-mavx512bf16"]
    command = [compiler, *flags, "-c", product, "-o", tmp_path / "product.o"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


AARCH64 = f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'build_support/aarch64.cmake'}"


def test_without_a_cross_compiler_for_aarch64_it_says_what_to_install(configure):
    run, said = configure(AARCH64, "-DCMAKE_FIND_USE_SYSTEM_ENVIRONMENT_PATH=OFF")
    assert run.returncode != 0
    assert (
        "c3a for aarch64 needs aarch64-linux-gnu-g++ and found none: install it "
        "(on Debian and Ubuntu: apt install g++-aarch64-linux-gnu)"
    ) in said


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="needs that compiler")
def test_what_is_built_for_aarch64_is_named_for_it_and_has_its_level(configure, tmp_path):
    run, said = configure(
        *(AARCH64, "-DC3A_PYBIND=ON", "-DC3A_MANYLINUX=ON"),
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}",
    )
    assert run.returncode == 0, said
    rules = (tmp_path / "build/build.ninja").read_text()
    assert re.search(r"_C\.cpython-3\d+-aarch64-linux-gnu\.so", rules)
    assert "-DC3A_LEVEL=native" in rules
    assert "x86" not in rules.replace(str(ROOT), "")


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_other_systems_are_refused_in_one_sentence(configure, system):
    run, said = configure(f"-DCMAKE_SYSTEM_NAME={system}")
    assert run.returncode != 0
    assert f"c3a is built and tested on Linux only; {system} is not supported" in said


@pytest.mark.parametrize("on", [False, True])
def test_warnings_are_errors_only_where_asked_for(configure, tmp_path, on):
    run, said = configure(f"-DC3A_WERROR={'ON' if on else 'OFF'}")
    assert run.returncode == 0, said
    rules = (tmp_path / "build/build.ninja").read_text()
    flags = [line for line in re.findall("FLAGS = (.*)", rules) if "-Wall" in line]
    assert len(flags) > 5
    assert all("-Wextra" in line and ("-Werror" in line) == on for line in flags)


def test_a_cuda_torch_without_nvcc_is_told_that_no_cuda_library_is_built(configure, tmp_path):
    torch = fake_torch(tmp_path / "cuda", "2.15.0", cuda="13.0")
    run, said = configure("-DC3A_CUDA=AUTO", torch=torch, CUDACXX="/bin/false")
    assert run.returncode == 0, said
    assert "CMake Warning" in said
    assert "this torch has CUDA, but c3a is built without" in said
    run, said = configure("-DC3A_CUDA=ON", torch=torch, CUDACXX="/bin/false")
    assert run.returncode != 0
    assert "C3A_CUDA=ON needs nvcc 13, or 12.8 or newer, and cufft.h; found nvcc: none" in said


@pytest.mark.parametrize(
    ("cuda", "warns"), [("12.8", True), ("13.0", False), ("13.1", False), (None, False)]
)
def test_a_torch_of_another_cuda_major_than_nvccs_is_named(configure, tmp_path, cuda, warns):
    nvcc = tmp_path / "nvcc"  # no more of one than its version: what follows fails
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
    nvcc.chmod(0o755)
    torch = fake_torch(tmp_path / "cuda", "2.10.0", cuda=cuda)
    options = (f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DC3A_CUFFT_INCLUDE={tmp_path}")
    _, said = configure("-DC3A_CUDA=ON", *options, torch=torch)
    assert "CUDA library: ON" in said
    assert (
        "this torch is built for CUDA 12.8 and will not load the CUDA library of nvcc 13.0" in said
    ) == warns
    assert ("several times slower" in said) == warns


@pytest.fixture
def environment(tmp_path):
    """Make an environment with a torch of that version; return its folder."""

    def environment(name: str, version: str) -> Path:
        folder = tmp_path / name
        (folder / "bin").mkdir(parents=True)
        python = folder / "bin/python"
        python.write_text(f"#!/bin/sh\necho {fake_torch(folder, version)}\n")
        python.chmod(0o755)
        return folder

    return environment


def found_from(isolated: Path, command: list, **env: str) -> str:
    """What an isolated Python finds that `command`, which is given it and the script, starts."""
    script = [isolated / "bin/python", ROOT / "build_support/find_torch.py"]
    run = subprocess.run(
        [*command, *script], env=os.environ | env, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


# As uv and `build` do it: they run in the user's environment, or are pointed at it, and start a
# Python of another one, whose own variables do not tell of the user's.
STARTS = ["sh", "-c", 'unset VIRTUAL_ENV; shift; "$@"; exit $?', "sh"]


def test_torch_is_found_behind_another_tools_isolation(tmp_path, environment):
    isolated = tmp_path / "isolated"
    venv.create(isolated, symlinks=True)
    host, old = environment("host", "2.11.0"), environment("old", "2.9.0")
    torch = str(host / "torch")
    assert found_from(isolated, [*STARTS, "-"], VIRTUAL_ENV=str(host)) == torch
    for named in (host, host / "bin/python", f"--python={host}"):
        assert found_from(isolated, [*STARTS, named], VIRTUAL_ENV="") == torch
    assert found_from(isolated, [*STARTS, old], VIRTUAL_ENV=str(host)) == torch


def test_the_torch_of_this_interpreter_comes_first(environment, monkeypatch):
    import torch

    monkeypatch.setenv("VIRTUAL_ENV", str(environment("host", "2.11.0")))
    assert find_torch.torch_root() == str(Path(torch.__file__).parent)


def test_a_system_that_hides_its_processes_is_searched_as_far_as_it_goes(monkeypatch):
    def hidden(*_args, **_kwargs):
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", hidden)
        found = list(find_torch._interpreters())
    assert found == [sys.executable, str(Path(sys.base_prefix, "bin", "python3"))]


def test_torch_is_a_requirement_of_the_build_only_where_none_is_found(monkeypatch, capsys):
    monkeypatch.delenv("C3A_TORCH_ROOT", raising=False)
    monkeypatch.setattr(find_torch, "torch_root", lambda: "/somewhere/torch")
    assert "torch" not in " ".join(c3a_backend.get_requires_for_build_wheel())
    monkeypatch.setattr(find_torch, "torch_root", lambda: "")
    assert "torch>=2.10" in c3a_backend.get_requires_for_build_wheel()
    assert "torch>=2.10" in c3a_backend.get_requires_for_build_editable()
    said = capsys.readouterr().err.splitlines()[0]
    assert "set C3A_TORCH_ROOT to an installed torch's folder, or build with --no-build" in said
    monkeypatch.setenv("C3A_TORCH_ROOT", "/somewhere/torch")
    assert "torch" not in " ".join(c3a_backend.get_requires_for_build_wheel())
