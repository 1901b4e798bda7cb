"""Damaged adapter folders: loading one gives a whole adapter, or says what is wrong.

    python tests/fuzz_files.py [--seconds 60] [--seed 0] [--case N]

A case is drawn from the seed and its own number alone: an adapter that was saved here, with bytes
flipped, files cut short or exchanged, configurations and tensors edited. ``c3a.load_adapter`` then
either loads finite kernels (or warns) of their shapes, or raises ValueError or FileNotFoundError in
one line that names the folder, and the model is as it was. A failure prints the command that
repeats it; the exit status is 1 if there was one.
"""

import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import c3a
import fuzzing
from c3a import adapter

PATCHES = [
    {"target_modules": ["query"], "block_size": 6, "modules_to_save": ["classifier"]},
    {"target_modules": ["query", "0.out"], "block_size": {"query": 4, "out": 3}},
    {"target_modules": "all-linear", "block_size": 2, "scale": 0.37, "dtype": torch.bfloat16},
]
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64),
)
NAMES = (
    "query",
    "0.out",
    "out",
    "classifier",
    "blocks",
    "blocks.0",
    "",
    ".",
    "..",
    "a\nb",
    "\ud800",
)
PATTERNS = (
    *(r".*\.query", "(.+)+X", "(", "[", r"\d+", "query|out", r"blocks\.\d+\.(query|out)", "(?P<a>"),
    *(r"(?i)QUERY", r".*\.(query|out)$", "a{99999999999}", "((((((((a))))))))", r"(a)(?(1)b|c)"),
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(12, 12), nn.Linear(12, 24)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.classifier = nn.Linear(24, 2)
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))


def save_all(folder: Path) -> None:
    """Save an adapter of each patch."""
    torch.manual_seed(0)
    for number, patch in enumerate(PATCHES):
        model = c3a.patch_model(Model(), **patch)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        c3a.save_adapter(model, folder / str(number))


class Draw(random.Random):
    """The random choices of one case, and in words what they came to."""

    def __init__(self, seed: int, number: int) -> None:
        super().__init__(f"{seed}/{number}")
        self.facts: list[str] = []

    def note(self, fact: str) -> None:
        self.facts.append(fact if fact.isprintable() else repr(fact))

    def value(self, depth: int = 0):
        """Return something that JSON can hold."""
        kind = self.randrange(12 if depth < 3 else 9)
        if kind < 3:
            return self.choice(NAMES + PATTERNS)
        if kind < 6:
            numbers = (None, True, False, 0, 1, -1, 2, 3, 6, 12, 2**40, 10**30, 0.5, 1e308)
            return self.choice(numbers)
        if kind < 9:
            return [self.choice(NAMES + PATTERNS) for _ in range(self.randrange(4))]
        if kind < 11:
            return [self.value(depth + 1) for _ in range(self.randrange(4))]
        return {self.choice(NAMES + PATTERNS): self.value(depth + 1) for _ in range(3)}


# Damages: each changes files of the folder


def flip_bytes(draw: Draw, folder: Path) -> None:
    path = folder / draw.choice((adapter.CONFIG, adapter.WEIGHTS))
    data = bytearray(path.read_bytes())
    end = draw.choice((len(data), len(data), min(len(data), 2000), 16))  # headers come first
    for _ in range(draw.choice((1, 1, 2, 8, 50))):
        place = draw.randrange(end)
        data[place] = draw.choice((data[place] ^ 1 << draw.randrange(8), draw.randrange(256)))
    path.write_bytes(data)
    draw.note(f"bytes of {path.name}")


def cut(draw: Draw, folder: Path) -> None:
    path = folder / draw.choice((adapter.CONFIG, adapter.WEIGHTS))
    size = draw.choice((0, 1, 8, draw.randrange(path.stat().st_size), path.stat().st_size - 1))
    os.truncate(path, size)
    draw.note(f"{path.name} cut to {size} bytes")


def insert(draw: Draw, folder: Path) -> None:
    path = folder / draw.choice((adapter.CONFIG, adapter.WEIGHTS))
    data = path.read_bytes()
    place, more = draw.randrange(len(data)), draw.randbytes(draw.choice((1, 2, 100)))
    path.write_bytes(data[:place] + more + data[place:])
    draw.note(f"{len(more)} bytes more in {path.name} at {place}")


def remove(draw: Draw, folder: Path) -> None:
    path = folder / draw.choice((adapter.CONFIG, adapter.WEIGHTS))
    path.unlink()
    if draw.random() < 0.3:
        path.mkdir()
    draw.note(f"no {path.name}, or a folder")


def exchange(draw: Draw, folder: Path) -> None:
    """Take a file of another adapter."""
    name = draw.choice((adapter.CONFIG, adapter.WEIGHTS))
    other = draw.randrange(len(PATCHES))
    shutil.copy(folder.parent / str(other) / name, folder / name)
    draw.note(f"{name} of adapter {other}")


def nest(draw: Draw, folder: Path) -> None:
    depth = draw.choice((10, 1000, 100_000))
    text = draw.choice(('{"a":', "[")) * depth
    if draw.random() < 0.5:
        text = f'{{"peft_type": "C3A", "block_size_pattern": {text}'
    (folder / adapter.CONFIG).write_text(text)
    draw.note(f"{depth} levels")


def edit_config(draw: Draw, folder: Path) -> None:
    path = folder / adapter.CONFIG
    config = json.loads(path.read_text())
    for _ in range(draw.choice((1, 1, 2, 3))):
        key = draw.choice((*config, "layers_to_transform", "layers_pattern", "target_modules"))
        config[key] = draw.value()
        draw.note(f"{key} {config[key]!r}")
        if draw.random() < 0.1:
            del config[key]
    path.write_text(json.dumps(config))


def edit_tensors(draw: Draw, folder: Path) -> None:
    path = folder / adapter.WEIGHTS
    with safe_open(path, "pt") as file:
        metadata = draw.choice((file.metadata(), None))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for _ in range(draw.choice((1, 1, 2))):
        key = draw.choice(sorted(tensors))
        tensor = tensors.pop(key)
        kind = draw.randrange(6)
        if kind == 0:
            dtype = draw.choice(DTYPES)
            tensors[key] = (tensor.real if tensor.is_complex() else tensor).to(dtype)
            draw.note(f"{key} {dtype}")
        elif kind == 1:
            shape = [draw.choice((0, 1, *tensor.shape)) for _ in range(draw.randrange(5))]
            tensors[key] = torch.zeros(shape, dtype=tensor.dtype)
            draw.note(f"{key} {shape}")
        elif kind == 2:
            name = draw.choice(
                ("", "base_model.model.x", key + "\n", key[:-3], key[11:], "é" * 300)
            )
            tensors[name] = tensor
            draw.note(f"{key} as {name!r}")
        elif kind == 3:
            tensors[key] = tensor.clone()
            tensors[key].view(-1)[0] = draw.choice((torch.nan, torch.inf, 1e38))
            draw.note(f"{key} with an odd number")
        elif kind == 4:
            tensors |= {key: tensor, "base_model.model.steps": torch.zeros(3)}
            draw.note("a buffer more")
        if not tensors:
            tensors[key] = tensor
    save_file(tensors, path, metadata=metadata)


DAMAGES = {
    flip_bytes: 6,
    cut: 2,
    insert: 2,
    remove: 1,
    exchange: 2,
    nest: 1,
    edit_config: 8,
    edit_tensors: 5,
}


# Running


class Wrong(Exception):
    """What a case found."""


def state_of(model: nn.Module) -> dict:
    found = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    return found | {name: (b.clone(), False) for name, b in model.named_buffers()}


def same(before: dict, after: dict) -> bool:
    return before.keys() == after.keys() and all(
        torch.equal(before[name][0], after[name][0]) and before[name][1] == after[name][1]
        for name in before
    )


def load_damaged(draw: Draw, folder: Path) -> str:
    """Load a folder into a model, patched already or not; return what came of it."""
    torch.manual_seed(1)
    model = Model()
    if draw.random() < 0.3:
        patch = draw.randrange(len(PATCHES))
        c3a.patch_model(model, **PATCHES[patch])
        draw.note(f"into a model with patch {patch}")
    before = state_of(model)
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            c3a.load_adapter(model, folder)
        except (ValueError, FileNotFoundError) as error:
            said = str(error)
            draw.note(said)
            if not said.startswith("c3a.load_adapter: ") or not said.isprintable():
                raise Wrong("the message is no line that says whose it is") from error
            if str(folder) not in said or len(said) > 3000:
                raise Wrong("the message does not name the folder, or is long") from error
            if not same(before, state_of(model)):
                raise Wrong("the model was changed") from error
            return "refused"
        finally:
            if time.monotonic() - start > 60:
                raise Wrong("it took more than a minute")
    odd = False
    for name, layer in model.named_modules():
        if not isinstance(layer, c3a.C3ALinear):
            continue
        m, n, b = layer.c3a_kernel.shape
        if (
            b != layer.block_size
            or m != -(-layer.out_features // b)
            or n != -(-layer.in_features // b)
        ):
            raise Wrong(f"{name} has a kernel of {layer.c3a_kernel.shape}")
        odd |= not layer.c3a_kernel.isfinite().all()
        layer(torch.ones(1, layer.in_features))
    if [w for w in warned if "not finite" not in str(w.message)]:
        raise Wrong(f"it warned: {[str(w.message) for w in warned]}")
    if odd != bool(warned):
        raise Wrong("a kernel that is not finite was loaded without a word, or the reverse")
    return "loaded"


def run_case(seed: int, number: int, saved: Path) -> tuple[str, str | None, Draw]:
    """Return what came of a case, what was wrong, and how it was drawn."""
    draw = Draw(seed, number)
    folder = saved / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    original = draw.randrange(len(PATCHES))
    shutil.copytree(saved / str(original), folder)
    draw.note(f"adapter {original}")
    names = []
    try:
        for _ in range(draw.choice((1, 1, 1, 2))):
            (damage,) = draw.choices([*DAMAGES], [*DAMAGES.values()])
            try:
                damage(draw, folder)
            except Exception as error:  # what another damage left
                draw.note(f"{damage.__name__}: {error}")
                continue
            names.append(damage.__name__)
        came = load_damaged(draw, folder)
        return f"{came} after {names[0] if names else 'nothing'}", None, draw
    except Wrong as error:
        return "wrong", str(error), draw
    except Exception:
        return "wrong", traceback.format_exc(), draw


def main(argv: list[str] | None = None) -> int:
    options = fuzzing.parser(__doc__).parse_args(argv)
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        saved = Path(name)
        save_all(saved)

        def one(number: int):
            came, wrong, draw = run_case(options.seed, number, saved)
            return came, wrong, draw.facts

        return fuzzing.run(options, f"python tests/fuzz_files.py --seed {options.seed}", one)


if __name__ == "__main__":
    sys.exit(main())
