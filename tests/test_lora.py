"""Adapters of LoRA: from a kernel's bins, as PEFT reads them; the nearest kernel of a matrix."""

import json
import math
import os
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import c3a
import c3a.lora
from c3a import adapter_files, convert
from c3a.adapter import CONFIG, WEIGHTS

SHAPES = [(1, 1, 1), (2, 3, 1), (1, 1, 2), (2, 3, 5), (3, 2, 8), (1, 4, 7), (4, 1, 6), (2, 2, 2)]
pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to False:UserWarning:peft")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.up = nn.Linear(12, 12), nn.Linear(12, 24)

    def forward(self, x):
        return self.up(torch.tanh(self.query(x)))


class Model(nn.Module):
    def __init__(self, **sizes) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.second, self.classifier = Block(), Block(), nn.Linear(24, 2)

    def forward(self, x):
        return self.classifier(self.first(x) + self.second(x.roll(1, -1)))


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))


def trained(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=generator)
    return model


@pytest.fixture
def adapter(tmp_path):
    model = c3a.patch_model(
        Model(), ["query", "up"], {"query": 3, "up": 4}, modules_to_save=["classifier"]
    )
    return c3a.save_adapter(trained(model), tmp_path / "adapter")


def deltas(folder) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight, in float64."""
    found = c3a.adapter_files.read_adapter(folder)
    return {
        name: c3a.circulant(kernel.double()) / found.layers.get(name, sizes(kernel))[0]
        for name, kernel in found.kernels.items()
    }


def sizes(kernel) -> tuple[int, int]:
    m, n, b = kernel.shape
    return n * b, m * b


def truncated(delta: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def exported(folder) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / WEIGHTS)
    names = [key.removesuffix(".lora_A.weight") for key in tensors if ".lora_A." in key]
    return {
        name.removeprefix("base_model.model."): tensors[f"{name}.lora_B.weight"].double()
        @ tensors[f"{name}.lora_A.weight"].double()
        for name in names
    }


def edit(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# The bins


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_of_every_rank_err_as_the_dense_decomposition_does(shape):
    w = torch.randn(shape, dtype=torch.float64)
    matrix = c3a.circulant(w)
    values = torch.linalg.svdvals(matrix)
    for rank in range(1, len(values) + 1):
        down, up = c3a.lora.factors(w, rank)
        assert (down.shape[0], up.shape[1]) == (rank, rank)
        rest = torch.linalg.svdvals(matrix - up @ down)
        expected = torch.cat([values[rank:], torch.zeros(rank, dtype=torch.float64)])
        torch.testing.assert_close(rest, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("b", [1, 2, 5, 8])
def test_factors_of_equal_singular_values_are_right_too(b):
    w = torch.zeros(2, 2, b, dtype=torch.float64)
    w[0, 0, 0] = w[1, 1, 0] = 1  # the unit matrix
    down, up = c3a.lora.factors(w, 2 * b)
    torch.testing.assert_close(up @ down, torch.eye(2 * b, dtype=torch.float64))
    for rank in range(1, 2 * b):
        down, up = c3a.lora.factors(w, rank)
        assert (torch.eye(2 * b) - up @ down).norm() == pytest.approx(math.sqrt(2 * b - rank))


@pytest.mark.parametrize(
    ("w", "rank", "message"),
    [
        (torch.ones(2, 4), 1, r"expected w of shape \(m, n, b\), got \(2, 4\)"),
        (torch.ones(2, 3, 4), 0, r"expected 1 <= rank <= min\(m, n\) \* b = 8, got 0"),
        (torch.ones(2, 3, 4), 9, r"expected 1 <= rank <= min\(m, n\) \* b = 8, got 9"),
        (torch.full((1, 1, 4), math.nan), 1, "expected a kernel of finite numbers"),
    ],
)
def test_what_has_no_factors_is_named(w, rank, message):
    with pytest.raises(ValueError, match=f"^c3a.lora.factors: {message}"):
        c3a.lora.factors(w, rank)


# Export


@pytest.mark.parametrize("rank", [1, 2, 5, 12])
def test_an_export_is_the_truncated_delta_and_peft_adds_it(adapter, rank, tmp_path):
    found = c3a.lora.export(adapter, tmp_path / "lora", rank=rank, at_least=0)
    products = exported(tmp_path / "lora")
    lost, whole = 0.0, 0.0
    for name, delta in deltas(adapter).items():
        expected = truncated(delta, rank)
        torch.testing.assert_close(
            (delta - products[name]).norm(), (delta - expected).norm(), rtol=1e-6, atol=1e-7
        )
        layer = found.layers[name]
        assert (layer.in_features, layer.out_features, layer.rank) == (*delta.shape[::-1], rank)
        share = 1 - float((delta - expected).norm() / delta.norm()) ** 2
        assert layer.energy == pytest.approx(share, abs=1e-9)
        lost, whole = lost + (delta - expected).norm() ** 2, whole + delta.norm() ** 2
    assert found.energy == pytest.approx(1 - float(lost / whole), abs=1e-9)
    theirs = peft.PeftModel.from_pretrained(Model(), tmp_path / "lora")
    ours = c3a.load_adapter(Model(), adapter)
    for name, product in products.items():
        layer = theirs.base_model.model.get_submodule(name)
        added = layer.get_delta_weight("default")
        torch.testing.assert_close(added, product.float(), rtol=1e-5, atol=1e-6)
    if rank == 12:  # the whole of it
        assert found.energy == pytest.approx(1)
        torch.testing.assert_close(theirs(X), ours(X), rtol=1e-4, atol=1e-4)
    else:
        assert not torch.allclose(theirs(X), ours(X), rtol=1e-2)


def test_energies_add_up_to_one_at_full_rank_and_grow_with_the_rank(adapter, tmp_path):
    shares = [
        c3a.lora.export(adapter, tmp_path / str(rank), rank=rank, at_least=0).energy
        for rank in (1, 4, 8, 12)
    ]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    every = c3a.lora.export(adapter, tmp_path / "every", energy=1.0)
    assert every.energy == 1
    assert {layer.energy for layer in every.layers.values()} == {1}


@pytest.mark.parametrize("energy", [0.9, 0.99])
def test_energy_chooses_the_smallest_rank_of_each_layer(adapter, energy, tmp_path):
    found = c3a.lora.export(adapter, tmp_path / "lora", energy=energy)
    ranks = {}
    for name, delta in deltas(adapter).items():
        kept = torch.linalg.svdvals(delta).square().cumsum(0)
        ranks[name] = int((kept < energy * kept[-1]).sum()) + 1
        assert found.layers[name].energy >= energy
    assert {name: layer.rank for name, layer in found.layers.items()} == ranks
    assert len(set(ranks.values())) > 1
    config = json.loads((tmp_path / "lora" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == max(ranks.values())
    assert config["rank_pattern"] == config["alpha_pattern"]
    theirs = peft.PeftModel.from_pretrained(Model(), tmp_path / "lora")
    for name, product in exported(tmp_path / "lora").items():
        layer = theirs.base_model.model.get_submodule(name)
        assert layer.scaling["default"] == 1
        torch.testing.assert_close(
            layer.get_delta_weight("default"), product.float(), rtol=1e-5, atol=1e-6
        )


def test_names_that_end_in_others_keep_their_ranks(tmp_path):
    def model():
        torch.manual_seed(3)
        return nn.ModuleDict({"a": nn.Linear(8, 8), "sub": nn.ModuleDict({"a": nn.Linear(8, 8)})})

    patched = trained(c3a.patch_model(model(), ["a"], 2))
    with torch.no_grad():
        patched["a"].c3a_kernel.copy_(torch.ones(4, 4, 2))  # of rank 1
    c3a.save_adapter(patched, tmp_path / "adapter")
    found = c3a.lora.export(tmp_path / "adapter", tmp_path / "lora", energy=0.99)
    assert found.layers["a"].rank == 1 < found.layers["sub.a"].rank
    config = peft.LoraConfig.from_pretrained(tmp_path / "lora")
    theirs = peft.inject_adapter_in_model(config, model())
    for name, layer in found.layers.items():
        assert theirs.get_submodule(name).r["default"] == layer.rank


def test_the_configuration_is_that_of_the_adapter(adapter, tmp_path):
    edit(adapter, base_model_name_or_path="someone/model", revision="abc", task_type="SEQ_CLS")
    edit(adapter, layers_to_transform=[0])
    c3a.lora.export(adapter, tmp_path / "lora", rank=12)
    assert sorted(os.listdir(tmp_path / "lora")) == [CONFIG, WEIGHTS]
    config = json.loads((tmp_path / "lora" / CONFIG).read_text())
    assert set(config) <= set(peft.LoraConfig().to_dict())
    expected = {
        "base_model_name_or_path": "someone/model",
        "fan_in_fan_out": False,
        "layers_to_transform": [0],
        "lora_alpha": 12,
        "modules_to_save": ["classifier"],
        "peft_type": "LORA",
        "r": 12,
        "rank_pattern": {},
        "revision": "abc",
        "target_modules": ["query", "up"],
        "task_type": "SEQ_CLS",
    }
    assert {key: config[key] for key in expected} == expected
    tensors, before = load_file(tmp_path / "lora" / WEIGHTS), load_file(adapter / WEIGHTS)
    for key in ("weight", "bias"):
        key = f"base_model.model.classifier.{key}"
        assert torch.equal(tensors[key], before[key])
    assert {t.dtype for key, t in tensors.items() if "lora" in key} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_scale_of_a_layer_and_kernels_of_every_dtype_are_in_the_delta(dtype, tmp_path):
    model = trained(c3a.patch_model(Model(), ["up"], 4, scale=0.37, dtype=dtype))
    c3a.save_adapter(model, tmp_path / "adapter")
    c3a.lora.export(tmp_path / "adapter", tmp_path / "lora", energy=1.0)
    for name, product in exported(tmp_path / "lora").items():
        expected = 0.37 * c3a.circulant(model.get_submodule(name).c3a_kernel.detach().double())
        torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:c3a.save_adapter.*it does not pad")
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_of_a_padded_kernel_the_part_that_counts_is_exported(rank, tmp_path):
    model = trained(c3a.patch_model(Model(), ["query", "up"], 5, pad=True))
    c3a.save_adapter(model, tmp_path / "adapter")
    c3a.lora.export(tmp_path / "adapter", tmp_path / "lora", rank=rank, at_least=0)
    for name, product in exported(tmp_path / "lora").items():
        layer = model.get_submodule(name)
        delta = layer.delta_weight().detach().double()
        assert product.shape == delta.shape == (layer.out_features, layer.in_features)
        torch.testing.assert_close(product, truncated(delta, rank), rtol=1e-4, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(Model(), tmp_path / "lora")
    if rank == 12:
        torch.testing.assert_close(theirs(X), model(X), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:c3a.save_adapter.*it adapts torch.nn.Linear only")
@pytest.mark.filterwarnings("error:.*fan_in_fan_out:UserWarning")
def test_conv1d_is_read_back_by_peft_without_a_warning(tmp_path):
    def model():
        torch.manual_seed(3)
        return nn.Sequential(Conv1D(8, 12), nn.Tanh(), Conv1D(12, 8))

    patched = trained(c3a.patch_model(model(), ["0", "2"], 4))
    c3a.save_adapter(patched, tmp_path / "adapter")
    c3a.lora.export(tmp_path / "adapter", tmp_path / "lora", energy=1.0)
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path / "lora")
    torch.testing.assert_close(theirs(X), patched(X), rtol=1e-4, atol=1e-4)


def test_an_adapter_of_zeros_is_exported_whole(tmp_path):
    c3a.save_adapter(c3a.patch_model(Model(), ["query"], 4), tmp_path / "adapter")
    assert c3a.lora.export(tmp_path / "adapter", tmp_path / "lora", rank=2).energy == 1
    theirs = peft.PeftModel.from_pretrained(Model(), tmp_path / "lora")
    assert torch.equal(theirs(X), Model()(X))


def test_too_little_energy_is_refused_with_the_rank_that_would_do(adapter, tmp_path):
    with pytest.raises(ValueError, match="^c3a.lora.export: rank 1 keeps") as refused:
        c3a.lora.export(adapter, tmp_path / "lora", rank=1)
    assert not (tmp_path / "lora").exists()
    enough = int(str(refused.value).split("; rank ")[1].split()[0])
    with pytest.raises(ValueError, match=f"rank {enough - 1} keeps"):
        c3a.lora.export(adapter, tmp_path / "lora", rank=enough - 1)
    assert c3a.lora.export(adapter, tmp_path / "lora", rank=enough).energy >= 0.9
    assert c3a.lora.export(adapter, tmp_path / "little", rank=1, at_least=0.0).energy < 0.9


REFUSED = {
    "neither": ({}, lambda f: None, "expected either rank or energy, got None and None"),
    "both": ({"rank": 1, "energy": 0.9}, lambda f: None, "expected either rank or energy"),
    "rank 0": ({"rank": 0}, lambda f: None, "expected rank >= 1, got 0"),
    "rank 13": ({"rank": 13}, lambda f: None, "expected rank <= 12, the largest of a layer here"),
    "energy": ({"energy": 1.5}, lambda f: None, "expected 0 <= energy <= 1, got 1.5"),
    "at least": ({"rank": 1, "at_least": 2}, lambda f: None, "expected 0 <= at_least <= 1, got 2"),
    "a LoRA": (
        {"rank": 1},
        lambda f: edit(f, peft_type="LORA"),
        """expected "peft_type": "C3A", got 'LORA'""",
    ),
    "no targets": ({"rank": 1}, lambda f: edit(f, target_modules=None), "names no target_modules"),
    "not finite": (
        {"rank": 1},
        lambda f: tensors(f, lambda key, t: t.fill_(math.inf)),
        "first.query: expected a kernel of finite numbers",
    ),
    "too large": (
        {"rank": 1},
        lambda f: tensors(f, lambda key, t: t.double() * 1e60),
        "first.query: expected a kernel of moderate size",
    ),
    "no kernel": (
        {"rank": 1},
        lambda f: tensors(f, lambda key, t: None if "kernel" in key else t),
        "holds no c3a_kernel",
    ),
    "another's key": (
        {"rank": 1},
        lambda f: tensors(f, lambda key, t: t, "base_model.model.first.query.lora_A.weight"),
        "holds two tensors for",
    ),
}


def tensors(folder, change, more=None):
    found = load_file(folder / WEIGHTS)
    changed = {key: change(key, t) for key, t in found.items()}
    changed = {key: t for key, t in changed.items() if t is not None}
    if more:
        changed[more] = torch.ones(2, 2)
    save_file(changed, folder / WEIGHTS)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_named_and_nothing_is_written(name, adapter, tmp_path):
    options, damage, message = REFUSED[name]
    damage(adapter)
    with pytest.raises(ValueError, match="^c3a.lora.export: ") as refused:
        c3a.lora.export(adapter, tmp_path / "lora", **options)
    assert message in str(refused.value)
    assert not (tmp_path / "lora").exists()


def test_a_folder_with_files_is_never_written_over(adapter, tmp_path):
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    with pytest.raises(ValueError, match="expected the output to be a new or empty folder"):
        c3a.lora.export(adapter, adapter, rank=12)
    assert before == {path.name: path.read_bytes() for path in adapter.iterdir()}


def test_a_failed_export_leaves_nothing(adapter, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(adapter_files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        c3a.lora.export(adapter, tmp_path / "lora", rank=12)
    assert os.listdir(tmp_path) == ["adapter"]


ABOUT = {"in_features": 11, "out_features": 10, "fan_in_fan_out": False}


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        "[" * 100_000,
        json.dumps({"first.query": 3}),
        json.dumps({"nowhere": ABOUT}),
        json.dumps({"first.query": {**ABOUT, "in_features": 40}}),
        json.dumps({"first.query": {**ABOUT, "in_features": -1}}),
        json.dumps({"first.query": {**ABOUT, "in_features": True}}),
        json.dumps({"first.query": {**ABOUT, "fan_in_fan_out": 1}}),
        json.dumps({"first.query": {**ABOUT, "more": 1}}),
        json.dumps({"a\nb": {**ABOUT}}),
    ],
)
def test_what_a_file_says_of_its_layers_is_checked(text, adapter, tmp_path):
    found = load_file(adapter / WEIGHTS)
    save_file(found, adapter / WEIGHTS, metadata={"c3a_layers": text})
    with pytest.raises(ValueError, match="^c3a.lora.export: .*c3a_layers") as refused:
        c3a.lora.export(adapter, tmp_path / "lora", rank=1)
    assert str(refused.value).isprintable()
    c3a.load_adapter(Model(), adapter)  # which has the layers themselves


# The nearest kernel


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_nearest_kernel_of_a_circulant_matrix_is_its_own(shape):
    w = torch.randn(shape, dtype=torch.float64)
    kernel, error = c3a.nearest_kernel(c3a.circulant(w), shape[-1])
    torch.testing.assert_close(kernel, w)
    assert error < 1e-12


@pytest.mark.parametrize("lead", [(), (2, 3), (0,)])
@pytest.mark.parametrize(("rows", "columns", "b"), [(6, 9, 3), (5, 5, 5), (8, 4, 2), (7, 10, 4)])
def test_no_kernel_is_nearer(rows, columns, b, lead):
    delta = torch.randn(*lead, rows, columns, dtype=torch.float64)
    kernels, errors = c3a.nearest_kernel(delta, b, pad=True)
    m, n = -(-rows // b), -(-columns // b)
    assert kernels.shape == (*lead, m, n, b)
    assert errors.shape == lead
    basis = torch.stack(
        [
            c3a.circulant(unit.reshape(m, n, b))[:rows, :columns].flatten()
            for unit in torch.eye(m * n * b, dtype=torch.float64)
        ],
        1,
    )
    for matrix, kernel, error in zip(
        delta.reshape(-1, rows * columns),
        kernels.reshape(-1, m * n * b),
        errors.flatten(),
        strict=True,
    ):
        best = torch.linalg.pinv(basis) @ matrix
        torch.testing.assert_close(kernel, best)
        torch.testing.assert_close(error, (matrix - basis @ best).norm() / matrix.norm())


def test_a_matrix_in_many_parts_gives_what_it_gives_in_one(monkeypatch):
    delta = torch.randn(2, 12, 8, dtype=torch.float64)
    whole = c3a.nearest_kernel(delta, 2)
    monkeypatch.setattr("c3a.reference._MOST_NUMBERS", 1)
    torch.testing.assert_close(c3a.nearest_kernel(delta, 2), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_kernel_is_in_the_matrix_dtype_float32_at_least(dtype):
    delta = torch.randn(4, 6).to(dtype)
    kernel, error = c3a.nearest_kernel(delta, 2)
    assert kernel.dtype == error.dtype == torch.promote_types(dtype, torch.float32)
    expected, _ = c3a.nearest_kernel(delta.double(), 2)
    torch.testing.assert_close(kernel.double(), expected, rtol=1e-6, atol=1e-7)


def test_the_nearest_kernel_of_zeros_is_zeros_with_no_error():
    kernel, error = c3a.nearest_kernel(torch.zeros(4, 4), 2)
    assert not kernel.any()
    assert error == 0


@pytest.mark.parametrize(
    ("delta", "block_size", "message"),
    [
        (
            torch.ones(4),
            2,
            r"expected delta of shape \(..., out, in\), .* got \(4,\)",
        ),
        (torch.ones(0, 4), 2, r"of at least 1 each, got \(0, 4\)"),
        (torch.ones(4, 4, dtype=torch.int64), 2, "expected delta in one of float64, .* got int64"),
        (torch.ones(4, 6), 4, "block_size 4 does not divide in_features = 6 .* these do: 1, 2"),
        (torch.ones(4, 4), 0, "expected block_size to be an integer >= 1, got 0"),
        (torch.ones(4, 4), 2.0, "expected block_size to be an integer >= 1, got 2.0"),
    ],
)
def test_what_has_no_nearest_kernel_is_named(delta, block_size, message):
    with pytest.raises(ValueError, match=f"^c3a.nearest_kernel: .*{message}"):
        c3a.nearest_kernel(delta, block_size)


# Import


def lora(folder, **settings):
    """A LoRA adapter that PEFT has saved, and the model."""
    config = peft.LoraConfig(
        **{"target_modules": ["query", "up"], "modules_to_save": ["classifier"], **settings}
    )
    model = trained(peft.get_peft_model(Model(), config))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "lora_alpha": 5},
        {"r": 3, "lora_alpha": 5, "use_rslora": True},
        {"r": 2, "rank_pattern": {"first.*": 4, "up": 3}, "alpha_pattern": {"second.up": 7.5}},
        {"r": 2, "target_modules": r".*\.(query|up)"},
    ],
    ids=str,
)
def test_a_lora_becomes_its_nearest_adapter_for_both_libraries(settings, tmp_path):
    theirs = lora(tmp_path / "lora", **settings)
    found = convert.from_lora(tmp_path / "lora", tmp_path / "adapter", 3)
    model = c3a.load_adapter(Model(), tmp_path / "adapter")
    lost, whole = 0.0, 0.0
    for name, layer in found.layers.items():
        delta = (
            theirs.base_model.model.get_submodule(name)
            .get_delta_weight("default")
            .detach()
            .double()
        )
        kernel, error = c3a.nearest_kernel(delta, 3)
        ours = model.get_submodule(name)
        torch.testing.assert_close(
            ours.delta_weight().double(), c3a.circulant(kernel), rtol=1e-5, atol=1e-6
        )
        assert layer.error == pytest.approx(float(error), rel=1e-5)
        assert layer[:3] == (ours.in_features, ours.out_features, 3)
        lost, whole = lost + (error * delta.norm()) ** 2, whole + delta.norm() ** 2
    assert len(found.layers) == 4
    assert found.error == pytest.approx(float((lost / whole).sqrt()), rel=1e-5)
    other = peft.PeftModel.from_pretrained(Model(), tmp_path / "adapter")
    torch.testing.assert_close(other(X), model(X), rtol=1e-5, atol=1e-5)
    head = theirs.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(model.classifier.weight, head.weight)


def test_an_adapter_exported_whole_comes_back(adapter, tmp_path):
    edit(adapter, task_type="SEQ_CLS")
    c3a.lora.export(adapter, tmp_path / "lora", energy=1.0)
    found = convert.from_lora(tmp_path / "lora", tmp_path / "again", 3)
    sizes = {name: layer.block_size for name, layer in found.layers.items()}
    assert set(sizes.values()) == {3}
    before, after = deltas(adapter), deltas(tmp_path / "again")
    for name in ("first.query", "second.query"):  # whose blocks are of 3 there too
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)
        assert found.layers[name].error < 1e-6
    config = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert config["task_type"] == "SEQ_CLS"


def test_automatic_block_sizes_are_those_of_patch_model(tmp_path):
    lora(tmp_path / "lora", r=2)
    found = convert.from_lora(tmp_path / "lora", tmp_path / "adapter", "auto", rank=4)
    expected = c3a.patch_model(Model(), ["query", "up"], "auto", rank=4)
    for name, layer in found.layers.items():
        assert layer.block_size == expected.get_submodule(name).block_size


def test_a_conversion_is_a_start_for_training(tmp_path):
    lora(tmp_path / "lora", r=2)
    convert.from_lora(tmp_path / "lora", tmp_path / "adapter", 3)
    model = c3a.load_adapter(Model(), tmp_path / "adapter")
    kernels = [p for name, p in model.named_parameters() if name.endswith("c3a_kernel")]
    assert all(kernel.requires_grad and kernel.any() for kernel in kernels)
    model(X).square().sum().backward()
    assert all(kernel.grad.any() for kernel in kernels)


LORAS = {
    "DoRA": ({"use_dora": True}, lambda f: None, "it has use_dora = True"),
    "PiSSA": ({}, lambda f: edit(f, init_lora_weights="pissa"), "'pissa' changes the base model"),
    "an odd init": ({}, lambda f: edit(f, init_lora_weights={"a": []}), "changes the base model"),
    "biases": ({}, lambda f: edit(f, bias="all"), "expected bias to be 'none'"),
    "excluded": ({}, lambda f: edit(f, exclude_modules=["a"]), "it has exclude_modules = ['a']"),
    "experts": ({}, lambda f: edit(f, target_parameters=["w"]), "it has target_parameters"),
    "no targets": ({}, lambda f: edit(f, target_modules=[]), "names no target_modules"),
    "another rank": ({}, lambda f: edit(f, r=3), "first.query is of rank 3 here, its tensors"),
    "an odd alpha": ({}, lambda f: edit(f, lora_alpha="x"), "expected lora_alpha to be a number"),
    "alpha": ({}, lambda f: edit(f, lora_alpha=1e400), "expected lora_alpha to be a number"),
    "a pattern": (
        {},
        lambda f: edit(f, alpha_pattern={"(((((.+)+)+)+)+)+X": 1.0}),
        "takes more than 0.5 s; names, or ends of names",
    ),
    "a C3A": (
        {},
        lambda f: edit(f, peft_type="C3A"),
        "\"LORA\", got 'C3A'",
    ),
    "half a pair": (
        {},
        lambda f: tensors(f, lambda key, t: None if key.endswith("first.up.lora_B.weight") else t),
        "first.up: expected lora_A of shape (r, in) and lora_B of shape (out, r)",
    ),
    "integers": (
        {},
        lambda f: tensors(f, lambda key, t: t.int()),
        "expected numbers in floating point",
    ),
    "not finite": (
        {},
        lambda f: tensors(f, lambda key, t: t.fill_(math.nan)),
        "expected a matrix of finite numbers",
    ),
    "more": (
        {},
        lambda f: tensors(f, lambda key, t: t, "base_model.model.wte.lora_embedding_A"),
        "'base_model.model.wte.lora_embedding_A' is of no plain LoRA",
    ),
    "another prefix": (
        {},
        lambda f: tensors(f, lambda key, t: t, "unet.up.lora_A.weight"),
        "expected keys that begin with base_model.model., got 'unet.up.lora_A.weight'",
    ),
    "nothing": (
        {},
        lambda f: tensors(f, lambda key, t: None if "lora" in key else t),
        "holds no lora_A and lora_B",
    ),
}


@pytest.mark.parametrize("name", LORAS)
def test_what_is_no_plain_lora_is_named_and_nothing_is_written(name, tmp_path, monkeypatch):
    monkeypatch.setattr("c3a.names.SECONDS", 0.5)
    settings, damage, message = LORAS[name]
    lora(tmp_path / "lora", **{"r": 2, **settings})
    damage(tmp_path / "lora")
    with pytest.raises(ValueError, match="^c3a.convert.from_lora: ") as refused:
        convert.from_lora(tmp_path / "lora", tmp_path / "adapter", 3)
    assert message in str(refused.value)
    assert str(refused.value).isprintable()
    assert os.listdir(tmp_path) == ["lora"]


@pytest.mark.parametrize(
    ("block_size", "rank", "message"),
    [
        (5, 8, "first.query: block_size 5 does not divide in_features = 12 .* these do: 1, 2, 3"),
        ("three", 8, "expected block_size to be a number or 'auto', got 'three'"),
        ("auto", 0, "expected rank >= 1, got 0"),
    ],
)
def test_block_sizes_that_do_not_fit_are_named(block_size, rank, message, tmp_path):
    lora(tmp_path / "lora", r=2)
    with pytest.raises(ValueError, match=message):
        convert.from_lora(tmp_path / "lora", tmp_path / "adapter", block_size, rank=rank)


def test_pickles_are_never_read(tmp_path):
    lora(tmp_path / "lora", r=2)
    (tmp_path / "lora" / WEIGHTS).rename(tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="is a pickle, which is never read"):
        convert.from_lora(tmp_path / "lora", tmp_path / "adapter", 3)
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle, which is never"):
        convert.from_checkpoints(
            tmp_path / "tuned", tmp_path / "tuned", tmp_path / "new", 3, target_modules=["a"]
        )
    with pytest.raises(ValueError, match="expected a safetensors file or a folder, got .*bin"):
        bad = tmp_path / "tuned" / "pytorch_model.bin"
        convert.from_checkpoints(bad, bad, tmp_path / "new", 3, target_modules=["a"])
    with pytest.raises(FileNotFoundError, match="nothing is fetched"):
        convert.from_lora("someone/lora-on-a-hub", tmp_path / "new", 3)


@pytest.fixture
def checkpoints(tmp_path):
    """A base, as a file, and what was made of it, in parts, with a classifier's prefix."""
    base = {key: t.clone() for key, t in Model().state_dict().items()}
    tuned = {f"model.{key}": t.clone() for key, t in base.items()}
    for key in ("first.query.weight", "second.query.weight", "first.up.bias"):
        tuned[f"model.{key}"] += 0.1 * torch.randn_like(base[key])
    tuned["score.weight"] = torch.randn(2, 24)
    save_file(base, tmp_path / "base.safetensors")
    folder = tmp_path / "tuned"
    folder.mkdir()
    keys = sorted(tuned)
    places = {key: f"model-{1 + (place > 4)}-of-2.safetensors" for place, key in enumerate(keys)}
    for name in set(places.values()):
        save_file({key: tuned[key] for key in keys if places[key] == name}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return tmp_path / "base.safetensors", folder, base, tuned


def test_two_checkpoints_become_the_nearest_adapter_of_their_difference(checkpoints, tmp_path):
    before, after, base, tuned = checkpoints
    found = convert.from_checkpoints(
        before,
        after,
        tmp_path / "adapter",
        4,
        target_modules=["query"],
        modules_to_save=["score"],
    )
    assert list(found.layers) == ["model.first.query", "model.second.query"]
    assert found.left_out == ["model.first.up.bias"]
    for name, delta in deltas(tmp_path / "adapter").items():
        key = f"{name}.weight"
        added = tuned[key].double() - base[key.removeprefix("model.")].double()
        kernel, error = c3a.nearest_kernel(added, 4)
        torch.testing.assert_close(delta, c3a.circulant(kernel), rtol=1e-5, atol=1e-7)
        assert found.layers[name].error == pytest.approx(float(error), rel=1e-5)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.score = Model(), nn.Linear(24, 2, bias=False)

    ours = c3a.load_adapter(Classifier(), tmp_path / "adapter")
    assert torch.equal(ours.score.weight, tuned["score.weight"])
    theirs = peft.PeftModel.from_pretrained(Classifier(), tmp_path / "adapter")
    for name in found.layers:
        torch.testing.assert_close(
            ours.get_submodule(name).delta_weight(),
            theirs.base_model.model.get_submodule(name).get_delta_weight("default"),
        )


def test_weights_that_are_in_by_out_are_turned(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(8, 12))
    w = torch.randn(2, 3, 4)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    tuned = {**model.state_dict(), "0.weight": model[0].weight + c3a.circulant(w).T}
    save_file({k: t.detach().contiguous() for k, t in tuned.items()}, tmp_path / "t.safetensors")
    found = convert.from_checkpoints(
        tmp_path / "base.safetensors",
        tmp_path / "t.safetensors",
        tmp_path / "adapter",
        4,
        target_modules=["0"],
        fan_in_fan_out=True,
    )
    assert found.error < 1e-6
    assert found.layers["0"][:2] == (12, 8)
    ours = c3a.load_adapter(nn.Sequential(Conv1D(8, 12)), tmp_path / "adapter")
    torch.testing.assert_close(ours[0].delta_weight(), c3a.circulant(w), rtol=1e-4, atol=1e-5)
    c3a.lora.export(tmp_path / "adapter", tmp_path / "lora", energy=1.0)
    assert json.loads((tmp_path / "lora" / CONFIG).read_text())["fan_in_fan_out"] is True


def reindex(folder, change):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": change(json.loads(path.read_text())["weight_map"])}))


BROKEN = {
    "another folder's": (
        lambda f: reindex(f, lambda m: {**m, "score.weight": "../base.safetensors"}),
        "expected names of safetensors files beside it, got '../base.safetensors'",
    ),
    "a pickle": (
        lambda f: reindex(f, lambda m: {**m, "score.weight": "a.bin"}),
        "expected names of safetensors files beside it, got 'a.bin'",
    ),
    "no file": (
        lambda f: reindex(f, lambda m: {**m, "score.weight": "a.safetensors"}),
        "a.safetensors, which model.safetensors.index.json names",
    ),
    "no such key": (
        lambda f: reindex(f, lambda m: {**m, "a": "model-1-of-2.safetensors"}),
        "has no 'a', which model.safetensors.index.json says it has",
    ),
    "no map": (lambda f: reindex(f, lambda m: ["a"]), "expected a weight_map, got ['a']"),
    "not JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text("[" * 100_000),
        "is not JSON",
    ),
    "cut short": (
        lambda f: os.truncate(f / "model-1-of-2.safetensors", 100),
        "is not a whole safetensors file",
    ),
    "nothing": (lambda f: shutil.rmtree(f), "no model.safetensors in"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_named_and_nothing_is_written(name, checkpoints, tmp_path):
    before, after, *_ = checkpoints
    damage, message = BROKEN[name]
    damage(after)
    with pytest.raises((ValueError, FileNotFoundError), match="^c3a.convert.from_ch") as refused:
        convert.from_checkpoints(before, after, tmp_path / "adapter", 4, target_modules=["query"])
    assert message in str(refused.value)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["key"]}, "nothing matched target_modules ['key']; it has weights of"),
        ({"target_modules": []}, "expected target_modules to name a layer"),
        (
            {"target_modules": ["query"], "modules_to_save": ["pooler"]},
            "nothing matched modules_to_save ['pooler']",
        ),
        ({"target_modules": ["score"]}, "score: "),
    ],
)
def test_layers_that_two_checkpoints_do_not_share_are_named(
    options, message, checkpoints, tmp_path
):
    before, after, *_ = checkpoints
    with pytest.raises(ValueError, match="^c3a.convert.from_checkpoints: ") as refused:
        convert.from_checkpoints(before, after, tmp_path / "adapter", 4, **options)
    assert message in str(refused.value)
