"""The documentation's code runs, and it names what there is."""

import doctest
import importlib
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import c3a

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SVG = "{http://www.w3.org/2000/svg}"


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["block-size", "compile", "from-lora", "from-peft", "serving"])
@pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in python_blocks(DOCS / f"{name}.md"):
        exec(compile(block, f"{name}.md", "exec"), names)
    assert names


@pytest.mark.parametrize("name", c3a.__all__)
def test_every_public_name_has_an_example_that_runs_by_itself(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.DocTestFinder(recurse=False).find(getattr(c3a, name), name, globs={})
    assert any(test.examples for test in found)
    runner = doctest.DocTestRunner()
    for test in found:
        runner.run(test)
    assert runner.failures == 0


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("name", ["c3a.memory", "c3a.onnx"])
def test_the_examples_of_a_module_run(name, tmp_path, monkeypatch):
    if name == "c3a.onnx":
        pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted
    assert results.failed == 0


def test_every_page_with_code_is_run_by_a_test():
    with_code = {page.stem for page in DOCS.glob("*.md") if python_blocks(page)}
    assert with_code == {
        "block-size",
        "compile",
        "distributed",
        "from-lora",
        "from-peft",
        "serving",
    }


def run_in_two_processes(program, folder):
    (folder / "train.py").write_text(program)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launch, "train.py"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_distributed_page_runs_in_two_processes(tmp_path):
    replicated, sharded = python_blocks(DOCS / "distributed.md")
    last = "dist.destroy_process_group()"
    assert last in replicated
    look = (
        "kernel = again.module[0].c3a_kernel.detach()\nassert kernel.any()\n"
        "with open(f'{dist.get_rank()}.txt', 'w') as file:\n    file.write(repr(kernel.tolist()))\n"
    )
    run_in_two_processes(replicated.replace(last, look + last), tmp_path)
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text()
    run_in_two_processes(sharded, tmp_path)
    whole = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
    c3a.load_adapter(whole, tmp_path / "runs" / "sharded")
    assert whole[0].c3a_kernel.any()


def test_the_api_page_has_every_public_name_and_no_other():
    named = re.findall(r"auto(?:class|function):: c3a\.(\w+)$", (DOCS / "api.md").read_text(), re.M)
    assert sorted(named) == sorted(c3a.__all__)


def test_the_translation_table_has_every_setting_of_pefts_configuration():
    import peft

    ours = {field.name for field in fields(peft.C3AConfig)}
    general = {field.name for field in fields(peft.PeftConfig)} - {"task_type", "inference_mode"}
    page = (DOCS / "from-peft.md").read_text()
    assert {name for name in ours - general if f"`{name}`" not in page} == set()


def test_parameters_at_rank_8_are_counted_as_the_lora_page_says():
    model = torch.nn.Sequential(torch.nn.Linear(768, 768), torch.nn.Linear(768, 768))
    c3a.patch_model(model, "all-linear", block_size="auto", rank=8)
    assert c3a.summary(model).trainable == 12_288


def sources() -> str:
    """All messages of the code, each on one line, its variable parts as dots."""
    files = [ROOT / "CMakeLists.txt", *(ROOT / "build_support").iterdir()]
    files += [*(ROOT / "cpp").iterdir(), *(ROOT / "python" / "c3a").rglob("*.py")]
    text = "\n".join(path.read_text() for path in files if path.is_file())
    joined = re.sub(r'"\s*\n\s*f?"', "", text)
    return re.sub(r"\$?\{[^{}]*\}|\", [\w.]+, \"", "…", joined)


def test_the_messages_of_the_troubleshooting_page_are_the_codes():
    page = (DOCS / "troubleshooting.md").read_text()
    of_c3a = re.sub(r"^## [^\n]*, said by others$.*?(?=^## )", "", page, flags=re.M | re.S)
    titles = re.findall(r"^### (.*`.*)$", of_c3a, re.M)
    messages = [message for title in titles for message in re.findall(r"`([^`]+)`", title)]
    assert len(messages) > 20
    text = sources()
    missing = [
        message
        for message in messages
        if not re.search(
            ".*".join(re.escape(part) for part in message.removeprefix("c3a: ").split("…")), text
        )
    ]
    assert missing == []


def test_the_drawn_matrix_is_the_circulant(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(DOCS)
    import drawings

    drawings.write(tmp_path)
    root, _ = (
        ElementTree.parse(tmp_path / f"{name}.html").getroot() for name in ("matrix", "flow")
    )
    cells = [
        (float(text.get("y")), float(text.get("x")), int(text[0].text))
        for text in root.iter(f"{SVG}text")
        if len(text)
    ]
    numbers = torch.tensor([number for _, _, number in sorted(cells)])
    w = torch.arange(drawings.B).expand(drawings.M, drawings.N, drawings.B)
    assert torch.equal(numbers.view(drawings.M * drawings.B, -1), c3a.circulant(w))
