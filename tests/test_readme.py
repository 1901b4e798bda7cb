"""The README's Python runs as it stands there."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")
def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "trainable: 6,146 of 596,738 parameters" in printed
    assert "PEFT: Jacobian mismatch for output 0 with respect to input 0" in printed


def test_no_figure_is_left_to_fill_in():
    assert not re.search(r"@[A-Z]+\d*@", README.read_text())
