"""Each example runs in its short mode, and does what it says."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from c3a._library import cpu_library
from tiny_model import write_model

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def one_thread():
    """Small models gain nothing from more, and lose much where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(name: str, *arguments: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(["--quick", *arguments])


def test_the_bare_operator_finds_the_kernel(capsys):
    assert run("bare_operator") < 1e-3
    assert "served with the same bits: True" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(torch|transformers|accelerate)")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_language_model_learns_and_its_adapter_comes_back(tmp_path, capsys):
    before, after = run("causal_lm", "--output", str(tmp_path / "adapter"))
    assert after < before - 1
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert "logits differ by 0.0e+00" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(torch|transformers|accelerate)")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_language_model_may_be_a_folder(tmp_path, capsys):
    model, text = write_model(tmp_path / "model"), tmp_path / "text.txt"  # for its tokenizer
    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 64}
    config = transformers.LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    text.write_text("the film was good it was great a film it was bad the film was poor " * 100)
    output = tmp_path / "adapter"
    before, after = run(
        "causal_lm", "--model", str(model), "--text", str(text), "--output", str(output)
    )
    assert after < before
    assert "logits differ by 0.0e+00" in capsys.readouterr().out


def test_the_vision_model_learns_rotated_digits():
    pytest.importorskip("sklearn", reason="scikit-learn brings the images")
    upright, before, after = run("vision")
    assert upright > 0.6
    assert after > before + 0.3


def test_the_denoiser_learns_another_drawing(capsys):
    before, after = run("diffusion")
    assert after < 0.98 * before
    assert "attentions.1.to_out.0" in capsys.readouterr().out


@pytest.fixture(scope="module")
def cpp_programs(tmp_path_factory):
    """Build the C++ examples, and return their folder."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    tools = {tool: shutil.which(tool, path=path) for tool in ("cmake", "c++")}
    if None in tools.values():
        pytest.skip(f"needs {', '.join(tool for tool, found in tools.items() if not found)}")
    if not Path(torch.utils.cmake_prefix_path, "Torch", "TorchConfig.cmake").exists():
        pytest.skip("this torch has no headers and libraries for CMake")
    if torch.version.cuda and not shutil.which("nvcc", path=path):
        pytest.skip("the CMake files of a CUDA torch ask for CUDA's toolkit")
    folder = tmp_path_factory.mktemp("cpp")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    output_of(tools["cmake"], "-S", EXAMPLES / "cpp", "-B", folder, prefix)
    output_of(tools["cmake"], "--build", folder)
    return folder


def output_of(*command) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_cpp_program_calls_the_operator_without_python(cpp_programs):
    assert "y has shape [10, 192]" in output_of(cpp_programs / "block_circ_conv", cpu_library())


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Return a package of AOTInductor's, and what the model in it gives for ones."""
    if not shutil.which("c++"):
        pytest.skip("needs c++")
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    return path, output_of(sys.executable, EXAMPLES / "cpp" / "package.py", path)


def test_the_cpp_program_serves_a_package_without_python(cpp_programs, package):
    path, expected = package
    assert output_of(cpp_programs / "serve", cpu_library(), path) == expected


SERVE = """
model = torch._inductor.aoti_load_package({path!r})
for size in (1, 5):
    y = model(torch.ones(size, 64))
    print(list(y.shape), *(f"{{y[-1, feature]:.4f}}" for feature in (0, 1, 31)))
"""


@pytest.mark.parametrize("by", ["import c3a", "torch.ops.load_library({library!r})"])
def test_a_package_runs_in_a_fresh_process_of_python(by, package):
    path, expected = package
    load = by.format(library=str(cpu_library()))
    code = f"import torch\n{load}{SERVE.format(path=str(path))}"
    assert output_of(sys.executable, "-c", code) == expected


def test_torch_says_that_the_operators_are_missing_as_the_documentation_has_it(package):
    code = f"import torch{SERVE.format(path=str(package[0]))}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    page = (EXAMPLES.parent / "docs" / "troubleshooting.md").read_text()
    (words,) = re.findall(r"^### `(Could not find schema for .*?)`", page, re.MULTILINE)
    assert done.returncode == 1
    assert words in done.stderr
