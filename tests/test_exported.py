"""What torch.export and torch.jit make of an adapted model runs without c3a's Python."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import c3a
from c3a._library import cpu_library

pytestmark = pytest.mark.filterwarnings(
    "ignore:.isinstance.treespec, LeafSpec:FutureWarning"  # torch's own copies
)

MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)

LOAD = """
import sys
import torch

x, y = torch.load("tensors.pt")
for line in sys.stdin.read().split():
    load = torch.jit.load if line.endswith(".pt") else lambda f: torch.export.load(f).module()
    print(line, (load(line)(x) - y).abs().max().item() < 1e-6)
"""


def in_a_fresh_process(code: str, folder: Path, files: list[str]):
    command = [sys.executable, "-c", code]
    options = {"capture_output": True, "text": True, "cwd": folder}
    return subprocess.run(command, input="\n".join(files), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def files(folder):
    """Write models that were exported and traced in every mode; return their names."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 30))
    c3a.patch_model(model, "all-linear", block_size={"0": 16, "2": 15}, init="gaussian", pad=True)
    x = torch.randn(3, 64)
    names = []
    for training in (True, False):
        model.train(training)
        for mode in MODES:
            with mode():
                model(x)  # which without gradients prepares the kernels
                names.append(f"{mode.__name__}_{training}.pt")
                torch.jit.trace(model, (x,)).save(folder / names[-1])
    names.append("program.pt2")
    torch.export.save(torch.export.export(model, (x,)), folder / names[-1])
    with torch.no_grad():
        torch.save((x, model(x)), folder / "tensors.pt")
    return names


def test_what_was_exported_runs_with_the_library_alone(folder, files):
    code = f"import torch\ntorch.ops.load_library({str(cpu_library())!r})\n{LOAD}"
    done = in_a_fresh_process(code, folder, files)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} True" for name in files]
    assert len(files) == 7


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (0, "Unknown builtin op: c3a::block_circ_conv"),
        (-1, "Please import the custom op to register it before deserializing"),
    ],
)
def test_without_it_torch_says_what_the_documentation_has(index, words, folder, files):
    done = in_a_fresh_process(LOAD, folder, [files[index]])
    page = (Path(__file__).parent.parent / "docs" / "troubleshooting.md").read_text()
    assert done.returncode == 1
    assert words in done.stderr
    assert words in page


def test_a_linear_layer_and_the_sum_in_one_come_apart_into_functional_operators():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.w = nn.Linear(24, 32).requires_grad_(False), nn.Parameter(W)

        def forward(self, x):
            return c3a.block_circ_conv_linear(x, self.base.weight, self.base.bias, self.w, 0.5)

    W, x = torch.randn(4, 3, 8), torch.randn(5, 24)
    layer = Layer()
    program = torch.export.export(layer, (x,)).run_decompositions()
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert torch.ops.c3a.block_circ_conv_add.default in called
    assert not any("functionalize" in str(target) for target in called)
    torch.testing.assert_close(program.module()(x), layer(x))
