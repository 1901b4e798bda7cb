"""The types that users' checkers see; ``make lint`` runs mypy on those and on tests/typing."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import c3a

PYRIGHT = Path(sys.executable).with_name("basedpyright")


@pytest.mark.skipif(not PYRIGHT.is_file(), reason="needs basedpyright")
def test_every_public_name_has_a_known_type(tmp_path):
    # By links, because pyright reads no source in a hidden folder, such as .venv.
    lightning = importlib.util.find_spec("lightning")
    files = [c3a.__file__, torch.__file__, *([lightning.origin] if lightning else [])]
    links = [tmp_path / str(number) for number in range(len(files))]
    for link, file in zip(links, files, strict=True):
        link.symlink_to(Path(file).parents[1])
    run = subprocess.run(
        [PYRIGHT, "--pythonpath", sys.executable, "--verifytypes", "c3a"]
        + ["--ignoreexternal", "--outputjson"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, links))},
        capture_output=True,
        text=True,
    )
    found = json.loads(run.stdout)["typeCompleteness"]
    names = {symbol["name"]: symbol for symbol in found["symbols"] if symbol["isExported"]}
    if not lightning:  # whose class that of c3a.lightning is
        names = {name: it for name, it in names.items() if not name.startswith("c3a.lightning.")}
    assert {f"c3a.{name}" for name in c3a.__all__} <= set(names)
    assert [name for name, symbol in names.items() if not symbol["isTypeKnown"]] == []
    assert found["completenessScore"] == 1 or not lightning
