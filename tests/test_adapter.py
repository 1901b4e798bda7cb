"""Adapters on disk: to the PEFT library and back, whole or not at all, checked first."""

import json
import os

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import c3a
from c3a import adapter, adapter_files


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(12, 12)
        self.mlp = nn.Linear(12, 24)
        self.out = nn.Linear(24, 12)

    def forward(self, x):
        return x + self.out(self.mlp(self.query(x)).relu())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.classifier = nn.Linear(12, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.classifier(x)


X = torch.linspace(-1, 1, 60).view(5, 12)


def trained(model):
    """Give everything trainable random values, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


PATCHES = {
    "suffix": (["query"], 6, {}),
    "one of three": (["blocks.1.query"], 4, {}),
    "several sizes": (
        ["query", "mlp", "out"],
        {"query": 12, "mlp": 4, r"blocks\.[01]\.out": 3},
        {},
    ),
    "head": (["query"], 6, {"modules_to_save": ["classifier"]}),
    "own scale": (["mlp"], 6, {"scale": 0.37}),
    "all-linear": ("all-linear", "auto", {"modules_to_save": ["classifier"]}),
    "names that end in others": (
        ["mlp", "0.query", "classifier"],
        {"classifier": 2, "mlp": 3, "query": 4},
        {},
    ),
    "regex": (r"blocks\.[02]\.(query|out)", 3, {}),
}
PATCHES["several sizes"][1][r"blocks\.2\.out"] = 12


@pytest.mark.parametrize("name", PATCHES)
def test_what_we_save_loads_in_peft_and_here_with_equal_outputs(name, tmp_path):
    targets, block_size, options = PATCHES[name]
    model = trained(c3a.patch_model(Model(), targets, block_size, **options))
    expected = model(X)
    assert c3a.save_adapter(model, tmp_path) == tmp_path
    theirs = peft.PeftModel.from_pretrained(Model(), tmp_path)
    torch.testing.assert_close(theirs(X), expected, rtol=1e-5, atol=1e-5)
    ours = c3a.load_adapter(Model(), tmp_path)
    torch.testing.assert_close(ours(X), expected, rtol=1e-5, atol=1e-5)
    assert [s.block_size for s in c3a.summary(ours).layers] == [
        s.block_size for s in c3a.summary(model).layers
    ]
    again = trained(c3a.patch_model(Model(), targets, block_size, **options))
    torch.testing.assert_close(c3a.load_adapter(again, tmp_path)(X), expected)


THEIR_CONFIGS = {
    "suffix": {"target_modules": ["query"], "block_size": 6},
    "regex": {"target_modules": r".*\.(query|out)", "block_size": 3},
    "pattern": {
        "target_modules": ["query", "mlp"],
        "block_size": 6,
        "block_size_pattern": {r"1\.query": 4, "mlp": 2},
    },
    "layers": {
        "target_modules": ["query"],
        "block_size": 6,
        "layers_to_transform": [0, 2],
        "layers_pattern": ["stages", "blocks"],
    },
    "layers pattern": {
        "target_modules": ["mlp"],
        "block_size": 6,
        "layers_to_transform": 1,
        "layers_pattern": "blocks",
    },
    "head": {"target_modules": ["query"], "block_size": 6, "modules_to_save": ["classifier"]},
    "sequence classifier": {"target_modules": "all-linear", "block_size": 12, "task_type": None},
}


@pytest.mark.parametrize("name", THEIR_CONFIGS)
def test_what_peft_saves_loads_here_with_equal_outputs(name, tmp_path):
    config = dict(THEIR_CONFIGS[name])
    if name == "sequence classifier":
        config["modules_to_save"] = ["classifier"]
    theirs = trained(peft.get_peft_model(Model(), peft.C3AConfig(**config)))
    expected = theirs(X)
    theirs.save_pretrained(tmp_path)
    ours = c3a.load_adapter(Model(), tmp_path)
    torch.testing.assert_close(ours(X), expected, rtol=1e-5, atol=1e-5)
    c3a.save_adapter(ours, tmp_path / "again")
    back = peft.PeftModel.from_pretrained(Model(), tmp_path / "again")
    torch.testing.assert_close(back(X), expected, rtol=1e-5, atol=1e-5)


def test_a_round_trip_is_exact_with_the_default_scale(tmp_path):
    model = trained(c3a.patch_model(Model(), "all-linear", 2, modules_to_save=["classifier"]))
    c3a.save_adapter(model, tmp_path)
    state, again = model.state_dict(), c3a.load_adapter(Model(), tmp_path).state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_files_are_those_of_the_format(tmp_path):
    model = c3a.patch_model(Model(), ["query"], 6, modules_to_save=["classifier"])
    c3a.save_adapter(model, tmp_path / "new" / "folder", task_type="SEQ_CLS")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [adapter.CONFIG, adapter.WEIGHTS]
    tensors = load_file(tmp_path / "new" / "folder" / adapter.WEIGHTS)
    assert sorted(tensors) == [
        *(f"base_model.model.blocks.{i}.query.c3a_kernel" for i in range(3)),
        "base_model.model.classifier.bias",
        "base_model.model.classifier.weight",
    ]
    config = json.loads((tmp_path / "new" / "folder" / adapter.CONFIG).read_text())
    theirs = peft.C3AConfig(target_modules=["query"]).to_dict()
    assert set(config) <= set(theirs)
    assert config["peft_type"] == "C3A"
    assert config["target_modules"] == ["query"]
    assert config["block_size"] == 6
    assert config["task_type"] == "SEQ_CLS"
    mode = (tmp_path / "new" / "folder" / adapter.WEIGHTS).stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    assert mode == 0o666 & ~umask


def test_saving_from_a_compiled_or_merged_model_gives_the_same_file(tmp_path):
    model = trained(c3a.patch_model(Model(), ["query"], 6))
    c3a.save_adapter(model, tmp_path / "plain")
    c3a.save_adapter(torch.compile(model), tmp_path / "compiled")
    c3a.save_adapter(c3a.merge(model), tmp_path / "merged")
    expected = load_file(tmp_path / "plain" / adapter.WEIGHTS)
    for other in ("compiled", "merged"):
        tensors = load_file(tmp_path / other / adapter.WEIGHTS)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def saved(tmp_path):
    model = c3a.patch_model(Model(), ["query"], 6, modules_to_save=["classifier"])
    c3a.save_adapter(trained(model), tmp_path)
    return load_file(tmp_path / adapter.WEIGHTS)


QUERY = "base_model.model.blocks.1.query.c3a_kernel"


def edit_tensors(folder, tensors, change):
    change(tensors)
    save_file(tensors, folder / adapter.WEIGHTS)


def edit_config(folder, **changes):
    path = folder / adapter.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGES = {
    "missing key": (
        lambda f, t: edit_tensors(f, t, lambda t: t.pop(QUERY)),
        rf"missing: {QUERY}",
    ),
    "unknown key": (
        lambda f, t: edit_tensors(f, t, lambda t: t.update({"base_model.model.up": X})),
        "unknown: base_model.model.up",
    ),
    "wrong shape": (
        lambda f, t: edit_tensors(f, t, lambda t: t.update({QUERY: torch.ones(3, 3, 4)})),
        rf"{QUERY}: expected shape \(2, 2, 6\), got \(3, 3, 4\)",
    ),
    "another method": (
        lambda f, t: edit_config(f, peft_type="LORA"),
        """adapter_config.json: expected "peft_type": "C3A", got 'LORA'""",
    ),
    "bias": (lambda f, t: edit_config(f, bias="all"), "expected bias to be 'none' .*, got 'all'"),
    "another model": (
        lambda f, t: edit_config(f, target_modules=["q_proj"]),
        r"adapter_config.json: target_modules \['q_proj'\]: the adapter does not fit this model: "
        r"nothing matched target_modules \['q_proj'\]; linear layers of the model: query",
    ),
    "no targets": (lambda f, t: edit_config(f, target_modules=None), "names no target_modules"),
    "block size": (
        lambda f, t: edit_config(f, block_size=None),
        "block_size: expected one for blocks.0.query, got none",
    ),
    "not JSON": (lambda f, t: (f / adapter.CONFIG).write_text("{"), "is not JSON"),
    "cut short": (
        lambda f, t: os.truncate(f / adapter.WEIGHTS, 100),
        "is not a whole safetensors file",
    ),
}


# For a model that is patched already, its own patch stands for the configuration's.
OF_THE_CONFIGURATION = ("another model", "no targets", "block size")


@pytest.mark.parametrize(
    ("name", "patched"),
    [(name, False) for name in DAMAGES]
    + [(name, True) for name in DAMAGES if name not in OF_THE_CONFIGURATION],
)
def test_a_damaged_adapter_is_named_and_changes_nothing(name, patched, tmp_path):
    damage, message = DAMAGES[name]
    damage(tmp_path, saved(tmp_path))
    model = Model()
    if patched:
        c3a.patch_model(model, ["query"], 6, modules_to_save=["classifier"])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        c3a.load_adapter(model, tmp_path)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert trainable == [p.requires_grad for p in model.parameters()]


def test_missing_files_are_named_and_pickles_are_never_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is fetched"):
        c3a.load_adapter(Model(), "someone/adapter-on-a-hub")
    saved(tmp_path)
    (tmp_path / adapter.WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="is a pickle, which is never read"):
        c3a.load_adapter(Model(), tmp_path)


def test_a_failed_save_leaves_the_old_adapter_whole(tmp_path, monkeypatch):
    expected = saved(tmp_path)
    model = trained(c3a.patch_model(Model(), ["query"], 6))

    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(adapter_files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        c3a.save_adapter(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [adapter.CONFIG, adapter.WEIGHTS]
    tensors = load_file(tmp_path / adapter.WEIGHTS)
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_models_that_cannot_be_saved_or_loaded_into_say_why(tmp_path):
    with pytest.raises(ValueError, match="no C3ALinear layer"):
        c3a.save_adapter(Model(), tmp_path)
    assert os.listdir(tmp_path) == []
    model = nn.Sequential(c3a.C3ALinear(c3a.C3ALinear(nn.Linear(4, 4), 2), 2))
    with pytest.raises(ValueError, match="one adapter a layer; 0 has several"):
        c3a.save_adapter(model, tmp_path)
    saved(tmp_path)
    model = c3a.patch_model(Model(), ["query"], 6, modules_to_save=["classifier"])
    c3a.merge(model)
    with pytest.raises(ValueError, match="the model is merged"):
        c3a.load_adapter(model, tmp_path)


def test_block_sizes_of_layers_whose_names_end_in_those_of_others(tmp_path):
    def model():
        torch.manual_seed(3)
        return nn.ModuleDict(
            {
                "a": nn.Linear(8, 8),
                "sub": nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}),
            }
        )

    patched = trained(c3a.patch_model(model(), "all-linear", {r"sub\.\w": 8, "a": 4}))
    c3a.save_adapter(patched, tmp_path)
    loaded = c3a.load_adapter(model(), tmp_path).state_dict()
    theirs = peft.inject_adapter_in_model(peft.C3AConfig.from_pretrained(tmp_path), model())
    for name, tensor in patched.state_dict().items():
        assert torch.equal(loaded[name], tensor)
        if name.endswith("c3a_kernel"):
            assert theirs.get_submodule(name)["default"].shape == tensor.shape


@pytest.mark.parametrize("kind", ["Sequence", "Token"])
def test_adapters_for_classifiers_of_transformers_come_over_from_peft(kind, tmp_path):
    import transformers

    def model():
        torch.manual_seed(5)
        config = transformers.BertConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            vocab_size=50,
        )
        return getattr(transformers, f"BertFor{kind}Classification")(config).eval()

    task = {"Sequence": "SEQ_CLS", "Token": "TOKEN_CLS"}[kind]
    config = peft.C3AConfig(target_modules=["query", "value"], block_size=12, task_type=task)
    theirs = trained(peft.get_peft_model(model(), config)).eval()
    theirs.save_pretrained(tmp_path)
    tokens = torch.arange(12).view(2, 6)
    ours = c3a.load_adapter(model(), tmp_path)
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    c3a.save_adapter(ours, tmp_path / "again", task_type=task)
    back = peft.PeftModel.from_pretrained(model(), tmp_path / "again").eval()
    torch.testing.assert_close(back(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_is_trained_and_not_saved_is_named(tmp_path):
    model = c3a.patch_model(Model(), ["query"], 6)
    model.classifier.requires_grad_(True)
    with pytest.warns(UserWarning, match="not saved, though trainable: classifier.weight, class"):
        c3a.save_adapter(model, tmp_path)


def test_padded_layers_save_and_load_here(tmp_path):
    model = trained(c3a.patch_model(Model(), ["mlp"], 5, pad=True))
    with pytest.warns(UserWarning, match="PEFT library cannot; it does not pad: blocks.0.mlp, "):
        c3a.save_adapter(model, tmp_path)
    torch.testing.assert_close(c3a.load_adapter(Model(), tmp_path)(X), model(X))
