"""patch_model and its inverses: choosing layers and sizes, freezing, failing without a trace."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import c3a
from c3a.sizes import auto_block_size

pytestmark = pytest.mark.usefixtures("default_device")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(12, 12)
        self.value = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)

    def forward(self, x):
        return self.norm(x + self.query(x) * self.value(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.up = nn.Linear(12, 30)
        self.classifier = nn.Linear(30, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.up(x).relu())


QUERIES = ["layers.0.query", "layers.1.query"]
ALL = ["layers.0.query", "layers.0.value", "layers.1.query", "layers.1.value", "up"]


def snapshot(model):
    return (
        {name: type(module) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()},
        "_c3a_record" in vars(model),
    )


def adapted_names(model):
    return [name for name, m in model.named_modules() if isinstance(m, c3a.C3ALinear)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["query"], QUERIES),
        (["layers.1.query", "up"], ["layers.1.query", "up"]),
        (("query", "value", "up"), ALL),
        (r".*\.query", QUERIES),
        (re.compile(r"layers\.\d\.query"), QUERIES),
        (lambda name, module: name.endswith("query"), QUERIES),
        ("all-linear", ALL),
    ],
    ids=["suffix", "names", "tuple", "string regex", "compiled regex", "predicate", "all-linear"],
)
def test_targets_by_every_kind_of_rule(targets, expected):
    model = Model()
    assert c3a.patch_model(model, targets, 6, modules_to_save=["classifier"]) is model
    assert adapted_names(model) == expected
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    kernels = {f"{name}.c3a_kernel" for name in expected}
    assert trainable == kernels | {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("block_size", "expected"),
    [
        (3, {"query": 3, "up": 3}),
        ({"query": 4, r"u\w": 6}, {"query": 4, "up": 6}),
        ({"layers.0.query": 4, "query": 12, "up": 2}, {"query": 4, "up": 2}),
        ("auto", {"query": 4, "up": 6}),
    ],
)
def test_block_sizes_by_number_mapping_or_rule(block_size, expected):
    model = c3a.patch_model(Model(), ["query", "up"], block_size, rank=3)
    assert model.layers[0].query.block_size == expected["query"]
    assert model.up.block_size == expected["up"]


@pytest.mark.parametrize(
    ("sizes", "rank", "expected"),
    [
        ((768, 768), 8, 96),
        ((768, 768), 1, 768),
        ((768, 3072), 16, 96),
        ((384, 1536), 8, 96),
        ((30, 42), 8, 6),
        ((7, 9), 4, 1),
    ],
)
def test_auto_takes_the_common_divisor_nearest_to_the_geometric_mean_over_rank(
    sizes, rank, expected
):
    assert auto_block_size(*sizes, rank) == expected


@pytest.mark.parametrize(
    ("targets", "block_size", "options", "error", "message"),
    [
        (["quary"], 6, {}, ValueError, r"no module is named 'quary'; .*query \(2\), value \(2\)"),
        ("query", 6, {}, ValueError, "nothing matched 'query'; a string is a regular expression"),
        (lambda n, m: False, 6, {}, ValueError, "nothing matched .* linear layers of the model"),
        (["norm"], 6, {}, TypeError, "layers.0.norm is a LayerNorm, which has no in and out"),
        (["query", "up"], 4, {}, ValueError, r"up: block_size 4 does not divide in_features = 12"),
        (["query"], {"up": 2}, {}, ValueError, "layers.0.query: no key of the mapping"),
        (["query"], 6, {"modules_to_save": ["head"]}, ValueError, "no module is named 'head'"),
        (["query"], 6, {"modules_to_save": "up"}, TypeError, "to be a list of names, got 'up'"),
        (["query"], 6, {"init": "ones"}, ValueError, "expected init to be one of"),
        (["query"], 6, {"dtype": torch.int8}, TypeError, "expected one of .* got dtype torch.int8"),
        ("*.query", 6, {}, ValueError, r"'\*.query' is not a regular expression"),
        (["query"], "auto", {"rank": 0}, ValueError, "expected rank to be a number >= 1, got 0"),
        (["query"], "auto", {"rank": float("nan")}, ValueError, "number >= 1, got nan"),
        (["query"], "auto", {"rank": "8"}, ValueError, "number >= 1, got '8'"),
        (["query"], 6, {"scale": "x"}, TypeError, "expected scale to be a number, got str 'x'"),
        (["query"], "Auto", {}, ValueError, "a mapping from names to numbers, or 'auto', got"),
        (["query"], [6], {}, TypeError, r"or 'auto', got \[6\]"),
        (["query"], None, {}, TypeError, "expected block_size to be a number, .* got None"),
        (["query"], 6.0, {}, ValueError, "expected block_size to be an integer >= 1, got 6.0"),
        (["query"], True, {}, ValueError, "expected block_size to be an integer >= 1, got True"),
        (["query"], 2**70, {}, ValueError, r"layers.0.query: block_size \d+ does not divide"),
        (["query"], 24, {"pad": True}, ValueError, r"block_size <= 23, in_features \+ .* got 24"),
        (["query"], 2**70, {"pad": True}, ValueError, "expected block_size <= 23, .* got 118059"),
        (None, 6, {}, TypeError, "a predicate or 'all-linear', got None"),
        (3, 6, {}, TypeError, "expected target_modules to be a list of names, .* got 3"),
        ([0, 1], 6, {}, TypeError, "expected target_modules to hold names, got int 0"),
        (re.compile(b"query"), 6, {}, TypeError, "a list of names, a regular .* got re.compile"),
        (lambda n, m: m.bias[99], 6, {}, ValueError, "predicate .* failed for 'layers': Attribu"),
        (["query"], 6, {"modules_to_save": None}, TypeError, "to be a list of names, got None"),
        (["query"], 6, {"modules_to_save": [4]}, TypeError, "to hold names, got int 4"),
        (
            ["classifier"],
            2,
            {"modules_to_save": ["classifier"]},
            ValueError,
            r"all that target_modules \['classifier'\] matched is in modules_to_save "
            r"\['classifier'\], and is trained whole",
        ),
    ],
)
def test_failures_say_what_there_is_and_leave_the_model_as_it_was(
    targets, block_size, options, error, message
):
    model = Model()
    model.up.weight.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        c3a.patch_model(model, targets, block_size, **options)
    assert snapshot(model) == before


def refusal(targets, block_size, **options):
    with pytest.raises(ValueError, match=r"c3a\.patch_model: ") as caught:
        c3a.patch_model(Model(), targets, block_size, **options)
    return str(caught.value)


def test_a_size_that_fits_all_but_the_head_tells_where_the_head_goes():
    assert refusal("all-linear", 6) == (
        "c3a.patch_model: classifier: block_size 6 does not divide in_features = 30 and "
        "out_features = 2; these do: 1, 2 (or pass pad=True); if classifier is a new head, pass "
        "modules_to_save=['classifier'], which trains it whole; block_size='auto' or a mapping "
        "gives each layer a size of its own"
    )
    c3a.patch_model(Model(), "all-linear", 6, modules_to_save=["classifier"])
    # neither for a layer in the middle, nor where the layer was asked for
    said = refusal("all-linear", 4, modules_to_save=["classifier"])
    assert "up: block_size 4 does not divide" in said
    assert "modules_to_save" not in said
    assert said.endswith("'auto' or a mapping gives each layer a size of its own")
    assert "modules_to_save" not in refusal(["query", "classifier"], 6)
    assert refusal(["query"], 5).endswith("(or pass pad=True)")


def test_refusals_are_one_line_that_names_a_few_layers():
    said = refusal("all-linear", 7)
    assert [name for name in [*ALL, "classifier"] if f"{name}: " in said] == ALL[:3]
    assert said.endswith("; and 3 more layers")
    assert "\n" not in said


def test_numpys_integers_are_block_sizes():
    model = c3a.patch_model(Model(), ["query"], np.int8(6))
    assert model.layers[0].query.block_size == 6
    with pytest.raises(ValueError, match="block_size 100 does not divide in_features = 768"):
        c3a.C3ALinear(nn.Linear(768, 768), np.int8(100))


def test_a_configuration_of_another_method_is_told_what_to_pass():
    import peft

    config = peft.LoraConfig(target_modules=["query"])
    said = (
        "expected config to be a C3AConfig, got a LoraConfig; pass what it holds: "
        r"target_modules=config.target_modules, block_size='auto', "
        r"modules_to_save=config.modules_to_save or \(\)$"
    )
    model = Model()
    before = snapshot(model)
    with pytest.raises(TypeError, match=said):
        c3a.patch_model(model, config)
    assert snapshot(model) == before
    c3a.patch_model(
        model, config.target_modules, "auto", modules_to_save=config.modules_to_save or ()
    )


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_with_adapters_of_peft_is_told_to_take_them_out(wrapped):
    import peft

    model = Model()
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], r=2))
    before = snapshot(theirs)
    said = r"\(.*layers\.0\.query is one of its layers\): .*model\.unload\(\) or model\.merge_and"
    with pytest.raises(ValueError, match=said):
        c3a.patch_model(theirs if wrapped else model, ["value"], 6)
    assert snapshot(theirs) == before
    model = theirs.unload()
    assert adapted_names(c3a.patch_model(model, ["value"], 6)) == [
        "layers.0.value",
        "layers.1.value",
    ]


CALLS = {
    "patch_model": lambda model, folder: c3a.patch_model(model, ["query"], 6),
    "unpatch_model": lambda model, folder: c3a.unpatch_model(model),
    "merge": lambda model, folder: c3a.merge(model),
    "unmerge": lambda model, folder: c3a.unmerge(model),
    "disabled": lambda model, folder: c3a.disabled(model).__enter__(),
    "summary": lambda model, folder: c3a.summary(model),
    "save_adapter": lambda model, folder: c3a.save_adapter(model, folder),
    "load_adapter": lambda model, folder: c3a.load_adapter(model, folder),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("model", [None, "a/name", nn.Linear])
def test_what_is_no_model_is_named(call, model, tmp_path):
    kind = type(model).__name__
    said = re.escape(f"expected the model to be a torch.nn.Module, got {kind} {model!r}")
    with pytest.raises(TypeError, match=f"c3a: {said}$"):
        CALLS[call](model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_state_dict_given_as_a_model_is_named_in_one_line():
    with pytest.raises(TypeError, match=r"got OrderedDict OrderedDict\(.*\.\.\.$") as error:
        c3a.patch_model(nn.Linear(9, 9).state_dict(), ["0"], 3)
    assert "\n" not in str(error.value)


def test_patching_twice_is_an_error():
    model = c3a.patch_model(Model(), ["query"], 6)
    before = snapshot(model)
    with pytest.raises(ValueError, match="patched already"):
        c3a.patch_model(model, ["value"], 6)
    assert snapshot(model) == before


def test_a_model_that_is_itself_a_layer_is_told_what_to_do():
    with pytest.raises(
        ValueError, match=r"is itself a layer, a Linear; wrap it with c3a.C3ALinear"
    ):
        c3a.patch_model(nn.Linear(4, 4), "all-linear", 2)


def test_a_compiled_model_is_patched_and_unpatched_inside():
    inner = Model()
    before = snapshot(inner)
    model = torch.compile(inner)
    assert c3a.patch_model(model, ["query"], 6) is model
    assert [layer.name for layer in c3a.summary(model).layers] == QUERIES
    assert c3a.unpatch_model(model) is model
    assert snapshot(inner) == before


def test_a_layer_in_two_places_is_wrapped_once():
    shared = nn.Linear(4, 4)
    model = c3a.patch_model(nn.Sequential(shared, nn.ReLU(), shared), ["0"], 2)
    assert model[0] is model[2]
    assert model[0].base_layer is shared
    assert c3a.unpatch_model(model)[2] is shared


@pytest.mark.parametrize("merged", [False, True])
def test_unpatching_restores_the_model_bit_for_bit(merged):
    model = Model()
    model.up.weight.requires_grad_(False)
    before, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    c3a.patch_model(model, "all-linear", 6, init="gaussian", modules_to_save=["classifier"])
    if merged:
        c3a.merge(model)
    c3a.unpatch_model(model)
    assert snapshot(model) == before
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())


def test_unpatching_with_merge_keeps_the_function():
    model = c3a.patch_model(Model(), ["query", "up"], 6, init="gaussian")
    x = torch.randn(5, 12)
    expected = model(x)
    c3a.unpatch_model(model, merge=True)
    assert adapted_names(model) == []
    torch.testing.assert_close(model(x), expected)


def test_dropout_reaches_every_layer_and_no_file(tmp_path):
    model = c3a.patch_model(Model(), ["query", "up"], 6, init="gaussian", dropout=0.5)
    layers = [module for module in model.modules() if isinstance(module, c3a.C3ALinear)]
    assert [layer.dropout for layer in layers] == [0.5] * 3
    x = torch.randn(5, 12)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    c3a.save_adapter(model, tmp_path)
    assert "dropout" not in (tmp_path / "adapter_config.json").read_text()
    with pytest.raises(ValueError, match=r"expected 0 <= dropout < 1, got 2"):
        c3a.patch_model(Model(), ["query"], 6, dropout=2)


def test_merging_all_or_none():
    model = c3a.patch_model(Model(), ["query", "up"], 6, init="gaussian")
    model.up.base_layer.weight = None
    with pytest.raises(TypeError, match="cannot merge into a Linear"):
        c3a.merge(model)
    assert not any(module.merged for module in model.modules() if hasattr(module, "merged"))


def test_disabled_is_the_base_model_and_nests():
    torch.manual_seed(1)
    base = Model()
    x = torch.randn(5, 12)
    expected = base(x)
    model = c3a.patch_model(base, ["query"], 6, init="gaussian")
    with_adapter = model(x)
    for prepare in (c3a.unmerge, c3a.merge):
        prepare(model)
        with c3a.disabled(model):
            assert torch.equal(model(x), expected)
            with c3a.disabled(model):
                pass
            assert torch.equal(model(x), expected)
        torch.testing.assert_close(model(x), with_adapter)
    with pytest.raises(KeyError), c3a.disabled(model):
        raise KeyError
    torch.testing.assert_close(model(x), with_adapter)


def test_training_mode_is_kept():
    assert not c3a.patch_model(Model().eval(), ["query"], 6).layers[0].query.training
    assert c3a.patch_model(Model(), ["query"], 6).layers[0].query.training


def test_summary_counts_parameters():
    model = c3a.patch_model(Model(), ["query", "up"], 6, modules_to_save=["classifier"])
    found = c3a.summary(model)
    assert [layer.parameters for layer in found.layers] == [24, 24, 60]
    assert found.adapter == 108
    assert found.trainable == 108 + 62
    assert found.total == sum(p.numel() for p in model.parameters())
    assert "up              12   30           6          60\n" in str(found)


@pytest.mark.parametrize(
    ("hidden", "layers", "block_size", "parameters"),
    [(768, 12, 768, 18_432), (768, 12, 128, 110_592), (1024, 24, 1024, 49_152)]
    + [(1024, 24, 128, 393_216)],
)
def test_parameter_counts_are_those_of_the_paper(hidden, layers, block_size, parameters):
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=16)
    with torch.device("meta"):
        model = RobertaModel(config)
        c3a.patch_model(model, ["query", "value"], block_size)
    assert c3a.summary(model).adapter == parameters
