"""patch_model by a configuration of PEFT: the layers, sizes and initial values that PEFT gives."""

import copy
import dataclasses
import json
import math
import re
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from torch import nn

import c3a

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")
TEXT = {"vocab_size": 40, "num_attention_heads": 2}


def bert():
    config = transformers.BertConfig(
        **TEXT, hidden_size=24, intermediate_size=48, num_hidden_layers=3
    )
    return transformers.BertForSequenceClassification(config)


def llama():
    config = transformers.LlamaConfig(
        **TEXT, hidden_size=16, intermediate_size=48, num_hidden_layers=3, num_key_value_heads=1
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)
    )


def t5():
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=48, num_layers=2, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return transformers.ViTForImageClassification(config)


class Plain(nn.Module):
    """Names that some rules could confuse."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(12, 12)
        self.score = nn.Linear(12, 6)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"query": nn.Linear(12, 12), "sub_query": nn.Linear(12, 24)})
            for _ in range(11)
        )


def theirs_of(model, config):
    """The adapted layers of PEFT's model, and the modules that it trains whole."""
    wrapped = peft.get_peft_model(model, config)
    inner = wrapped.get_base_model()
    layers = {
        name: (module.block_size["default"], module.c3a_kernel["default"].detach())
        for name, module in inner.named_modules()
        if hasattr(module, "c3a_kernel")
    }
    saved = {name for name, module in inner.named_modules() if hasattr(module, "modules_to_save")}
    trainable = {
        re.sub(r"\.modules_to_save\.default|\.default|\.base_layer", "", name)
        for name, p in inner.named_parameters()
        if p.requires_grad
    }
    return layers, saved, trainable


CASES = {
    "BERT's defaults": (bert, {"block_size": 12}),
    "BERT, classification": (bert, {"block_size": 12, "task_type": "SEQ_CLS"}),
    "BERT, all": (bert, {"block_size": 12, "target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "BERT, All, no task": (bert, {"block_size": 2, "target_modules": "All-Linear"}),
    "BERT, layers": (
        bert,
        {"target_modules": ["query", "dense"], "block_size": 6, "layers_to_transform": [0, 2]},
    ),
    "BERT, one layer, a pattern": (
        bert,
        {
            "target_modules": ["query"],
            "block_size": 6,
            "layers_to_transform": 1,
            "layers_pattern": "layer",
        },
    ),
    "BERT, the pooler too": (
        bert,
        {"target_modules": ["dense"], "block_size": 6, "modules_to_save": ["pooler"]},
    ),
    "Llama's defaults": (llama, {"block_size": 8, "task_type": "CAUSAL_LM"}),
    "Llama, all": (llama, {"block_size": 8, "target_modules": "all-linear"}),
    "Llama, an expression": (
        llama,
        {"block_size": 8, "target_modules": r".*\.(q_proj|down_proj)"},
    ),
    "Llama, sizes": (
        llama,
        {
            "target_modules": ["q_proj", "up_proj"],
            "block_size": 4,
            "block_size_pattern": {
                "layers.1.self_attn.q_proj": 16,
                r"layers\.2.*": 8,
                "model.layers.0.mlp.up_proj": 16,
            },
        },
    ),
    "Llama, the head whole": (
        llama,
        {"target_modules": "all-linear", "block_size": 8, "modules_to_save": ["lm_head"]},
    ),
    "T5's defaults": (t5, {"block_size": 8, "task_type": "SEQ_2_SEQ_LM"}),
    "T5, all": (t5, {"block_size": 4, "target_modules": "all-linear"}),
    "T5, the encoder": (t5, {"block_size": 8, "target_modules": r"encoder.*\.(q|v|wi)"}),
    "ViT": (
        vit,
        {"block_size": 8, "target_modules": "all-linear", "modules_to_save": ["classifier"]},
    ),
    "ViT's attention": (
        vit,
        {"block_size": 16, "target_modules": ["q_proj", "o_proj", "fc1"]},
    ),
    "names that end in names": (
        Plain,
        {"target_modules": ["query", "nothing"], "block_size": 4, "modules_to_save": ["score"]},
    ),
    "layers by the first number": (
        Plain,
        {
            "target_modules": ["sub_query"],
            "block_size": 4,
            "layers_to_transform": [1, 10],
            "layers_pattern": ["layers", "blocks"],
        },
    ),
    "sizes of names that end in names": (
        Plain,
        {
            "target_modules": ["query", "sub_query"],
            "block_size": 12,
            "block_size_pattern": {"query": 4, "blocks.1.sub_query": 6, r"1\.query": 2},
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_layers_sizes_and_initial_values_are_those_of_pefts_model(name):
    make, arguments = CASES[name]
    config = peft.C3AConfig(**arguments)
    untouched = copy.deepcopy(config)
    model = make()
    torch.manual_seed(1)
    theirs, saved, trainable = theirs_of(copy.deepcopy(model), copy.deepcopy(config))
    assert theirs
    torch.manual_seed(1)
    assert c3a.patch_model(model, config) is model
    ours = {
        name: (module.block_size, module.c3a_kernel.detach())
        for name, module in model.named_modules()
        if isinstance(module, c3a.C3ALinear)
    }
    assert {n: size for n, (size, _) in ours.items()} == {n: s for n, (s, _) in theirs.items()}
    for layer, (_, kernel) in theirs.items():
        torch.testing.assert_close(ours[layer][1], kernel)
        assert model.get_submodule(layer).scale == 1 / model.get_submodule(layer).in_features
    assert set(c3a.patch.modules_to_save(model)) == saved
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert config == untouched


def test_gpt2s_layers_are_those_that_peft_chooses_where_it_takes_linear_layers_only():
    config = peft.C3AConfig(target_modules=["c_attn", "mlp.c_proj"], block_size=16)
    with pytest.raises(TypeError, match="Conv1D"):
        peft.get_peft_model(gpt2(), copy.deepcopy(config))
    chosen = [
        name
        for name, _ in gpt2().named_modules()
        if peft.tuners.tuners_utils.check_target_module_exists(config, name)
    ]
    model = c3a.patch_model(gpt2(), config)
    assert [n for n, m in model.named_modules() if isinstance(m, c3a.C3ALinear)] == chosen
    assert len(chosen) == 4
    usual = c3a.patch_model(gpt2(), peft.C3AConfig(block_size=16))
    assert [layer.name for layer in c3a.summary(usual).layers] == chosen[1::2]


@pytest.mark.parametrize(
    ("init_weights", "init", "spread"),
    [
        (True, "zeros", 0.0),
        (False, "xavier_uniform", math.sqrt(2 / 48)),
        ("xavier_uniform", "xavier_uniform", math.sqrt(2 / 48)),
        ("kaiming_uniform", "kaiming_uniform", math.sqrt(1 / 72)),
        ("gaussian", "gaussian", 1.0),
    ],
)
def test_initial_values_by_every_spelling(init_weights, init, spread):
    config = peft.C3AConfig(target_modules="all-linear", block_size=1, init_weights=init_weights)
    model = c3a.patch_model(nn.Sequential(nn.Linear(24, 24)), config=config)
    assert model[0].init == init
    assert model[0].c3a_kernel.detach().std().item() == pytest.approx(spread, rel=0.1)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(24, 24)), config).base_model.model[0]
    assert theirs.c3a_kernel["default"].detach().std().item() == pytest.approx(spread, rel=0.1)


def test_scripts_of_the_two_libraries_differ_by_one_line():
    ids = torch.arange(12).view(2, 6)
    config = peft.C3AConfig(task_type="SEQ_CLS", target_modules=["query"], block_size=12)
    model = bert().eval()
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    torch.manual_seed(1)
    ours = c3a.patch_model(model, config)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


def test_what_a_configuration_names_as_task_is_saved(tmp_path):
    config = peft.C3AConfig(task_type="SEQ_CLS", target_modules=["query"], block_size=12)
    model = c3a.patch_model(bert(), config)
    for expected, arguments in (("SEQ_CLS", {}), ("TOKEN_CLS", {"task_type": "TOKEN_CLS"})):
        c3a.save_adapter(model, tmp_path, **arguments)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == expected
    c3a.save_adapter(model, tmp_path)
    x = torch.arange(6)[None]
    loaded = c3a.load_adapter(
        copy.deepcopy(c3a.unpatch_model(copy.deepcopy(model))), tmp_path
    ).eval()
    assert torch.equal(loaded(x).logits, model.eval()(x).logits)


def test_modules_are_excluded_as_a_newer_peft_does():
    @dataclasses.dataclass
    class Newer(peft.C3AConfig):
        exclude_modules: list[str] | str | None = None

    for excluded in (["layer.1.attention.self.query"], r".*layer\.1\..*"):
        config = Newer(target_modules=["query"], block_size=12, exclude_modules=excluded)
        layers = c3a.summary(c3a.patch_model(bert(), config)).layers
        assert [layer.name.split(".")[3] for layer in layers] == ["0", "2"]


@dataclasses.dataclass
class Dropout(peft.C3AConfig):
    c3a_dropout: float = 0.0


def snapshot(model):
    return {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        ({"bias": "all"}, ValueError, "C3AConfig.bias: expected 'none', .* got 'all'"),
        ({"bias": "c3a_only"}, ValueError, "C3AConfig.bias: .* got 'c3a_only'"),
        ({"inference_mode": True}, ValueError, r"C3AConfig.inference_mode: .*c3a\.load_adapter"),
        ({"init_weights": "svd"}, ValueError, "C3AConfig.init_weights: expected one of .*'svd'"),
        ({"init_weights": None}, ValueError, "C3AConfig.init_weights: .* got None"),
        ({"init_weights": 1}, ValueError, "C3AConfig.init_weights: .* got 1"),
        ({"block_size": 5}, ValueError, "query: block_size 5 does not divide in_features = 24"),
        (
            {"block_size": None},
            ValueError,
            "C3AConfig.block_size: expected a whole number >= 1, got None",
        ),
        ({"block_size_pattern": {"(": 2}}, ValueError, "C3AConfig.block_size_pattern: .*'\\('"),
        ({"modules_to_save": ["head"]}, ValueError, "modules_to_save: no module is named 'head'"),
        ({"target_modules": ["quary"]}, ValueError, r"target_modules: .*\{'quary'\} matches none"),
        ({"target_modules": ["LayerNorm"]}, TypeError, "is a LayerNorm, which has no in and out"),
        ({"layers_to_transform": [9]}, ValueError, "C3AConfig.target_modules: .* matches none"),
        (Dropout(target_modules=["query"], c3a_dropout=0.1), ValueError, "c3a_dropout: .* got 0.1"),
        (peft.LoraConfig(target_modules=["query"]), TypeError, "to be a C3AConfig, got a LoraCon"),
        (peft.PromptTuningConfig(), TypeError, "to be a C3AConfig, got a PromptTuningConfig"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name_and_changes_nothing(config, error, said):
    if isinstance(config, dict):
        config = peft.C3AConfig(**{"target_modules": ["query"], "block_size": 6, **config})
    model, untouched = bert(), copy.deepcopy(config)
    before = snapshot(model)
    for arguments in ({"target_modules": config}, {"config": config}):
        with pytest.raises(error, match=said) as caught:
            c3a.patch_model(model, **arguments)
        assert str(caught.value).startswith("c3a.patch_model: ")
        assert "\n" not in str(caught.value)
    assert snapshot(model) == before
    assert config == untouched


def test_a_model_of_no_known_type_needs_target_modules():
    with pytest.raises(ValueError, match="C3AConfig.target_modules: .* for models of type None"):
        c3a.patch_model(Plain(), peft.C3AConfig(block_size=4))


@pytest.mark.parametrize(
    "more",
    [
        {"block_size": 6},
        {"rank": 4},
        {"init": "gaussian"},
        {"modules_to_save": ["score"]},
        {"target_modules": ["query"]},
    ],
)
def test_what_the_configuration_says_is_not_said_twice(more):
    config = peft.C3AConfig(target_modules=["query"], block_size=6)
    (name,) = more
    with pytest.raises(TypeError, match=rf"expected config alone to say .*, got {name} too$"):
        c3a.patch_model(Plain(), config=config, **more)
    with pytest.raises(TypeError, match="expected one config, got two"):
        c3a.patch_model(Plain(), config, config=config)
    with pytest.raises(TypeError, match="expected target_modules to be a list .* got None"):
        c3a.patch_model(Plain())


def test_what_the_configuration_does_not_say_may_be_said():
    config = peft.C3AConfig(target_modules=["query"], block_size=6)
    model = c3a.patch_model(Plain(), config, scale=0.5, dtype=torch.float64)
    assert model.query.scale == 0.5
    assert model.query.c3a_kernel.dtype == torch.float64


def test_the_package_is_imported_without_peft():
    code = "import sys, c3a; assert 'peft' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
