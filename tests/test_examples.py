"""Each example runs in its short mode, and does what it says."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

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


def test_the_cpp_program_calls_the_operator_without_python(tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    tools = {tool: shutil.which(tool, path=path) for tool in ("cmake", "c++")}
    if None in tools.values():
        pytest.skip(f"needs {', '.join(tool for tool, found in tools.items() if not found)}")
    if not Path(torch.utils.cmake_prefix_path, "Torch", "TorchConfig.cmake").exists():
        pytest.skip("this torch has no headers and libraries for CMake")
    if torch.version.cuda and not shutil.which("nvcc", path=path):
        pytest.skip("the CMake files of a CUDA torch ask for CUDA's toolkit")
    from c3a._library import _libraries

    where = ["-S", EXAMPLES / "cpp", "-B", tmp_path]
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (
        [tools["cmake"], *where, prefix],
        [tools["cmake"], "--build", tmp_path],
        [tmp_path / "block_circ_conv", _libraries("libc3a_cpu.so")[0]],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "y has shape [10, 192]" in done.stdout
