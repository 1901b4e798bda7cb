"""``c3a export-lora`` and ``c3a convert``: what they print, write and refuse."""

import os

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import c3a
import c3a.lora
from c3a.adapter import WEIGHTS
from c3a.cli import main


def network() -> torch.nn.Module:
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.Tanh(), torch.nn.Linear(24, 12))


@pytest.fixture
def adapter(tmp_path):
    model = c3a.patch_model(network(), ["0", "2"], 6, init="gaussian")
    return c3a.save_adapter(model, tmp_path / "adapter")


def test_an_export_prints_what_is_kept_and_writes_what_the_function_writes(
    adapter, tmp_path, capsys
):
    command = ["export-lora", str(adapter), str(tmp_path / "lora"), "--rank", "11"]
    assert main([*command, "--at-least", "0.5"]) == 0
    found = c3a.lora.export(adapter, tmp_path / "same", rank=11, at_least=0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "in", "out", "rank", "energy"]
    for line, (name, layer) in zip(lines[2:4], found.layers.items(), strict=True):
        share = f"{int(1e4 * layer.energy) / 100:.2f}"
        sizes = [str(layer.in_features), str(layer.out_features), "11"]
        assert line.split() == [name, *sizes, share, "%"]
    assert lines[4].startswith(f"{int(1e4 * found.energy) / 100:.2f} % of the energy kept in all;")
    files = [load_file(tmp_path / folder / WEIGHTS) for folder in ("lora", "same")]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[1])
    peft.PeftModel.from_pretrained(network(), tmp_path / "lora")


def test_less_than_all_is_never_printed_as_all(adapter, tmp_path, capsys):
    kernels = load_file(adapter / WEIGHTS)
    for kernel in kernels.values():
        kernel.zero_()[0, 0] = 1  # of rank 1
        kernel[0, 0, 0] += 1e-3
    save_file(kernels, adapter / WEIGHTS)
    assert main(["export-lora", str(adapter), str(tmp_path / "lora"), "--rank", "1"]) == 0
    assert "99.99 % of the energy kept in all" in capsys.readouterr().out


def test_an_energy_chooses_ranks(adapter, tmp_path, capsys):
    assert main(["export-lora", str(adapter), str(tmp_path / "lora"), "--energy", "1"]) == 0
    assert "100.00 % of the energy kept in all" in capsys.readouterr().out
    theirs = peft.PeftModel.from_pretrained(network(), tmp_path / "lora")
    ours = c3a.load_adapter(network(), adapter)
    x = torch.randn(3, 12)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "1"], "c3a: rank 1 keeps"),
        (["--rank", "0"], "c3a: expected rank >= 1, got 0"),
        (["--rank", "13"], "c3a: expected rank <= 12, the largest of a layer here, got 13"),
        (["--energy", "2"], "c3a: expected 0 <= energy <= 1, got 2.0"),
        (["--energy", "nan"], "c3a: expected 0 <= energy <= 1, got nan"),
    ],
)
def test_an_export_that_cannot_be_is_one_line(options, message, adapter, tmp_path, capsys):
    assert main(["export-lora", str(adapter), str(tmp_path / "lora"), *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(message)
    assert len(said.err.splitlines()) == 1
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("options", [[], ["--rank", "1", "--energy", "0.9"], ["--rank", "x"]])
def test_one_way_to_choose_ranks_has_to_be_given(options, adapter, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["export-lora", str(adapter), str(tmp_path / "lora"), *options])
    assert "error: " in capsys.readouterr().err


def test_a_lora_is_converted_and_loads_in_both_libraries(adapter, tmp_path, capsys):
    assert main(["export-lora", str(adapter), str(tmp_path / "lora"), "--energy", "1"]) == 0
    capsys.readouterr()
    command = ["convert", str(tmp_path / "lora"), str(tmp_path / "back"), "--block-size"]
    assert main([*command, "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "in", "out", "block", "error"]
    assert lines[2].split() == ["0", "12", "24", "6", "0.0000"]
    assert lines[-1] == f"relative error in all 0.0000; written to {tmp_path / 'back'}"
    x = torch.randn(3, 12)
    expected = c3a.load_adapter(network(), adapter)(x)
    theirs = peft.PeftModel.from_pretrained(network(), tmp_path / "back")
    for model in (c3a.load_adapter(network(), tmp_path / "back"), theirs):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_checkpoints_are_converted_and_what_is_left_out_is_said(tmp_path, capsys):
    base = network().state_dict()
    tuned = {key: tensor + 0.01 * torch.randn_like(tensor) for key, tensor in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    sources = [str(tmp_path / f"{name}.safetensors") for name in ("tuned", "base")]
    command = ["convert", sources[0], str(tmp_path / "adapter"), "--base", sources[1]]
    assert main([*command, "--target-modules", "0", "--block-size", "auto", "--rank", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == (
        "3 more tensors differ from the base's and are left out: 0.bias, 2.bias, 2.weight"
    )
    model = c3a.load_adapter(network(), tmp_path / "adapter")
    delta = tuned["0.weight"] - base["0.weight"]
    kernel, error = c3a.nearest_kernel(delta, model[0].block_size)
    torch.testing.assert_close(model[0].delta_weight(), c3a.circulant(kernel))
    assert lines[2].split() == ["0", "12", "24", str(model[0].block_size), f"{error:.4f}"]


@pytest.mark.parametrize("command", ["convert a b", "finetune"])
def test_a_block_size_is_a_number_or_auto(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*command.split(), "--block-size", "x"])
    assert "argument --block-size: expected a number or auto, got 'x'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--block-size", "5"], "block_size 5 does not divide in_features = 12"),
        (["--block-size", "6", "--fan-in-fan-out"], "--fan-in-fan-out is for checkpoints"),
        (["--block-size", "6", "--target-modules", "0"], "--target-modules is for checkpoints"),
        (["--block-size", "6", "--base", "x"], "expected --target-modules with --base"),
        (["--block-size", "auto", "--rank", "0"], "expected rank >= 1, got 0"),
    ],
)
def test_a_conversion_that_cannot_be_is_one_line(options, message, adapter, tmp_path, capsys):
    c3a.lora.export(adapter, tmp_path / "lora", energy=1.0)
    assert main(["convert", str(tmp_path / "lora"), str(tmp_path / "back"), *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert len(said.err.splitlines()) == 1
    assert not (tmp_path / "back").exists()
