"""Finds an installed torch to take headers from; prints its folder, or nothing.

A build in isolation does not see the environment that it builds for. pip hides that one by
PYTHONPATH and PYTHONHOME alone; uv and ``python -m build`` make an environment of their own, which
knows nothing of it. But they were started from it or for it: the environments that the processes
above this one have in their variables or command lines are looked through, the nearest first.
Any torch of 2.10 or newer will do, since all give the same libraries. No torch is imported.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

OLDEST = (2, 10)
_PRINT_TORCH = (
    "import importlib.util as u; s = u.find_spec('torch'); "
    "print(s.submodule_search_locations[0] if s and s.submodule_search_locations else '')"
)


def _ancestors() -> Iterator[Path]:
    pid = os.getpid()
    while pid > 1:
        folder = Path("/proc", str(pid))
        try:
            status = (folder / "status").read_text()
        except OSError:  # hidden, or a system without /proc
            return
        yield folder
        pid = int(re.search(r"^PPid:\s*(\d+)", status, re.M)[1])


def _named_by(process: Path) -> Iterator[Path]:
    """Yield what may be environments or interpreters, of what a process was given."""
    there = Path(os.readlink(process / "cwd"))
    for word in (process / "cmdline").read_text(errors="replace").split("\0"):
        if word:
            yield there / word.rpartition("=")[2]  # /venv/bin/python, --python=/venv
    variables = dict(
        line.partition("=")[::2]
        for line in (process / "environ").read_text(errors="replace").split("\0")
    )
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if variables.get(variable):
            yield Path(variables[variable])
    if (process / "comm").read_text().strip() == "uv":  # which looks there by itself
        for folder in (there, *there.parents):
            yield folder / ".venv"


def _interpreters() -> Iterator[str]:
    yield sys.executable
    for process in _ancestors():
        try:
            for named in _named_by(process):
                is_python = re.fullmatch(r"python[\d.]*", named.name)
                for python in (
                    (named, named / "bin/python") if is_python else (named / "bin/python",)
                ):
                    if os.access(python, os.X_OK) and python.is_file():
                        yield str(python)
        except OSError:  # another user's process, or one that has ended
            continue
    yield str(Path(sys.base_prefix, "bin", "python3"))


def _of(python: str, env: dict[str, str]) -> str:
    run = subprocess.run([python, "-c", _PRINT_TORCH], env=env, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else ""


def version(root: str) -> tuple[int, ...]:
    """Return a torch's version, as far as it is made of numbers; () if it has none."""
    try:
        text = Path(root, "version.py").read_text()
    except OSError:
        return ()
    found = re.search(r"^__version__ = ['\"](\d+)\.(\d+)", text, re.M)
    return tuple(map(int, found.groups())) if found else ()


def torch_root() -> str:
    """Return the folder of a torch that is new enough, else of any, else ''."""
    hidden = ("PYTHONPATH", "PYTHONHOME")
    bare = {name: value for name, value in os.environ.items() if name not in hidden}
    too_old, asked = "", set()
    for python in _interpreters():
        for env in (dict(os.environ), bare) if python == sys.executable else (bare,):
            key = (python, env == bare)
            if key in asked:
                continue
            asked.add(key)
            root = _of(python, env)
            if version(root) >= OLDEST:
                return root
            too_old = too_old or root
    return too_old


if __name__ == "__main__":
    print(torch_root())
