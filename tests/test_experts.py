"""Experts whose matrices are parameters of three dimensions: what is skipped is said."""

import re
import warnings

import pytest
import torch
import transformers
from torch import nn

import c3a

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))


def qwen3():
    config = transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8
    )
    return transformers.Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize(("make", "width"), [(mixtral, 24), (qwen3, 8)])
def test_all_linear_says_once_which_experts_it_skips_and_what_to_do(make, width):
    model = make()
    with pytest.warns(UserWarning, match="c3a") as caught:
        c3a.patch_model(model, "all-linear", 4)
    (warning,) = caught
    assert warning.filename == __file__
    said = str(warning.message)
    assert "\n" not in said
    assert "'all-linear' skips 4 parameters" in said
    experts = "model.layers.*.mlp.experts"
    assert f"{experts}.gate_up_proj (2, of shape (4, {2 * width}, 16))" in said
    assert f"{experts}.down_proj (2, of shape (4, 16, {width}))" in said
    for way_out in ("target_modules", "target_parameters", "modules_to_save"):
        assert way_out in said
    assert {layer.name.rpartition(".")[2] for layer in c3a.summary(model).layers} == {
        *("q_proj", "k_proj", "v_proj", "o_proj")
    }


def test_peft_s_configuration_says_so_too():
    peft = pytest.importorskip("peft")
    with pytest.warns(UserWarning, match="skips 4 parameters"):
        c3a.patch_model(mixtral(), peft.C3AConfig(target_modules="all-linear", block_size=4))


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (["q_proj", "v_proj"], {}),
        (r".*_proj", {}),
        ("all-linear", {"modules_to_save": ["experts"]}),
    ],
)
def test_nothing_is_said_where_layers_are_named_or_the_experts_are_trained(targets, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = c3a.patch_model(mixtral(), targets, 4, **options)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("experts" in name for name in trained) == bool(options)


def test_parameters_of_three_dimensions_that_are_no_experts_are_not_named():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.zeros(1, 4, 8))
            self.convolution = nn.Conv1d(8, 8, 3)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3))
            self.linear = nn.Linear(8, 8)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c3a.patch_model(Embedded(), "all-linear", 4)


def test_many_kinds_of_experts_are_counted_not_listed():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)
            for number in range(5):
                self.register_parameter(f"w{number}", nn.Parameter(torch.zeros(2, 8, 8)))

    said = re.escape("skips 5 parameters") + r".*w0 \(1, .*w2 \(1, .*\)\), and 2 more; "
    with pytest.warns(UserWarning, match=said):
        c3a.patch_model(Experts(), "all-linear", 4)


@pytest.mark.parametrize("target", ["gate_up_proj", "mlp.experts.gate_up_proj"])
def test_a_target_that_is_a_parameter_is_called_one(target):
    said = rf"no module is named '{target}' \({target} is a parameter of shape \(4, 48, 16\)"
    with pytest.raises(ValueError, match=said):
        c3a.patch_model(mixtral(), ["q_proj", target], 4)
