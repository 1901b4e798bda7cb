"""Careless calls of the command line: odd arguments, and broken sentences, adapters and models.

    python tests/fuzz_cli.py [--seconds 60] [--seed 0] [--case N]

A case is drawn from the seed and its own number alone, and runs in this process, in its own folder.
It has to end with 0 or 2 and without a traceback, and change nothing that was there; with 2 it has
to say why, in a person's words, and leave nothing new. A failure prints the command that repeats
just that case; the exit status is 1 if there was one.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # mistyped names are many, and no hub's business

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import c3a
import c3a.lora
import fuzzing
from c3a.cli import main as cli
from tiny_model import write_model, write_reviews

NUMBERS = ("0", "-1", "1", "2", "3", "7", "24", "31", "1e9", "nan", "inf", "-inf", "", "x", "0x10")
NUMBERS += ("1e-320", str(2**31), str(2**63), str(10**400), "1.5", "1_0", "٣", "--")
VALUES = (None, True, False, 0, 1, -1, 3, 2**40, 10**400, 1.5, float("nan"), float("inf"), "", "x")
VALUES += ("../..", "(", "[/red]", "query", "None", [], {}, [[]], ["x"], [1], {"x": 1}, {"0": {}})
VALUES += ([None], "\ud800", "\x1b[2J", ["query", "value"], {"query": 3}, "SEQ_CLS", 0.0)
# What Python says to programmers; where a library does, the line names the file and the kind.
RAW = re.compile(
    r"object has no attribute|object is not|unexpected keyword|not enough values|too many values|"
    r"invalid literal|positional argument|^'[^']*'$|list index out of|unhashable|not supported |"
    r"0x[0-9a-f]{8,}|<class|Traceback"
)
LIBRARY = re.compile(r": \w+(Error|Exception): ")


class Wrong(Exception):
    """What a case found."""


class Case:
    """The folder and the random choices of one case, and in words what they came to."""

    def __init__(self, seed: int, number: int, folder: Path, originals: Path) -> None:
        self.random = random.Random(f"{seed}/{number}")
        self.folder = folder
        self.originals = originals
        self.facts: list[str] = []

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def choice(self, *options):
        return self.random.choice(options)

    def copy(self, name: str) -> Path:
        """Return a copy of an original, a file or a folder, that the case may break."""
        source, target = self.originals / name, self.folder / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
        return target

    # Breaking what is there

    def bytes_of(self, content: bytes) -> bytes:
        """Flip, cut, repeat, insert or lose bytes."""
        content = bytearray(content)
        for _ in range(self.choice(1, 1, 2, 5)):
            start = self.random.randrange(len(content) + 1)
            end = min(len(content), start + self.choice(1, 1, 2, 8, 100))
            change = self.choice("flip", "cut", "lose", "repeat", "insert", "zero")
            if change == "flip" and start < len(content):
                content[start] ^= 1 << self.random.randrange(8)
            elif change == "cut":
                del content[start:]
            elif change == "lose":
                del content[start:end]
            elif change == "repeat":
                content[start:start] = content[start:end]
            elif change == "insert":
                content[start:start] = self.choice(
                    *(b"\0", b"\xff", b'"', b"\n", b",", b"\t", b"\r", b"{", b"\xef\xbb\xbf", b"\\")
                )
            elif change == "zero":
                content[start:end] = bytes(end - start)
        return bytes(content)

    def file(self, path: Path) -> None:
        """Break a file as a disk, a tool or a person would."""
        change = self.choice("bytes", "bytes", "empty", "gone", "folder", "other")
        self.facts.append(f"{path.name}: {change}")
        if change == "bytes":
            path.write_bytes(self.bytes_of(path.read_bytes()))
        elif change == "empty":
            path.write_bytes(b"")
        else:
            path.unlink()
            if change == "folder":
                path.mkdir()
            elif change == "other":
                path.write_bytes(self.random.randbytes(self.choice(1, 8, 100, 10_000)))

    def configuration(self, path: Path) -> None:
        """Edit a configuration, which stays JSON."""
        try:
            config = json.loads(path.read_text())
        except (ValueError, RecursionError):  # it is broken already
            return
        if self.chance(0.05):
            config = self.choice(*VALUES)
        for _ in range(self.choice(1, 1, 2)) if isinstance(config, dict) else ():
            key = self.choice(*config, "auto_map", "rank_pattern", "dtype", "quantization_config")
            value = self.choice(*VALUES)
            if self.chance(0.1):
                value = [value] * 1000
            self.facts.append(f"{path.name}: {key} = {str(value)[:40]}")
            config[key] = value
            if self.chance(0.2):
                del config[key]
        text = json.dumps(config)
        if self.chance(0.05):
            text = text[:-1] + ', "deep": ' + "[" * 100_000 + "]" * 100_000 + "}"
            self.facts.append("nested deeply")
        path.write_text(text)

    def tensors(self, path: Path) -> None:
        """Change a tensor of a file, which stays whole."""
        try:
            tensors = load_file(path)
        except SafetensorError:  # it is broken already
            return
        for _ in range(self.choice(1, 1, 2)):
            key = self.choice(*tensors, "base_model.model.more.c3a_kernel", "more")
            old = tensors.pop(key, torch.zeros(1, 1, 4))
            changes: dict[str, Callable] = {
                "gone": lambda old=old: None,
                "nan": lambda old=old: torch.full_like(old.float(), float("nan")),
                "inf": lambda old=old: old.float() + float("inf"),
                "huge": lambda old=old: old.float() * 1e38,
                "empty": lambda old=old: old[:0],
                "scalar": lambda old=old: old.flatten()[:1].reshape(()),
                "flat": lambda old=old: old.flatten(),
                "more": lambda old=old: old.unsqueeze(0),
                "half": lambda old=old: old.half(),
                "double": lambda old=old: old.double(),
                "int": lambda old=old: old.int(),
                "bool": lambda old=old: old.bool(),
                "complex": lambda old=old: old.float().to(torch.complex64),
                "float8": lambda old=old: old.real.to(torch.float8_e4m3fn),
                "shorter": lambda old=old: old[..., :-1].contiguous(),
                "renamed": lambda old=old: old,
            }
            change = self.choice(*changes)
            self.facts.append(f"{path.name}: {key}: {change}")
            new = changes[change]()
            if new is not None:
                tensors[key + ("x" if change == "renamed" else "")] = new
        save_file(tensors, path, metadata={"format": "pt"})

    # What is drawn

    def break_folder(self, folder: Path) -> None:
        for _ in range(self.choice(1, 1, 1, 2)):
            path = self.choice(*sorted(path for path in folder.iterdir() if path.is_file()))
            if path.suffix == ".json" and self.chance(0.7):
                self.configuration(path)
            elif path.suffix == ".safetensors" and self.chance(0.7):
                self.tensors(path)
            else:
                self.file(path)
            if not any(path.is_file() for path in folder.iterdir()):
                return

    def sentences(self) -> Path:
        """Return a file of sentences, mostly a broken one."""
        path = self.copy("reviews.csv")
        rows = [line.split(",") for line in path.read_text().splitlines()]
        suffix = self.choice(".csv", ".tsv", ".jsonl", ".json")
        if suffix in (".csv", ".tsv"):
            separator = {".csv": ",", ".tsv": "\t"}[suffix]
            for _ in range(self.choice(0, 0, 1, 3)):
                row = self.choice(*rows)
                row[self.random.randrange(len(row))] = str(self.choice(*VALUES)).replace(
                    "\ud800", ""
                )
                if self.chance(0.3):
                    row.append("more")
                if self.chance(0.3):
                    row.pop()
                    row.append("")
            text = "\n".join(map(separator.join, rows))
        else:
            objects = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
            for _ in range(self.choice(0, 0, 1, 3)):
                one = self.choice(*objects)
                one[self.choice(*rows[0], "more")] = self.choice(*VALUES)
            text = "\n".join(map(json.dumps, objects))
        path.unlink()
        path = path.with_suffix(self.choice(suffix, suffix, suffix, suffix, ".csv", ".txt", ""))
        path.write_text(text, encoding=self.choice("utf-8", "utf-8", "utf-8", "utf-16"))
        if self.chance(0.3):
            self.file(path)
        self.facts.append(f"sentences {path.name}")
        return path

    def somewhere(self) -> str:
        """Return a path that a careless person would give."""
        names = (
            "nowhere",
            "out",
            "reviews.csv",
            "adapter",
            "model",
            "..",
            ".",
            "",
            "~",
            "~nobody/x",
        )
        names += ("out.png", "out.PNG", ".png", "a/b/c", "no/such", "x" * 300, "[/red]", "[b]", "-")
        names += (
            "\n",
            "ü",
            "reviews.csv/x",
            "/dev/null",
            "/dev/full",
            "\ud800",
            "\0",
            "%s",
            "C:\\x",
        )
        name = self.choice(*names)
        path = name if self.chance(0.3) else str(self.folder / name)
        # only there may a command write
        return path if path.startswith((str(self.folder), "~nobody")) else name.lstrip("/.~-")

    def model(self) -> str:
        if self.chance(0.15):
            return self.somewhere()
        folder = self.copy("model")
        if self.chance(0.25):
            self.break_folder(folder)
        return str(folder)

    def adapter(self) -> str:
        if self.chance(0.1):
            return self.somewhere()
        folder = self.copy("adapter")
        if self.chance(0.9):
            self.break_folder(folder)
        return str(folder)

    def output(self) -> str:
        return self.somewhere() if self.chance(0.2) else str(self.folder / "out")


def inspects(case: Case) -> list[str]:
    more = ["--output", case.choice(str(case.folder / "out.svg"), case.somewhere())]
    return ["inspect", case.adapter(), *(more if case.chance(0.5) else ())]


def merges(case: Case) -> list[str]:
    adapter = case.adapter()
    return [
        "merge",
        adapter,
        case.output(),
        *(["--model", case.model()] if case.chance(0.9) else []),
    ]


def finetunes(case: Case) -> list[str]:
    data = str(case.sentences()) if case.chance(0.6) else str(case.copy("reviews.csv"))
    data = case.somewhere() if case.chance(0.05) else data
    columns = {"--text-column": "review", "--label-column": "verdict"}
    found = {"--model": case.model(), "--data": data, **columns, "--output": case.output()}
    found["--method"] = case.choice("c3a", "c3a", "lora", "bitfit", "head", "full")
    found["--steps"] = case.choice("1", "2")  # a run that is in order has to end soon
    odd = {
        "--lr": NUMBERS,
        "--head-lr": NUMBERS,
        "--rank": NUMBERS,
        "--batch-size": NUMBERS,
        "--max-length": NUMBERS,
        "--seed": NUMBERS,
        "--epochs": NUMBERS,
        "--block-size": (*NUMBERS, "auto", "Auto"),
        "--target-modules": (
            "query",
            "all-linear",
            "(",
            "[",
            "*",
            "x",
            "",
            "embeddings",
            "classifier",
        )
        + (".*", "LayerNorm", ".*query", "bert", "(?P<x>", "pooler", "dense", "a b", "**", "\\"),
        "--text-column": ("text", "", "verdict", "more", "[/red]"),
        "--label-column": ("label", "", "review", "more"),
        "--method": ("C3A", "", "x"),
        "--steps": ("0", "-3", "nan", "1.5", "", "x"),
    }
    for key in case.random.sample(sorted(odd), case.choice(0, 0, 1, 1, 2)):
        found[key] = case.choice(*odd[key])
    arguments = [f"{key}={value}" for key, value in found.items()]
    case.random.shuffle(arguments)
    return ["finetune", *arguments]


def exports(case: Case) -> list[str]:
    size = case.choice("--rank", "--rank", "--energy")
    value = case.choice("1", "4", "24", "0.9", *NUMBERS)
    more = [f"--at-least={case.choice('0', '0', *NUMBERS)}"] if case.chance(0.7) else []
    return ["export-lora", case.adapter(), case.output(), f"{size}={value}", *more]


def converts(case: Case) -> list[str]:
    size = f"--block-size={case.choice('12', '12', '6', 'auto', *NUMBERS)}"
    rank = [f"--rank={case.choice(*NUMBERS)}"] if case.chance(0.2) else []
    if case.chance(0.5):
        folder = case.copy("lora")
        if case.chance(0.8):
            case.break_folder(folder)
        return ["convert", str(folder), case.output(), size, *rank]
    names = ("query", "value", "dense", "embeddings", "LayerNorm", "", "(", "x", "encoder")
    base = str(case.originals / "model")  # nothing writes there
    targets = [f"--target-modules={case.choice(*names)}"] if case.chance(0.9) else []
    heads = [f"--modules-to-save={case.choice(*names)}"] if case.chance(0.3) else []
    turned = ["--fan-in-fan-out"] if case.chance(0.1) else []
    more = [*targets, *heads, *turned, *rank]
    return ["convert", case.model(), case.output(), f"--base={base}", size, *more]


def confuses(case: Case) -> list[str]:
    """Arguments that are not even of a command."""
    words = (
        "",
        "finetun",
        "inspect",
        "merge",
        "export-lora",
        "convert",
        "info",
        "--help",
        "--version",
        "-",
        "--",
        "--output",
    )
    return [case.choice(*words) for _ in range(case.choice(0, 1, 1, 2))]


# and how often each is drawn
KINDS = {inspects: 8, merges: 5, exports: 5, converts: 5, finetunes: 4, confuses: 1}


# Running


def originals(folder: Path) -> None:
    """Write a model, an adapter for it and sentences, all in order."""
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    write_model(folder / "model")
    write_reviews(folder / "reviews.csv")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "model", id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}
    )
    c3a.patch_model(model, ["query", "value"], 12, init="gaussian", modules_to_save=["classifier"])
    c3a.save_adapter(model, folder / "adapter", task_type="SEQ_CLS")
    model.config.save_pretrained(folder / "adapter")
    c3a.lora.export(folder / "adapter", folder / "lora", energy=0.9)


def snapshot(folder: Path) -> dict[str, str]:
    """Return what a folder holds."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        )
        for path in sorted(folder.rglob("*"))
    }


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise Wrong(what)


def check(case: Case) -> None:
    (kind,) = case.random.choices([*KINDS], [*KINDS.values()])
    case.facts.append(kind.__name__)
    arguments = kind(case)
    case.facts.append("c3a " + " ".join(map(repr, arguments)))
    before = snapshot(case.folder)
    out, err = io.StringIO(), io.StringIO()
    # a library's warnings to programmers are not what is looked for
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            status = cli(arguments)
        except SystemExit as end:
            status = end.code
    said = err.getvalue().strip()
    case.facts.append(f"{status}: {said.splitlines()[-1][:300] if said else ''}")
    expect(status in (0, 2), f"ended with {status}")
    expect("Traceback" not in out.getvalue() + said, "printed a traceback")
    after = snapshot(case.folder)
    if status == 2:
        last = re.split("[\r\n]c3a: ", f"\n{said}")[-1]
        refused = re.search(r"(^|[\r\n])(c3a: |c3a[\w -]*: error: )", said)
        expect(bool(refused), f"says nothing: {said[-300:]}")
        expect(not RAW.search(last) or bool(LIBRARY.search(last)), f"speaks to programmers: {last}")
        changed = [path for path in before | after if before.get(path) != after.get(path)]
        expect(not changed, f"failed, and changed {changed}")
    else:
        changed = [path for path in before if before[path] != after.get(path)]
        expect(not changed, f"changed {changed}")
        for path in case.folder.rglob("metrics.json"):
            json.loads(path.read_text(), parse_constant=refuse)


def refuse(constant: str) -> None:
    raise Wrong(f"wrote {constant}")


def run_case(seed: int, number: int, prepared: Path) -> tuple[str | None, Case]:
    """Return what was wrong with a case, if anything, and the case."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="c3a-fuzz-") as name:
        case = Case(seed, number, Path(name), prepared)
        os.chdir(name)
        try:
            check(case)
        except Wrong as error:
            return str(error), case
        except Exception:
            return traceback.format_exc(), case
        finally:
            os.chdir(here)
    return None, case


def main(argv: list[str] | None = None) -> int:
    options = fuzzing.parser(__doc__).parse_args(argv)
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="c3a-fuzz-") as name:
        prepared = Path(name)
        originals(prepared)

        def one(number: int):
            wrong, case = run_case(options.seed, number, prepared)
            ending = case.facts[-1].split(":")[0] if wrong is None else "failed"
            return f"{case.facts[0]}, {ending}", wrong, case.facts

        return fuzzing.run(options, f"python tests/fuzz_cli.py --seed {options.seed}", one)


if __name__ == "__main__":
    sys.exit(main())
