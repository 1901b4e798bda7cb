"""The README's commands and Python run as they stand there."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from c3a import cli
from tiny_model import write_model, write_reviews

README = Path(__file__).parent.parent / "README.md"
# What a plain installation does not have; a block that needs one says so beside the import.
EXTRAS = ("peft", "transformers")
NOT_RUN = {
    "pip install": "it would change the environment that the tests run in",
    "make": "targets of CI's own, and the tests themselves",
}


def blocks(language: str) -> list[str]:
    pattern = rf"^```{language}\n(.*?)^```"
    return re.findall(pattern, README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")
def test_the_examples_run_after_a_plain_installation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) == 7
    names: dict = {}
    for block in blocks("python"):
        with monkeypatch.context() as plain:
            if not re.search(rf"import.* # pip install ({'|'.join(EXTRAS)})$", block, re.M):
                for extra in EXTRAS:
                    plain.setitem(sys.modules, extra, None)
            exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "trainable: 6,146 of 596,738 parameters" in printed
    assert "PEFT: Jacobian mismatch for output 0 with respect to input 0" in printed


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(torch|transformers|accelerate)")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_commands_run(tmp_path, monkeypatch, capsys):
    """On a tiny model, for a few steps, and on tiny data where a command names none."""
    monkeypatch.chdir(tmp_path)
    write_reviews(tmp_path / "reviews.csv")
    tiny = ["--model", str(write_model(tmp_path / "tiny")), "--steps", "2"]
    data = ["--data", "reviews.csv", "--text-column", "review", "--label-column", "verdict"]
    ran = []
    for line in "".join(blocks("bash")).splitlines():
        line = re.sub(r"^(\w+=\S+ )+", "", line)  # variables for the one command
        if any(line.startswith(command) for command in NOT_RUN):
            continue
        program, *arguments = shlex.split(line, comments=True)
        assert program == "c3a"
        if arguments[0] == "finetune":
            arguments += tiny if "--data" in arguments else tiny + data
        assert cli.main(arguments) == 0, line
        ran.append(arguments[0])
    lora = ["export-lora", "convert"]
    assert ran == ["finetune", "finetune", "inspect", "merge", *lora, "info"]
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert "written to runs/lora" in capsys.readouterr().out


def test_no_figure_is_left_to_fill_in():
    assert not re.search(r"@[A-Z]+\d*@", README.read_text())
