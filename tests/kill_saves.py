"""Kill processes that save an adapter: its folder then loads, old or new.

    python tests/kill_saves.py [--kills 500] [--seed 0]

First a save is killed before each of its file operations, in a new folder and onto another
adapter; then processes that save two adapters in turn are killed at random moments. Children are
forked: torch is imported once. The exit status is 1 if a folder did not load.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import c3a
from c3a import adapter

# Two patches of one model. In shapes the first's configuration fits the second's kernels.
PATCHES = [
    {"target_modules": ["0", "1"], "block_size": 6},
    {"target_modules": "all-linear", "block_size": {"0": 6, "1": 6, "2": 3}},
    {"target_modules": ["0", "2"], "block_size": 4, "modules_to_save": ["1"]},
]
OPERATIONS = ("open", "os.", "shutil.", "tempfile.", "fcntl.")
MOST_FAILURES = 10


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(12, 12) for _ in range(3)])


def patched(number: int) -> nn.Module:
    model = c3a.patch_model(base(), **PATCHES[number])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


MODELS = [patched(number) for number in range(len(PATCHES))]


def found_in(folder: Path) -> int | None:
    """Return which of the adapters a folder holds, None for none yet; else raise."""
    if not (folder / adapter.WEIGHTS).exists() and not (folder / adapter.CONFIG).exists():
        return None
    state = c3a.load_adapter(base(), folder).state_dict()
    for number, model in enumerate(MODELS):
        expected = model.state_dict()
        same = state.keys() == expected.keys()
        if same and all(torch.equal(state[key], expected[key]) for key in state):
            return number
    raise ValueError("it holds none of the adapters that were saved")


def is_torn(folder: Path) -> bool:
    """Return whether the two files are of two saves, as one that knows no better sees them."""
    config = folder / adapter.CONFIG
    if not config.exists():
        return (folder / adapter.WEIGHTS).exists()
    on_disk = json.loads(config.read_text())
    return on_disk != adapter.read_adapter(folder).config


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def child(run) -> int:
    """Fork a process that runs something; return its id."""
    process = os.fork()
    if process == 0:
        try:
            run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return process


def killed_before(operation: int, folder: Path, number: int) -> bool:
    """Kill a save before its n-th file operation; return whether it got there."""

    def run() -> None:
        count = 0

        def hook(event: str, _) -> None:
            nonlocal count
            if event.startswith(OPERATIONS):
                count += 1
                if count == operation + 1:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        c3a.save_adapter(MODELS[number], folder)

    status = os.waitpid(child(run), 0)[1]
    if status and not os.WIFSIGNALED(status):
        raise RuntimeError("a save failed")
    return status != 0


def killed_at_random(draw: random.Random, folder: Path, longest: float) -> None:
    """Kill a process that saves all adapters in turn."""
    ready, begun = os.pipe()

    def run() -> None:
        os.write(begun, b".")
        while True:
            for model in MODELS:
                c3a.save_adapter(model, folder)

    process = child(run)
    os.read(ready, 1)
    time.sleep(draw.uniform(0, longest))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    os.close(ready)
    os.close(begun)


class Tally:
    def __init__(self) -> None:
        self.counts, self.failures = Counter(), 0

    def look(self, folder: Path, allowed: set, what: str) -> None:
        try:
            number = found_in(folder)
            if number not in allowed:
                raise ValueError(f"it holds {number}, expected one of {allowed}")
            if len(left_behind(folder)) > 1:
                raise ValueError(f"there is {left_behind(folder)}")
        except Exception as error:
            self.failures += 1
            print(f"{what}: {error}", flush=True)
            return
        self.counts[what.split(",")[0]] += 1
        self.counts["the two files were of two saves"] += number is not None and is_torn(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    tally = Tally()
    with tempfile.TemporaryDirectory() as name:
        for old, new in ((None, 0), (0, 1), (1, 2), (2, 0)):
            folder = Path(name) / f"{old} to {new}"
            for operation in itertools.count():
                if old is not None:
                    c3a.save_adapter(MODELS[old], folder)
                killed = killed_before(operation, folder, new)
                folder.mkdir(exist_ok=True)
                allowed = {old, new} if killed else {new}
                tally.look(
                    folder,
                    allowed,
                    f"a kill before an operation, {folder.name}, number {operation}",
                )
                if not killed or tally.failures >= MOST_FAILURES:
                    break
                if old is None:
                    shutil.rmtree(folder)
        folder = Path(name) / "random"
        start = time.monotonic()
        for model in MODELS:
            c3a.save_adapter(model, folder)
        longest = 2 * (time.monotonic() - start)
        draw = random.Random(options.seed)
        for kill in range(options.kills):
            if tally.failures >= MOST_FAILURES:
                break
            killed_at_random(draw, folder, longest)
            tally.look(folder, {*range(len(MODELS))}, f"a kill at random, number {kill}")
        c3a.save_adapter(MODELS[0], folder)
        if left_behind(folder) or found_in(folder) != 0:
            tally.failures += 1
            print(f"after the last save there is {left_behind(folder)}")
    for what, count in sorted(tally.counts.items()):
        print(f"{count:8} {what}")
    print(f"{tally.failures} failures")
    return int(tally.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
