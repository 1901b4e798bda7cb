"""param_groups: what an optimizer is given, of our models and of PEFT's."""

import copy

import pytest
import torch
from torch import nn

import c3a


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.query(x))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm((1, 8))
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.norm(x[:, None])).squeeze(1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()
        self.head = Head()

    def forward(self, x):
        return self.head(self.block(x))


def patched(**options):
    return c3a.patch_model(Model(), ["query"], 4, **{"modules_to_save": ["head"], **options})


def names(groups):
    return {group["name"]: group["param_names"] for group in groups}


def test_each_trainable_parameter_is_in_one_group_with_its_rate_and_decay():
    model = patched()
    groups = c3a.param_groups(model, 0.3, 0.005, 0.1, kernel_weight_decay=0.01)
    assert names(groups) == {
        "adapter": ["block.query.c3a_kernel"],
        "head": ["head.out.weight"],
        "no_decay": ["head.norm.weight", "head.norm.bias", "head.out.bias"],
    }
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (0.3, 0.01),
        (0.005, 0.1),
        (0.005, 0.0),
    ]
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert parameter is model.get_parameter(name)


def test_nothing_decays_by_default():
    assert {group["weight_decay"] for group in c3a.param_groups(patched(), 0.3)} == {0.0}
    adamw = torch.optim.AdamW(c3a.param_groups(patched(), 0.3))
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.0}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_an_optimizer_takes_the_groups_and_keeps_their_names(kind):
    model = patched()
    optimizer = kind(c3a.param_groups(model, 0.3, 0.005))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for group in names(optimizer.param_groups).values() for name in group}
    state = optimizer.state_dict()
    again = kind(c3a.param_groups(copy.deepcopy(model), 0.1))
    again.load_state_dict(state)
    assert names(again.param_groups) == names(optimizer.param_groups)
    assert again.param_groups[0]["lr"] == 0.3


def test_a_head_without_a_rate_of_its_own_has_an_ordinary_one():
    for groups in (c3a.param_groups(patched(), 0.3), c3a.param_groups(patched(), 0.3, None)):
        assert [group["lr"] for group in groups] == [0.3, 1e-3, 1e-3]


def test_groups_that_would_be_empty_are_left_out():
    assert list(names(c3a.param_groups(patched(modules_to_save=()), 0.3))) == ["adapter"]
    model = patched()
    model.block.query.c3a_kernel.requires_grad_(False)
    assert list(names(c3a.param_groups(model, 0.3))) == ["head", "no_decay"]


def test_what_was_set_free_after_the_patch_is_trained_too():
    model = patched(modules_to_save=())
    model.block.norm.requires_grad_(True)
    assert names(c3a.param_groups(model, 0.3))["no_decay"] == [
        "block.norm.weight",
        "block.norm.bias",
    ]


@pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")
def test_models_of_peft_have_the_same_groups():
    import peft

    config = peft.C3AConfig(target_modules=["query"], block_size=4, modules_to_save=["head"])
    model = peft.get_peft_model(Model(), config)
    groups = c3a.param_groups(model, 0.3, 0.005)
    prefix = "base_model.model."
    assert names(groups) == {
        "adapter": [f"{prefix}block.query.c3a_kernel.default"],
        "head": [f"{prefix}head.modules_to_save.default.out.weight"],
        "no_decay": [
            f"{prefix}head.modules_to_save.default.{name}"
            for name in ("norm.weight", "norm.bias", "out.bias")
        ],
    }
    model.add_adapter("other", config)
    model.set_adapter("other")
    assert names(c3a.param_groups(model, 0.3))["adapter"] == [
        f"{prefix}block.query.c3a_kernel.other"
    ]
    lora = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["query"], r=2))
    with pytest.raises(ValueError, match="with C3A adapters, got a PeftModel without one"):
        c3a.param_groups(lora, 0.3)


def test_wrapped_models_have_groups_too():
    groups = c3a.param_groups(nn.DataParallel(patched()), 0.3)
    assert names(groups)["adapter"] == ["module.block.query.c3a_kernel"]


def test_a_model_without_adapters_or_with_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="got a Model without one; call c3a.patch_model first"):
        c3a.param_groups(Model(), 0.3)
    with pytest.raises(ValueError, match="nothing is trainable: every parameter"):
        c3a.param_groups(patched().requires_grad_(False), 0.3)


@pytest.mark.parametrize("argument", ["lr", "head_lr", "weight_decay", "kernel_weight_decay"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "auto"])
def test_rates_and_decays_are_numbers(argument, value):
    with pytest.raises(ValueError, match=f"expected {argument} to be a finite number >= 0, got"):
        c3a.param_groups(patched(), **{"lr": 0.3, argument: value})


def test_a_scale_ten_times_as_large_with_a_tenth_of_the_rate_trains_the_same():
    torch.manual_seed(1)
    first, x = Model().double(), torch.randn(16, 8, dtype=torch.float64)
    outputs = []
    for factor in (1, 10):
        model = c3a.patch_model(
            copy.deepcopy(first), ["query"], 4, scale=factor / 8, dtype=torch.float64
        )
        optimizer = torch.optim.AdamW(c3a.param_groups(model, 0.3 / factor), eps=1e-30)
        for _ in range(20):
            optimizer.zero_grad()
            model(x).logsumexp(-1).square().mean().backward()
            optimizer.step()
        outputs.append(model(x).detach())
    assert not torch.allclose(outputs[0], first(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-9)
