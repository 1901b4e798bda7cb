"""Adapters on disk: to the PEFT library and back, whole or not at all, checked first."""

import json
import os
import re
import threading
import time

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import c3a
from c3a import adapter, adapter_files, names


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
    "size beyond the layer": (
        lambda f, t: edit_config(f, block_size=24),
        "adapter_config.json: blocks.0.query: expected block_size <= 23, in_features .* got 24",
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
OF_THE_CONFIGURATION = ("another model", "no targets", "block size", "size beyond the layer")


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


def test_where_releases_of_peft_read_a_pattern_in_two_ways_the_kernels_decide(tmp_path):
    def model():
        torch.manual_seed(3)
        return nn.ModuleDict({"a": nn.Linear(8, 8), "sub": nn.ModuleDict({"a": nn.Linear(8, 8)})})

    config = peft.C3AConfig(
        target_modules=["a"], block_size=2, block_size_pattern={"sub.a": 8, "a": 4}
    )
    theirs = peft.PeftModel(model(), config)
    theirs.save_pretrained(tmp_path)
    ours = c3a.load_adapter(model(), tmp_path)
    # as PEFT 0.21 reads it; newer releases see a whole name as an end, and read 8 for sub.a
    assert {layer.name: layer.block_size for layer in c3a.summary(ours).layers} == {
        "a": 4,
        "sub.a": 4,
    }


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


# What a killed save leaves: its new weights beside the old configuration, or beside none.


def save_torn(old, new, folder):
    """Save one model, then another one up to the renaming of its weights."""
    if old is not None:
        c3a.save_adapter(old, folder)
    before = (folder / adapter.CONFIG).read_bytes() if old is not None else None
    c3a.save_adapter(new, folder)
    (folder / adapter.CONFIG).unlink()
    if before is not None:
        (folder / adapter.CONFIG).write_bytes(before)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("targets", [["query"], ["out"]])
def test_new_weights_beside_an_older_configuration_or_none_load(first, targets, tmp_path):
    old = None if first else trained(c3a.patch_model(Model(), ["query", "mlp"], 6))
    new = trained(c3a.patch_model(Model(), targets, 4, modules_to_save=["classifier"]))
    save_torn(old, new, tmp_path)
    torch.testing.assert_close(c3a.load_adapter(Model(), tmp_path)(X), new(X))
    c3a.save_adapter(new, tmp_path)
    torch.testing.assert_close(c3a.load_adapter(Model(), tmp_path)(X), new(X))
    assert peft.PeftModel.from_pretrained(Model(), tmp_path)


def test_the_older_configuration_is_passed_over_also_where_it_fits(tmp_path):
    new = trained(c3a.patch_model(Model(), ["query"], 6))
    save_torn(new, new, tmp_path)
    edit_config(tmp_path, base_model_name_or_path="older")
    edited = (tmp_path / adapter.CONFIG).read_bytes()
    assert adapter.read_adapter(tmp_path).config["base_model_name_or_path"] == "older"
    c3a.save_adapter(new, tmp_path)
    (tmp_path / adapter.CONFIG).write_bytes(edited)
    assert adapter.read_adapter(tmp_path).config["base_model_name_or_path"] is None


def test_a_configuration_edited_by_hand_counts(tmp_path):
    saved(tmp_path)
    edit_config(tmp_path, base_model_name_or_path="mine", target_modules=r".*\.query")
    assert adapter.read_adapter(tmp_path).config["base_model_name_or_path"] == "mine"
    c3a.load_adapter(Model(), tmp_path)
    edit_config(tmp_path, target_modules=["out"])
    with pytest.raises(ValueError, match=r"unknown: base_model.model.blocks.0.query.c3a_kernel"):
        c3a.load_adapter(Model(), tmp_path)


def test_a_reader_beside_a_writer_gets_one_of_its_adapters(tmp_path):
    models = [
        trained(c3a.patch_model(Model(), [target], size))
        for target, size in (("query", 4), ("mlp", 6), ("out", 12))
    ]
    states = [model.state_dict() for model in models]
    c3a.save_adapter(models[0], tmp_path)
    stop = threading.Event()

    def write():
        while not stop.is_set():
            for model in models:
                c3a.save_adapter(model, tmp_path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(60):
            state = c3a.load_adapter(Model(), tmp_path).state_dict()
            assert any(
                state.keys() == one.keys() and all(torch.equal(state[k], one[k]) for k in one)
                for one in states
            )
    finally:
        stop.set()
        writer.join()


# Numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_scale_of_its_own_leaves_a_kernels_numbers_as_they_are(dtype, tmp_path):
    def patched(scale):
        model = nn.Sequential(nn.Linear(4096, 4096))
        return c3a.patch_model(model, ["0"], 4096, scale=scale, dtype=dtype)

    model = patched(1.0)
    with torch.no_grad():
        model[0].c3a_kernel.uniform_(-20, 20)
        model[0].c3a_kernel[0, 0, 0] = 20.0
    c3a.save_adapter(model, tmp_path)
    stored = load_file(tmp_path / adapter.WEIGHTS)["base_model.model.0.c3a_kernel"]
    assert stored.dtype == torch.promote_types(dtype, torch.float32)
    assert stored[0, 0, 0] == 20 * 4096
    assert torch.equal(c3a.load_adapter(patched(1.0), tmp_path)[0].c3a_kernel, model[0].c3a_kernel)
    loaded = c3a.load_adapter(nn.Sequential(nn.Linear(4096, 4096)), tmp_path)
    assert loaded[0].c3a_kernel.dtype == stored.dtype
    torch.testing.assert_close(loaded[0].delta_weight(), model[0].delta_weight())


def test_a_kernel_that_has_no_room_for_its_scale_is_refused(tmp_path):
    model = trained(c3a.patch_model(Model(), ["query"], 6, scale=1e38))
    with pytest.raises(
        ValueError, match="save_adapter: the kernel of blocks.0.query times its scale 1e"
    ):
        c3a.save_adapter(model, tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("patched", [False, True])
def test_kernels_that_are_not_finite_are_named_when_they_load(number, patched, tmp_path):
    tensors = saved(tmp_path)
    edit_tensors(tmp_path, tensors, lambda t: t[QUERY].view(-1).__setitem__(3, number))
    model = Model()
    if patched:
        c3a.patch_model(model, ["query"], 6, modules_to_save=["classifier"])
    with pytest.warns(
        UserWarning, match=r"safetensors has kernels that are not finite: blocks.1.query$"
    ):
        c3a.load_adapter(model, tmp_path)


def test_kernels_of_two_dtypes_load_in_one_that_holds_both(tmp_path):
    tensors, key = saved(tmp_path), QUERY.replace("1", "0")
    edit_tensors(tmp_path, tensors, lambda t: t.update({key: t[key].half()}))
    loaded = c3a.load_adapter(Model(), tmp_path)
    assert {layer.c3a_kernel.dtype for layer in c3a.patch.adapted_layers(loaded).values()} == {
        torch.float32
    }


# Folders of strangers

BIAS = "base_model.model.classifier.bias"
HOSTILE = {
    "sizes as a list": (
        lambda f, t: edit_config(f, block_size_pattern=[["query", 6]]),
        r"adapter_config.json: expected block_size_pattern to be a mapping from names to whole "
        r"numbers >= 1, got \[\['query', 6\]\]",
    ),
    "sizes of text": (
        lambda f, t: edit_config(f, block_size_pattern={"query": "6"}),
        "expected block_size_pattern to be a mapping",
    ),
    "a size that is true": (
        lambda f, t: edit_config(f, block_size=True),
        "expected block_size to be a whole number >= 1, got True",
    ),
    "dots": (
        lambda f, t: edit_config(f, target_modules=["../.."]),
        r"json: target_modules \['../..'\]: the adapter does not fit this model: nothing matched",
    ),
    "layers of text": (
        lambda f, t: edit_config(f, layers_to_transform="x"),
        "expected layers_to_transform to be a whole number or a list of whole numbers, got 'x'",
    ),
    "layers that are not there": (
        lambda f, t: edit_config(f, layers_to_transform=[7], layers_pattern="blocks"),
        r"nothing matched target_modules \['query'\] in layers_to_transform \[7\]",
    ),
    "a number as path": (
        lambda f, t: edit_config(f, base_model_name_or_path=3),
        "expected base_model_name_or_path to be a name or a path, got 3",
    ),
    "a name as list": (
        lambda f, t: edit_config(f, modules_to_save="classifier"),
        "expected modules_to_save to be a list of names, got 'classifier'",
    ),
    "names of numbers": (
        lambda f, t: edit_config(f, target_modules=["query", 3]),
        "expected target_modules to be a list of names or a regular expression",
    ),
    "a list": (
        lambda f, t: (f / adapter.CONFIG).write_text("[1, 2]"),
        r"adapter_config.json: expected a mapping, got \[1, 2\]",
    ),
    "nested": (
        lambda f, t: (f / adapter.CONFIG).write_text('{"a":' * 100_000),
        "adapter_config.json is nested too deeply",
    ),
    "large": (
        lambda f, t: (f / adapter.CONFIG).write_text(" " * (2**24 + 1)),
        "adapter_config.json is longer than 16777216 bytes",
    ),
    "not UTF-8": (
        lambda f, t: (f / adapter.CONFIG).write_bytes(b"\xff\xfe"),
        "adapter_config.json is not JSON",
    ),
    "an expression that is none": (
        lambda f, t: edit_config(f, target_modules="(query"),
        r"c3a.load_adapter: .*json: target_modules: '\(query' is not a regular expression: missing",
    ),
    "a size's expression that is none": (
        lambda f, t: edit_config(f, block_size_pattern={"a": 6, "*": 3}),
        r"json: block_size_pattern: .*\*.* is not a regular expression",
    ),
    "an expression that takes for ever": (
        lambda f, t: edit_config(f, target_modules="(.+)+X"),
        r"json: target_modules: the regular expression '\(\.\+\)\+X' takes more than 0.5 s",
    ),
    "a size's expression that takes for ever": (
        lambda f, t: edit_config(f, block_size_pattern={"((((.+)+)+)+)+X": 6}),
        r"json: block_size_pattern: the regular expression .* takes more than 0.5 s",
    ),
    "a layer's expression that takes for ever": (
        lambda f, t: edit_config(f, layers_to_transform=[1], layers_pattern=["(.+)+X"]),
        r"json: layers_pattern: the regular expression .* takes more than 0.5 s",
    ),
    "a kernel of whole numbers": (
        lambda f, t: edit_tensors(f, t, lambda t: t.update({QUERY: t[QUERY].int()})),
        rf"safetensors: {QUERY}: expected one of float64, float32, bfloat16, float16, got int32",
    ),
    "a float8 kernel": (
        lambda f, t: edit_tensors(
            f, t, lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e5m2)})
        ),
        rf"{QUERY}: expected one of .*, got float8_e5m2",
    ),
    "a complex kernel": (
        lambda f, t: edit_tensors(f, t, lambda t: t.update({QUERY: t[QUERY].to(torch.complex64)})),
        rf"{QUERY}: expected one of .*, got complex64",
    ),
    "a kernel without numbers": (
        lambda f, t: edit_tensors(f, t, lambda t: t.update({QUERY: torch.zeros(2, 0, 6)})),
        rf"{QUERY}: expected a shape \(m, n, b\), or .*, got \(2, 0, 6\)",
    ),
    "a head of whole numbers": (
        lambda f, t: edit_tensors(f, t, lambda t: t.update({BIAS: t[BIAS].int()})),
        rf"does not fit the model: {BIAS}: expected dtype torch.float32, got torch.int32",
    ),
    "a complex head": (
        lambda f, t: edit_tensors(f, t, lambda t: t.update({BIAS: t[BIAS].to(torch.complex64)})),
        rf"{BIAS}: expected dtype torch.float32, got torch.complex64",
    ),
    "a dtype that is none": (
        lambda f, t: (f / adapter.WEIGHTS).write_bytes(
            (f / adapter.WEIGHTS).read_bytes().replace(b'"F32"', b'"\x7f32"', 1)
        ),
        r"is not a whole safetensors file: .*\\x7f32",
    ),
    "a key of two lines": (
        lambda f, t: edit_tensors(f, t, lambda t: t.update({"a\nb": t[BIAS].clone()})),
        r"unknown: a\\nb$",
    ),
}


class Deep(nn.Module):
    """Has names long enough for an expression that takes for ever."""

    def __init__(self):
        super().__init__()
        inner = Model()
        self.blocks, self.classifier = inner.blocks, inner.classifier
        self.a_name_of_some_length_that_ends_in_no_such_letter = nn.Identity()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_strangers_folder_is_refused_in_one_line_that_names_file_and_key(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr(names, "SECONDS", 0.5)
    damage, message = HOSTILE[name]
    damage(tmp_path, saved(tmp_path))
    model = Deep()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        c3a.load_adapter(model, tmp_path)
    said = str(caught.value)
    assert said.startswith(f"c3a.load_adapter: {tmp_path}")
    assert "\n" not in said
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())


def test_a_head_of_another_floating_dtype_is_rounded(tmp_path):
    edit_tensors(tmp_path, saved(tmp_path), lambda t: t.update({BIAS: t[BIAS].double() * 0 + 0.1}))
    model = c3a.load_adapter(Model(), tmp_path)
    assert torch.equal(model.classifier.bias, torch.full((2,), 0.1))


def test_usual_folders_are_read_without_another_interpreter(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "_first_matches", lambda patterns, _: {} if not patterns else None)
    for number, (targets, sizes, options) in enumerate(PATCHES.values()):
        model = trained(c3a.patch_model(Model(), targets, sizes, **options))
        folder = tmp_path / str(number)
        c3a.save_adapter(model, folder)
        torch.testing.assert_close(
            c3a.load_adapter(Model(), folder)(X), model(X), rtol=1e-5, atol=1e-5
        )
    edit_config(tmp_path / "0", target_modules=r".*\.(query|nothing)$")
    c3a.load_adapter(Model(), tmp_path / "0")


@pytest.mark.parametrize("key", ["target_modules", "modules_to_save", "block_size_pattern"])
def test_a_hundred_thousand_names_take_no_time(key, tmp_path):
    tensors = saved(tmp_path)
    many = [f"layer.{number}.{'x' * (number % 30)}" for number in range(100_000)]
    config = json.loads((tmp_path / adapter.CONFIG).read_text())
    value = [*(config[key] or ()), *many]
    edit_config(tmp_path, **{key: dict.fromkeys(value, 3) if "pattern" in key else value})
    start = time.monotonic()
    model = c3a.load_adapter(Model(), tmp_path)
    assert time.monotonic() - start < 5
    assert torch.equal(model.blocks[1].query.c3a_kernel, tensors[QUERY])


LAYERS = ["blocks.0.query", "blocks.1.query", "blocks.10.out", "query", "blocks_1.query", "a+b.out"]


@pytest.mark.parametrize(
    "pattern",
    [r".*\.query", r".*\.(query|out)$", r"query|blocks\.1\.query", r".*\.blocks", r"a\+b\.out"]
    + [
        r"blocks.1.query",
        r".*query",
        r"blocks\.\d+\.(query|out)",
        r".*\.query|query",
        "q.*|b.*out",
    ],
)
def test_expressions_of_strangers_mean_what_they_mean_to_re(pattern):
    assert names.fully_matched(pattern, LAYERS) == {n for n in LAYERS if re.fullmatch(pattern, n)}


@pytest.mark.parametrize(
    "keys",
    [["query", "1.query"], ["1.query", "query"], ["blocks.1.query", ".query"], ["out", r"\d\.out"]]
    + [["1.q", "s.1", "query|out"], [r"blocks\.\d+\.(query|out)", "out"], ["blocks", "b.out"]],
)
def test_keys_of_strangers_mean_what_they_mean_to_peft(keys):
    from peft.utils.other import get_pattern_key

    here = names.first_keys(keys, LAYERS)
    assert [key or name for key, name in zip(here, LAYERS, strict=True)] == [
        get_pattern_key(keys, name) for name in LAYERS
    ]
    older = names.first_keys(keys, LAYERS, proper=True)
    assert older == [
        next((key for key in keys if re.match(rf".*\.({key})$", name)), None) for name in LAYERS
    ]


@pytest.mark.parametrize(
    "patterns",
    [[], ["blocks"], ["x", "h", "blocks"], ["b.*s"], ["h.x", "x.h"], ["h"]]
    + [["h.*|x"], ["nothing|model.*"]],
)
def test_numbers_of_layers_are_those_that_peft_reads(patterns):
    layers = ["model.blocks.0.query", "blocks.1.query", "x.h.2.3.q", "h.x.4.q", "h.5", "x.6.h.7.q"]
    found = {}
    for name in layers:
        for pattern in patterns or [None]:
            regex = r".*?\.[^.]*\.(\d+)\." if pattern is None else rf"(?:^|.*?\.){pattern}\.(\d+)\."
            if match := re.match(regex, name):
                if match[1] is not None:  # else the pattern's own | leaves the number out
                    found[name] = int(match[1])
                break
    assert names.layer_numbers(patterns, layers) == found


# Models that cannot be saved or loaded into as they are


def test_an_adapter_for_another_architecture_is_named_with_file_and_key(tmp_path):
    plain = c3a.patch_model(nn.Sequential(nn.Linear(12, 12), nn.ReLU()), ["0"], 6)
    c3a.save_adapter(plain, tmp_path)
    with pytest.raises(
        ValueError,
        match=r"^c3a.load_adapter: .*adapter_config.json: target_modules \['0'\]: the adapter does "
        r"not fit this model: blocks.0 is a Block",
    ):
        c3a.load_adapter(Model(), tmp_path)


@pytest.mark.parametrize("kind", ["padded", "Conv1D"])
def test_saving_what_peft_cannot_load_warns(kind, tmp_path):
    if kind == "padded":
        model = c3a.patch_model(Model(), ["mlp", "query"], {"mlp": 5, "query": 6}, pad=True)
        message = "it does not pad: blocks.0.mlp, blocks.1.mlp, blocks.2.mlp$"
    else:
        from transformers.pytorch_utils import Conv1D

        model = nn.ModuleDict({"attn": Conv1D(24, 12), "mlp": nn.Linear(12, 12)})
        c3a.patch_model(model, "all-linear", 6)
        message = r"it adapts torch.nn.Linear only: attn \(Conv1D\)$"
    with pytest.warns(UserWarning, match=f"the PEFT library cannot; {message}") as warned:
        c3a.save_adapter(model, tmp_path)
    assert warned[0].filename == __file__


@pytest.mark.parametrize("patched", [False, True])
def test_a_model_on_the_meta_device_is_refused(patched, tmp_path):
    saved(tmp_path)
    with torch.device("meta"):
        model = Model()
    if patched:
        c3a.patch_model(model, ["query"], 6, modules_to_save=["classifier"])
    before = list(model.state_dict())
    with pytest.raises(
        ValueError, match="load_adapter: the model is on the meta device, .*blocks.0"
    ):
        c3a.load_adapter(model, tmp_path)
    assert list(model.state_dict()) == before
    if patched:
        with pytest.raises(ValueError, match="save_adapter: blocks.0.query is on the meta device"):
            c3a.save_adapter(model, tmp_path)


def test_what_accelerate_offloads_is_saved_from_where_it_is_and_not_loaded_into(tmp_path):
    import accelerate

    model = trained(c3a.patch_model(Model(), ["query"], 6, modules_to_save=["classifier"]))
    c3a.save_adapter(model, tmp_path / "here")
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert model.blocks[0].query.c3a_kernel.is_meta
    c3a.save_adapter(model, tmp_path / "offloaded")
    assert model.blocks[0].query.c3a_kernel.is_meta
    expected = load_file(tmp_path / "here" / adapter.WEIGHTS)
    found = load_file(tmp_path / "offloaded" / adapter.WEIGHTS)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    with pytest.raises(ValueError, match=r"blocks.0.query.c3a_kernel, .* after the adapter is"):
        c3a.load_adapter(model, tmp_path / "here")
    base = accelerate.cpu_offload(Model(), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"blocks.0.query, .* after the adapter is loaded"):
        c3a.load_adapter(base, tmp_path / "here")
    assert not c3a.patch.adapted_layers(base)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_with_pefts_adapters_is_refused_with_what_to_call(wrapped, tmp_path):
    saved(tmp_path)
    config = peft.LoraConfig(target_modules=["query"], r=2)
    inner = Model()
    model = peft.get_peft_model(inner, config)
    target = model if wrapped else inner
    with pytest.raises(
        ValueError, match=r"query is one of its layers\): load another with PEFT's mo"
    ):
        c3a.load_adapter(target, tmp_path)
    patched = c3a.patch_model(Model(), ["mlp"], 6)
    model = peft.get_peft_model(patched, config)
    with pytest.raises(ValueError, match=r"save_adapter: the model holds the PEFT library's adapt"):
        c3a.save_adapter(model if wrapped else patched, tmp_path)
    assert c3a.load_adapter(peft.get_peft_model(Model(), config).unload(), tmp_path)


def test_the_way_that_is_named_for_a_wrapped_model_works(tmp_path):
    saved(tmp_path)
    model = peft.get_peft_model(Model(), peft.C3AConfig(target_modules=["query"], block_size=6))
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    torch.testing.assert_close(model(X), c3a.load_adapter(Model(), tmp_path)(X))
