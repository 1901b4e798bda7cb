"""The layout for the ``kernels`` package (``build_support/hub.py``); see ``make hub``."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import c3a
from c3a import _library

ROOT = Path(__file__).resolve().parent.parent
FOLDER = os.environ.get("C3A_HUB", "")
built = pytest.mark.skipif(not FOLDER, reason="needs a build for the hub: make hub")


@pytest.fixture(scope="module")
def hub():
    path = ROOT / "build_support" / "hub.py"
    spec = importlib.util.spec_from_file_location("hub", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Imports(ast.NodeVisitor):
    """What a source imports when it runs, its own package's modules with a dot."""

    def __init__(self, source: str):
        self.names: set[str] = set()
        self.visit(ast.parse(source))

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.names |= {alias.name.split(".")[0] for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level == 0:
            self.names.add(node.module.split(".")[0])
        else:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            self.names |= {f".{name}" for name in names}


def test_the_copy_imports_torch_and_the_standard_library_only(hub, tmp_path):
    hub.lay_out_package(tmp_path / "c3a", "_c3a_cpu_0")
    files = {path.stem: path.read_text() for path in (tmp_path / "c3a").glob("*.py")}
    assert {"__init__", "_library", "ops", "linear", "reference"} <= set(files)
    allowed = {"torch", *sys.stdlib_module_names, *(f".{name}" for name in files)}
    for source in files.values():
        assert Imports(source).names <= allowed


def test_the_copy_offers_every_operator_that_the_package_does(hub):
    offered = re.search(r"__all__ = (\[.*\])", hub.init())[1]
    functions = {name for name, value in vars(c3a.ops).items() if hasattr(value, "__wrapped__")}
    assert {"prepare", "block_circ_conv_linear", "block_circ_conv_many"} <= functions
    assert functions <= set(ast.literal_eval(offered)) & set(c3a.__all__)
    defined = set(re.findall(r"m\.def\(\s*\"(\w+)\(", (ROOT / "cpp/library.cpp").read_text()))
    ruled = {operator.op.name().partition("::")[2] for operator in c3a.operators.OPERATORS}
    assert defined == ruled
    assert "operators" in hub.modules(hub.init())


def test_the_copy_has_a_namespace_of_its_own_in_one_place(hub, tmp_path):
    name = hub.namespace("cpu")
    assert name == hub.namespace("cpu") != hub.namespace("cuda")
    hub.lay_out_package(tmp_path / "c3a", name)
    named = [path.name for path in (tmp_path / "c3a").glob("*.py") if name in path.read_text()]
    assert named == ["_library.py"]
    for path in (tmp_path / "c3a").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops.c3a")


def test_the_kernels_package_reads_the_sources_description(hub, tmp_path):
    rust = pytest.importorskip("kernels._rust", reason="make hub installs kernels")
    hub.lay_out_sources(tmp_path / "c3a", {"version": "1", "license": "Apache-2.0"}, "_c3a_cpu_0")
    backends = rust.Build.open(tmp_path / "c3a").general.backends
    assert [str(backend) for backend in backends] == ["cpu", "cuda"]


def test_every_level_that_the_cpu_chooses_among_is_in_the_sources_description(hub, tmp_path):
    chosen = re.findall(r"\blevel_(x86\w+)", (ROOT / "cpp" / "cpu.cpp").read_text())
    project = {"version": "1", "license": "Apache-2.0"}
    hub.lay_out_sources(tmp_path / "c3a", project, "_c3a_cpu_0")
    text = (tmp_path / "c3a" / "build.toml").read_text()
    described = set(re.findall(r"^\[kernel\.(x86\w+)_cpu\]$", text, re.M))
    assert described == set(chosen)
    assert '"-march=x86-64-v4", "-mavx512bf16"' in text


LOAD = {
    "get_local_kernel": "kernels.get_local_kernel(pathlib.Path(sys.argv[1]))",
    "LOCAL_KERNELS": "kernels.get_kernel('c3a/c3a', version=1)",
}


@built
@pytest.mark.parametrize("way", LOAD)
def test_the_kernels_package_loads_a_copy_beside_the_installed_one_with_equal_results(way):
    code = f"""
import pathlib, sys
import c3a, kernels, torch
copy = {LOAD[way]}
(loaded,) = kernels.get_loaded_kernels()
namespace = getattr(torch.ops, loaded.metadata.id)
assert copy.__name__ == loaded.metadata.id != "c3a"
assert namespace.block_circ_conv.default is not torch.ops.c3a.block_circ_conv.default
x, w = torch.randn(5, 24), torch.randn(2, 3, 8)
def results(of):
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = of.block_circ_conv(a, b)
    layer = of.C3ALinear(torch.nn.Linear(24, 16), 8)
    with torch.no_grad():
        layer.base_layer.weight.fill_(0.5)
        layer.base_layer.bias.fill_(0.25)
        layer.c3a_kernel.copy_(w)
    prepared = of.block_circ_conv_prepared(x, of.prepare(w), 8)
    onto = of.block_circ_conv_linear(a, layer.base_layer.weight, layer.base_layer.bias, b)
    stack, index = torch.stack([w, -w]), torch.tensor([1, 0, -1, -1, 1])
    many = of.block_circ_conv_many(a, stack, index)
    by_row = of.block_circ_conv_many_prepared(x, of.prepare(stack), index, 8)
    grads = [torch.autograd.grad(t.square().sum(), a)[0] for t in (y, onto, many)]
    return [y, *grads, layer(x), prepared, onto, many, by_row, torch.autograd.grad(y.sum(), b)[0]]
for ours, theirs in zip(results(c3a), results(copy), strict=True):
    assert torch.equal(ours, theirs)
assert torch.equal(copy.circulant(w), c3a.circulant(w))
torch.library.opcheck(namespace.block_circ_conv.default, (x, w.requires_grad_()))
batched = torch.vmap(copy.block_circ_conv, in_dims=(0, None))(x, w)
assert torch.allclose(batched, c3a.block_circ_conv(x, w))
try:
    copy.block_circ_conv(x[:, 1:], w)
except RuntimeError as error:
    assert str(error).startswith("c3a.block_circ_conv: expected x.size(-1) == n * b = 24"), error
else:
    raise AssertionError("no error")
print("equal")
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, FOLDER],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "LOCAL_KERNELS": f"c3a/c3a={FOLDER}"},
        capture_output=True,
        text=True,
    )
    assert run.stdout == "equal\n", run.stderr


@built
def test_the_copy_is_for_any_torch_and_any_python():
    (variant,) = Path(FOLDER, "build").iterdir()
    assert variant.name.startswith("torch-stable-abi210-")
    (library,) = variant.glob("*_cpu.so")
    assert library.name != _library.cpu_library().name
    assert not list(variant.glob("*cpython*"))
