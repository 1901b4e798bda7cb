"""``c3a inspect``: the table, the picture, and adapters that it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import c3a
from c3a.cli import inspect, main


@pytest.fixture
def adapter(tmp_path) -> Path:
    """Twelve layers of four kinds, and one beside them."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("query_projection", "key_projection", "value_projection"):
                setattr(self, name, torch.nn.Linear(12, 12))
            self.feed_forward = torch.nn.Linear(12, 24)

    model = torch.nn.ModuleDict(
        {
            "text_model": torch.nn.ModuleDict(
                {"encoder": torch.nn.ModuleDict({"layers": torch.nn.ModuleList()})}
            ),
            "pooler": torch.nn.Linear(12, 12),
        }
    )
    model["text_model"]["encoder"]["layers"].extend(Block() for _ in range(12))
    c3a.patch_model(model, "all-linear", 6, init="gaussian")
    return c3a.save_adapter(model, tmp_path / "adapter")


def test_the_table_has_norm_and_rank_and_fits_80_columns(adapter, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["inspect", str(adapter)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 + len(str(adapter))
    table = lines[2:51]
    assert max(map(len, table)) <= 80
    assert len({line.split()[0] for line in table}) == 49
    assert [line.split()[0] for line in table[-4:]] == [
        "text_model…layers.11.feed_forward",
        "text_model…layers.11.key_projection",
        "text_model…layers.11.query_projection",
        "text_model…layers.11.value_projection",
    ]
    kernel = load_file(adapter / "adapter_model.safetensors")["base_model.model.pooler.c3a_kernel"]
    norm = c3a.circulant(kernel).norm() / 12
    assert table[0].split() == ["pooler", "12", "12", "6", "24", f"{norm:.3g}", "12/12"]


@pytest.mark.parametrize("suffix", ["png", "svg", "PDF"])
def test_the_picture_has_the_format_of_its_name(adapter, suffix, tmp_path):
    picture = tmp_path / f"spectra.{suffix}"
    assert main(["inspect", str(adapter), "--output", str(picture)]) == 0
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "PDF": b"%PDF"}
    assert picture.read_bytes().startswith(starts[suffix])


@pytest.mark.parametrize("name", ["notes", "notes.txt", ".png", "folder.png"])
def test_a_name_that_cannot_be_drawn_to_is_refused_before_anything(adapter, name, tmp_path, capsys):
    path = tmp_path / name
    if name == "folder.png":
        path.mkdir()
    else:
        path.write_text("mine")
    assert main(["inspect", str(adapter), "--output", str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    expected = "to be a file" if path.is_dir() else "to end in .png, .svg, .pdf, .jpg, .webp, got"
    assert f"c3a: expected --output {expected}" in said.err
    assert path.is_dir() or path.read_text() == "mine"


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (torch.full((1, 1, 4), math.nan), "expected a kernel of finite numbers"),
        (torch.full((1, 1, 4), 1e308, dtype=torch.float64), "expected a kernel of finite numbers"),
        (torch.zeros(1, 0, 4), "(m, n, b)"),
        (torch.zeros(1, 4), "(m, n, b)"),
    ],
)
def test_a_kernel_that_cannot_be_looked_at_is_named(kernel, message, adapter, capsys):
    tensors = {"base_model.model.pooler.c3a_kernel": kernel}
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    assert main(["inspect", str(adapter)]) == 2
    said = capsys.readouterr().err
    assert "pooler" in said
    assert message in said
    assert not (adapter / "spectra.png").exists()


def test_an_adapter_of_zeros_and_odd_names_is_drawn(tmp_path):
    tensors = {
        "base_model.model.c3a_kernel": torch.zeros(1, 1, 4),
        "base_model.model.a[/b].$x^{$\n.0.c3a_kernel": torch.zeros(2, 1, 4),
        "base_model.model.a[/b].$x^{$\n.1.c3a_kernel": torch.ones(2, 1, 4),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "C3A"}))
    assert main(["inspect", str(tmp_path)]) == 0


def test_names_are_shortened_only_where_they_stay_apart():
    names = ["model.encoder.layers.3.fc1", "model.decoder.layers.3.fc1", "lm_head"]
    assert inspect.shortened(names, 26) == names
    assert inspect.shortened(names, 22) == [
        "model.encoder…3.fc1",
        "model.decoder…3.fc1",
        "lm_head",
    ]
    assert inspect.shortened(["a" * 30], 12) == ["…" + "a" * 11]


def test_layers_are_grouped_by_kind_with_their_depth():
    names = ["h.0.attn", "h.1.attn", "dec.0.attn", "h.0.experts.1.w", "h.0.experts.2.w", "top"]
    assert inspect.by_kind(names) == {
        "h.*.attn": [(0, "h.0.attn"), (1, "h.1.attn")],
        "dec.*.attn": [(0, "dec.0.attn")],
        "w": [(0, "h.0.experts.1.w"), (0, "h.0.experts.2.w")],
        "top": [(None, "top")],
    }
