"""Lays the operators out for the ``kernels`` package: ``hub.py FOLDER``.

FOLDER/build/VARIANT/ is a build, which ``kernels.get_local_kernel(FOLDER)`` loads; build.toml,
torch-ext/, cpp/ and cuda/ are its sources in that package's layout (kernel-builder itself, which
needs Nix, has not been tried). The operators have a namespace of their own, named after the
sources, so that any number of versions, and an installed c3a, live in one process. With C3A_CUDA=ON
the build is for CUDA. The Python files are the package's, as far as what ``init()`` offers needs
them: torch and the standard library.
"""

import ast
import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "c3a"
NAME = "c3a"
KERNELS = "0.17.0"  # the version of the kernels package that this was tried with
# What the copy offers, of the package's __init__: what needs torch and the standard library alone.
OFFERED = ("linear", "ops", "reference")


def levels() -> dict[str, list[str]]:
    """Return the compiler's options for each instruction-set level of x86-64, as CMake's are."""
    text = (ROOT / "build_support" / "compiler.cmake").read_text()
    names = re.search(r"set\(C3A_LEVELS (x86_64[^)]*)\)", text)[1].split()
    march = {name: f"-march={name.removesuffix('_bf16').replace('_', '-')}" for name in names}
    return {
        name: [march[name], *(["-mavx512bf16"] if name.endswith("_bf16") else [])] for name in names
    }


def init() -> str:
    """Return the copy's ``__init__``."""
    source = ast.parse((PACKAGE / "__init__.py").read_text())
    imports = [
        node
        for node in source.body
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module in OFFERED
    ]
    names = sorted(["cuda", *(alias.name for node in imports for alias in node.names)])
    return "\n".join(
        [
            '"""Block-circular convolution: ``y = scale * x @ circulant(w).T``, by FFT."""\n',
            "from . import cuda",
            *map(ast.unparse, imports),
            f"\n__all__ = {names}\n",
        ]
    )


def modules(source: str) -> set[str]:
    """Return the package's modules that a source imports, by relative imports, and those theirs."""
    found: set[str] = set()
    waiting = [source]
    while waiting:
        for node in ast.walk(ast.parse(waiting.pop())):
            if not isinstance(node, ast.ImportFrom) or node.level != 1:
                continue
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in set(names) - found:
                found.add(name)
                waiting.append((PACKAGE / f"{name}.py").read_text())
    return found


def namespace(backend: str) -> str:
    """Return a namespace of these sources' own."""
    sources = sorted(
        path
        for folder in (ROOT / "cpp", ROOT / "cuda", PACKAGE)
        for path in folder.iterdir()
        if path.suffix in (".cpp", ".cu", ".h", ".py")
    )
    digest = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sources))
    return f"_{NAME}_{backend}_{digest.hexdigest()[:8]}"


def build_toml(project: dict[str, str], defines: list[str]) -> str:
    """Return the description of the sources, as kernel-builder would build them."""

    def kernel(name: str, backend: str, sources: Iterable[str], *flags: str) -> str:
        return (
            f'[kernel.{name}]\nbackend = "{backend}"\ndepends = ["torch"]\n'
            f"cxx-flags = {json.dumps([*defines, *flags])}\nsrc = {json.dumps(sorted(sources))}"
        )

    files = {path.name for path in (ROOT / "cpp").iterdir()}
    host = [f"cpp/{name}" for name in files - {"bindings.cpp", "library.cpp", "cpu_kernel.cpp"}]
    parts = [
        f'[general]\nname = "{NAME}"\nedition = 5\nversion = 1\n'
        f'license = "{project["license"]}"\nbackends = ["cpu", "cuda"]',
        '[torch]\nstable-abi = "2.10"\nsrc = ["torch-ext/torch_binding.cpp"]',
        kernel("cuda", "cuda", [f"cuda/{path.name}" for path in (ROOT / "cuda").iterdir()]),
    ]
    for backend in ("cpu", "cuda"):
        parts.append(kernel(f"front_{backend}", backend, host))
        parts += [
            kernel(f"{level}_{backend}", backend, [f"cpp/{level}.cpp"], *options)
            for level, options in levels().items()
        ]
    return "\n\n".join(parts) + "\n"


def lay_out_sources(folder: Path, project: dict[str, str], name: str) -> None:
    for part, *patterns in (("cpp", "*.cpp", "*.h"), ("cuda", "*.cpp", "*.cu", "*.h")):
        (folder / part).mkdir(parents=True)
        for path in (path for pattern in patterns for path in (ROOT / part).glob(pattern)):
            shutil.copy(path, folder / part)
    for level in levels():
        text = f'#define C3A_LEVEL {level}\n#include "cpu_kernel.cpp"\n'
        (folder / "cpp" / f"{level}.cpp").write_text(text)
    facts = {"C3A_VERSION": project["version"], "C3A_COMPILER": "kernel-builder"}
    facts["C3A_TORCH_TARGET_TEXT"] = "2.10"
    defines = [f"-DC3A_NAMESPACE={name}", *(f'-D{key}="{text}"' for key, text in facts.items())]
    (folder / "build.toml").write_text(build_toml(project, defines))
    (folder / "torch-ext").mkdir()
    (folder / "torch-ext" / "torch_binding.cpp").write_text('#include "../cpp/library.cpp"\n')
    lay_out_package(folder / "torch-ext" / NAME, name)
    shutil.copy(ROOT / "LICENSE", folder)


def lay_out_package(folder: Path, name: str) -> None:
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(init())
    for module in modules(init()):
        text = (PACKAGE / f"{module}.py").read_text()
        if module == "_library":
            text, count = re.subn('^NAMESPACE = "c3a"$', f'NAMESPACE = "{name}"', text, flags=re.M)
            assert count == 1
        (folder / f"{module}.py").write_text(text)


def build(folder: Path, project: dict[str, str], name: str, backend: str) -> str:
    """Build for this machine; return the variant's name."""
    environment = {"C3A_NAMESPACE": name, "C3A_PYBIND": "OFF", "C3A_MANYLINUX": "ON"}
    environment["C3A_CUDA"] = "ON" if backend == "cuda" else "OFF"
    with tempfile.TemporaryDirectory() as built:
        tree = ROOT / "build" / f"hub-{backend}"
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"),
                *("--target", built, f"--config-settings=build-dir={tree}", str(ROOT)),
            ],
            env={**os.environ, **environment},
            check=True,
        )
        libraries = list(Path(built, "c3a").glob("*.so"))
        import torch  # noqa: F401  (the libraries need its own)

        facts = ctypes.CDLL(str(next(path for path in libraries if "_cpu.so" in path.name)))
        about: dict[str, object] = {"type": backend}
        suffix = backend
        if backend == "cuda":
            facts.c3a_cuda_version.restype = facts.c3a_cuda_architectures.restype = ctypes.c_char_p
            major, minor = facts.c3a_cuda_version().decode().split(".")[:2]
            suffix = f"cu{major}{minor}"
            numbers = re.findall(r"\d+", facts.c3a_cuda_architectures().decode())
            about["archs"] = [f"{number[:-1]}.{number[-1]}" for number in numbers]
        variant = f"torch-stable-abi210-{suffix}-{platform.machine()}-linux"
        lay_out_package(folder / "build" / variant, name)
        for path in libraries:
            shutil.copy(path, folder / "build" / variant)
    metadata = {
        **{"id": name, "name": NAME, "version": 1, "license": project["license"]},
        **{"kernels-minver": KERNELS, "python-depends": [], "backend": about},
    }
    text = json.dumps(metadata, indent=2) + "\n"
    (folder / "build" / variant / "metadata.json").write_text(text)
    return variant


def main(folder: Path) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = {key: re.search(f'^{key} = "(.*)"$', text, re.M)[1] for key in ("version", "license")}
    backend = "cuda" if os.environ.get("C3A_CUDA") == "ON" else "cpu"
    name = namespace(backend)
    shutil.rmtree(folder, ignore_errors=True)
    lay_out_sources(folder, project, name)
    variant = build(folder, project, name, backend)
    print(f"{folder / 'build' / variant}, torch.ops.{name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
