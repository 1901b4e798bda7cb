"""PEFT's own C3A layers, as PEFT makes them and accelerated: what its users rely on.

``plain`` and ``accelerated`` run the same test; what PEFT itself gets wrong runs accelerated only.
"""

import contextlib
import copy
import doctest
import io
import pickle
import subprocess
import sys
import threading
import warnings
import weakref

import peft
import pytest
import safetensors.torch
import torch
from peft.tuners.c3a import layer as their_layer
from peft.tuners.c3a import model as their_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import c3a
import c3a.peft
from c3a.memory import saved_for_backward
from cases import Net, relative_error


def config(block_size=4, **options):
    options = {"target_modules": ["down", "up"], "init_weights": "gaussian", **options}
    return peft.C3AConfig(block_size=block_size, **options)


def made(adapters=("default",), **options):
    model = peft.get_peft_model(Net(), config(**options))
    for number, name in enumerate(adapters[1:]):
        model.add_adapter(name, config((2, 12)[number % 2], **options))
    return model


@pytest.fixture(params=["plain", "accelerated"])
def how(request):
    with c3a.peft.accelerate() if request.param == "accelerated" else contextlib.nullcontext():
        yield request.param


@pytest.fixture
def accelerated():
    with c3a.peft.accelerate():
        yield


def layers(model):
    return [m for m in model.modules() if isinstance(m, their_layer.C3ALinear)]


def dense(layer, x, *names):
    """The definition in the layer's own dtype: the base and the sum of the adapters."""
    y = layer.get_base_layer()(x)
    for name in names:
        matrix = c3a.circulant(layer.c3a_kernel[name].double()).to(x.dtype)
        y = y + x @ matrix.T / layer.in_features
    return y


def of_net(model, x, *names):
    """The definition of a whole ``Net``."""
    net = model.base_model.model
    x = dense(net.up, dense(net.down, x, *names).relu(), *names).relu()
    return net.head(x)


def assert_near(got, expected, tolerance=1e-4):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# What PEFT states of every method, with and without


def test_it_computes_the_base_and_the_adapter(how):
    model, x = made(), torch.randn(5, 24)
    kind = "AcceleratedC3ALinear" if how == "accelerated" else "C3ALinear"
    assert {type(layer).__name__ for layer in layers(model)} == {kind}
    assert_near(model(x), of_net(model, x, "default"))


def test_zeros_leave_the_model_as_it_was(how):
    net, x = Net(), torch.randn(5, 24)
    expected = net(x)
    assert_near(peft.get_peft_model(net, config(init_weights=True))(x), expected, 1e-6)


def test_only_adapters_and_modules_to_save_are_trained(how):
    model = made(modules_to_save=["head"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        model(torch.randn(5, 24)).square().sum().backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "c3a_kernel" in name or "modules_to_save" in name}


def test_disabling_gives_the_base_model(how):
    net, x = Net(), torch.randn(5, 24)
    expected = net(x)
    model = peft.get_peft_model(net, config())
    adapted = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), adapted)


def test_adapters_are_added_set_and_deleted(how):
    model, x = made(("default", "other")), torch.randn(5, 24)
    assert_near(model(x), of_net(model, x, "default"))
    model.set_adapter("other")
    assert_near(model(x), of_net(model, x, "other"))
    assert {p.shape[-1] for p in model.parameters() if p.dim() == 3 and p.requires_grad} == {2}
    model.delete_adapter("default")
    assert {name for layer in layers(model) for name in layer.c3a_kernel} == {"other"}
    assert_near(model(x), of_net(model, x, "other"))


@pytest.mark.parametrize("safe", [False, True])
def test_merging_and_unmerging_keep_the_function(how, safe):
    model, x = made(), torch.randn(5, 24)
    expected = model(x)
    base = copy.deepcopy(model.base_model.model.down.base_layer)
    model.merge_adapter(safe_merge=safe)
    assert_near(model(x), expected)
    assert not torch.equal(base.weight, model.base_model.model.down.base_layer.weight)
    model.unmerge_adapter()
    assert_near(model(x), expected)
    assert_near(model.base_model.model.down.base_layer.weight, base.weight, 1e-6)


def test_merging_one_adapter_of_two(how):
    model, x = made(("default", "other")), torch.randn(5, 24)
    expected = of_net(model, x, "other")
    model.merge_adapter(adapter_names=["other"])
    assert_near(model(x), expected)
    assert layers(model)[0].merged_adapters == ["other"]


def test_unloading_with_and_without_merging(how):
    model, x = made(), torch.randn(5, 24)
    expected = model(x)
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged.down) is nn.Linear
    assert_near(merged(x), expected)
    base = model.unload()
    assert type(base.down) is nn.Linear
    assert not torch.allclose(base(x), expected)


def test_a_broken_adapter_is_not_merged_safely(how):
    model = made()
    before = model.base_model.model.down.base_layer.weight.detach().clone()
    with torch.no_grad():
        layers(model)[0].c3a_kernel["default"][0, 0, 0] = float("nan")
    with pytest.raises(
        ValueError, match="NaNs detected in the merged weights. The adapter default"
    ):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.base_model.model.down.base_layer.weight, before)


def test_merging_twice_and_unmerging_twice_is_said(how):
    model = made()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        layers(model)[0].merge()
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged. Nothing to do"):
        layers(model)[0].unmerge()


@pytest.mark.parametrize("low", [False, True])
def test_adapters_are_saved_and_loaded(how, low, tmp_path):
    model, x = made(modules_to_save=["head"]), torch.randn(5, 24)
    net = copy.deepcopy(model.unload())
    model = peft.get_peft_model(copy.deepcopy(net), config(modules_to_save=["head"]))
    expected = model(x)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(net, tmp_path, low_cpu_mem_usage=low)
    assert torch.equal(loaded(x), expected)
    loaded.load_adapter(tmp_path, adapter_name="again", low_cpu_mem_usage=low)
    loaded.set_adapter("again")
    assert torch.equal(loaded(x), expected)


def test_files_of_the_two_are_the_same(tmp_path):
    model = made()
    model.save_pretrained(tmp_path / "plain")
    c3a.peft.accelerate(model)
    model.save_pretrained(tmp_path / "accelerated")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, other = ((tmp_path / kind / name).read_bytes() for kind in ("plain", "accelerated"))
        assert one == other


def test_the_state_is_that_of_the_other(how):
    model, other = made(), made()
    assert not other.load_state_dict(model.state_dict()).missing_keys
    x = torch.randn(5, 24)
    assert torch.equal(model(x), other(x))


def test_weights_of_an_adapter_are_swapped_in_place(how):
    model, other, x = made(), made(), torch.randn(5, 24)
    expected = peft.get_peft_model(copy.deepcopy(model.unload()), config())
    peft.set_peft_model_state_dict(expected, peft.get_peft_model_state_dict(other))
    model = peft.get_peft_model(copy.deepcopy(expected).unload(), config()).eval()
    with torch.no_grad():
        assert not torch.allclose(model(x), expected(x))  # prepares kernels
        peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(expected))
        assert_near(model(x), expected(x), 1e-6)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_models_are_copied_and_pickled(how, copied):
    model, x = made(), torch.randn(5, 24)
    with torch.no_grad():
        expected = model(x)
    model.merge_adapter()
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    model.unmerge_adapter()
    twin.unmerge_adapter()
    assert_near(twin(x), expected)
    assert type(layers(twin)[0]) is type(layers(model)[0])
    assert_near(layers(twin)[0].base_layer.weight, layers(model)[0].base_layer.weight, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precisions(how, dtype):
    model = peft.get_peft_model(Net().to(dtype), config())
    x = torch.randn(5, 24, dtype=dtype)
    y = model(x)
    assert y.dtype == dtype
    assert layers(model)[0].c3a_kernel["default"].dtype == torch.float32
    y.float().sum().backward()
    assert relative_error(y.detach(), of_net(model.double(), x.double(), "default")) < 2e-2


def test_the_text_of_a_model_names_its_layers(how):
    text = repr(made())
    assert "c3a." in text
    assert "(c3a_kernel): ParameterDict(" in text


def test_gradient_checkpointing_gives_the_same_gradients(how):
    model, x = made(), torch.randn(5, 24, requires_grad=True)
    kernels = [p for p in model.parameters() if p.requires_grad]
    of = (x, *kernels)
    straight = torch.autograd.grad(model(x).sum(), of)
    again = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).sum(), of)
    for one, other in zip(straight, again, strict=True):
        assert torch.equal(one, other)


def test_the_kernels_gradient_is_the_same_for_both():
    model, x = made(target_modules=["up"]), torch.randn(5, 24)
    (kernel,) = (p for p in model.parameters() if p.requires_grad)
    grads = []
    for manager in (contextlib.nullcontext(), c3a.peft.accelerate(model)):
        with manager:
            grads += torch.autograd.grad(model(x).square().sum(), kernel)
    assert_near(*grads)


def test_targets_by_expression_pattern_and_layer(how):
    sizes = config(block_size_pattern={"up": 12}, target_modules=r".*(down|up)")
    model, x = peft.get_peft_model(Net(), sizes), torch.randn(5, 24)
    assert [layer.block_size["default"] for layer in layers(model)] == [4, 12]
    assert_near(model(x), of_net(model, x, "default"))


def test_which_adapter_is_active_is_told_by_the_model_and_its_layers(how):
    model = made(("default", "other"))
    assert model.active_adapters == ["default"]
    model.set_adapter("other")
    assert model.active_adapter == "other"
    model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default", "other"]
    assert all(layer.active_adapters == ["default", "other"] for layer in layers(model))


def test_adapters_of_different_layers_are_active_together_and_merged_together(how):
    model, x = made(target_modules=["down"]), torch.randn(5, 24)
    model.add_adapter("other", config(2, target_modules=["up"]))
    model.base_model.set_adapter(["default", "other"])
    expected = of_net_by_layer(model, x, down=("default",), up=("other",))
    assert_near(model(x), expected)
    model.merge_adapter()
    assert_near(model(x), expected)
    model.unmerge_adapter()
    assert_near(model(x), expected)
    model.set_adapter("other")
    assert_near(model(x), of_net_by_layer(model, x, up=("other",)))
    assert_near(model.merge_and_unload(adapter_names=["default", "other"])(x), expected)


def of_net_by_layer(model, x, down=(), up=()):
    net = model.base_model.model
    hidden = [getattr(net, name) for name in ("down", "up")]
    for layer, names in zip(hidden, (down, up), strict=True):
        adapted = isinstance(layer, their_layer.C3ALinear)
        x = (dense(layer, x, *names) if adapted else layer(x)).relu()
    return net.head(x)


def test_gradients_are_wanted_for_the_active_adapter_alone(how):
    model = made(("default", "other"), modules_to_save=["head"])

    def trained():
        return {
            name.split(".")[-1 - ("head" in name)]
            for name, p in model.named_parameters()
            if p.requires_grad
        }

    assert trained() == {"default"}
    model.set_adapter("other")
    assert trained() == {"other"}
    model.set_adapter("default", inference_mode=True)
    assert trained() == set()


@pytest.mark.parametrize("trainable", [False, True])
def test_a_loaded_adapter_is_trained_if_asked_for(how, trainable, tmp_path):
    made(modules_to_save=["head"]).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(Net(), tmp_path, is_trainable=trainable)
    assert any(p.requires_grad for p in model.parameters()) == trainable
    model.load_adapter(tmp_path, "again", is_trainable=trainable)
    model.set_adapter("again", inference_mode=not trainable)
    assert any(p.requires_grad for p in model.parameters()) == trainable


def test_deleting_the_last_adapter_leaves_the_base(how):
    net, x = Net(), torch.randn(5, 24)
    expected = net(x)
    model = peft.get_peft_model(net, config())
    model.add_adapter("other", config(2))
    model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert {name for layer in layers(model) for name in layer.block_size} == {"default"}
    with pytest.raises(ValueError, match="Adapter absent does not exist"):
        model.delete_adapter("absent")
    model.delete_adapter("default")
    assert model.active_adapters == []
    assert torch.equal(model.base_model(x), expected)


def test_a_merged_adapter_is_not_deleted(how):
    model, x = made(("default", "other")), torch.randn(5, 24)
    model.merge_adapter()
    expected = model(x)
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(model(x), expected)


def test_disabling_within_disabling_and_of_a_disabled_model_leaves_it_as_it_was(how):
    model, x = made(), torch.randn(5, 24)
    adapted = model(x)
    with model.disable_adapter():
        base = model(x)
        with model.disable_adapter():
            pass
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), adapted)
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(model(x), base)
    model.base_model.enable_adapter_layers()
    assert torch.equal(model(x), adapted)


def test_a_merged_adapter_is_disabled_too(how):
    net, x = Net(), torch.randn(5, 24)
    base = net(x)
    model = peft.get_peft_model(net, config())
    adapted = model(x)
    model.merge_adapter()
    with model.disable_adapter():
        assert_near(model(x), base)
    assert_near(model(x), adapted)


@pytest.mark.parametrize("names", [["default"], ["other"], ["other", "default"]], ids=str)
def test_named_adapters_are_merged_whichever_is_active(how, names):
    model, x = made(("default", "other")), torch.randn(5, 24)
    expected = of_net(model, x, *names)
    assert_near(copy.deepcopy(model).merge_and_unload(adapter_names=names)(x), expected)
    for name in names:  # one after the other is the same
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.merge_adapter(adapter_names=[name])
    assert_near(model(x), expected)
    before = [layer.get_base_layer().weight.clone() for layer in layers(model)]
    model.unmerge_adapter()
    for layer, merged in zip(layers(model), before, strict=True):
        delta = sum(layer.get_delta_weight(name) for name in names)
        assert_near(merged - layer.get_base_layer().weight, delta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_merging_in_half_precision(how, dtype):
    model, x = peft.get_peft_model(Net().to(dtype), config()), torch.randn(5, 24, dtype=dtype)
    expected = model(x)
    merged = model.merge_and_unload(safe_merge=True)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert relative_error(merged(x).detach(), expected.detach()) < 4e-2


def test_merged_weights_are_saved_and_pickled_as_those_of_a_plain_model(how, tmp_path):
    model, x = made(), torch.randn(5, 24)
    merged = model.merge_and_unload(safe_merge=True)
    safetensors.torch.save_file(merged.state_dict(), tmp_path / "model.safetensors")
    plain = Net()
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert torch.equal(plain(x), merged(x))
    assert torch.equal(pickle.loads(pickle.dumps(merged))(x), merged(x))


def test_merging_in_training_gives_the_same_each_time(how):
    model = made().train()
    if how == "accelerated":
        c3a.peft.accelerate(model, dropout=0.5)
    merged = [copy.deepcopy(model).merge_and_unload().state_dict() for _ in range(2)]
    assert all(torch.equal(merged[0][key], merged[1][key]) for key in merged[0])


@pytest.mark.parametrize("safe", [False, True])
def test_chosen_adapters_are_saved_each_in_its_folder(how, safe, tmp_path):
    names = ("default", "default2", "efaul")  # parts of each other
    model, x = made(names, modules_to_save=["head"]), torch.randn(5, 24)
    model.save_pretrained(tmp_path / "all", safe_serialization=safe)
    model.save_pretrained(tmp_path / "one", safe_serialization=safe, selected_adapters=["efaul"])
    file = "adapter_model.safetensors" if safe else "adapter_model.bin"
    for path in ("all", "all/default2", "all/efaul", "one/efaul"):
        assert (tmp_path / path / file).exists()
    assert not (tmp_path / "one" / file).exists()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model.unload()), tmp_path / "all")
    for name in names[1:]:
        loaded.load_adapter(tmp_path / "all" / name, name)
    for name in names:
        for key, value in peft.get_peft_model_state_dict(model, adapter_name=name).items():
            assert torch.equal(
                peft.get_peft_model_state_dict(loaded, adapter_name=name)[key], value
            )
    assert loaded(x).shape == (5, 4)


def test_adapters_are_injected_without_a_peft_model(how):
    net, x = Net(), torch.randn(5, 24)
    model = peft.inject_adapter_in_model(config(), copy.deepcopy(net))
    assert len(layers(model)) == 2
    twin = peft.inject_adapter_in_model(config(), copy.deepcopy(net), low_cpu_mem_usage=True)
    assert {p.device.type for n, p in twin.named_parameters() if "c3a" in n} == {"meta"}
    state = peft.get_peft_model_state_dict(model)
    result = peft.set_peft_model_state_dict(twin, state, low_cpu_mem_usage=True)
    assert not result.unexpected_keys
    assert torch.equal(twin(x), model(x))


def test_loading_with_little_memory_leaves_nothing_on_the_meta_device(how, tmp_path):
    made().save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(Net(), tmp_path, low_cpu_mem_usage=True)
    model.load_adapter(tmp_path, adapter_name="other", low_cpu_mem_usage=True)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model(torch.randn(5, 24)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapters_are_float32_or_of_the_bases_dtype_as_asked(how, dtype, tmp_path):
    for autocast, expected in ((True, torch.float32), (False, dtype)):
        common = {"autocast_adapter_dtype": autocast}
        model = peft.get_peft_model(Net().to(dtype), config(), **common)
        model.add_adapter("added", config(2), **common)
        model.save_pretrained(tmp_path)
        model.load_adapter(tmp_path, "loaded", **common)
        dtypes = {k.dtype for layer in layers(model) for k in layer.c3a_kernel.values()}
        assert dtypes == {expected}
        y = model(torch.randn(5, 24, dtype=dtype))
        assert y.dtype == dtype
        y.float().sum().backward()
        kernel = layers(model)[0].c3a_kernel["default"]
        assert kernel.grad.dtype == expected


def test_modules_to_save_go_with_their_adapter(how):
    net, x = Net(), torch.randn(5, 24)
    expected = net(x)
    model = peft.get_peft_model(net, config(init_weights=True, modules_to_save=["head"]))
    model.add_adapter("other", config(init_weights=True))
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.mul_(2)
    assert not torch.allclose(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    model.set_adapter("other")
    assert_near(model(x), expected)
    model.set_adapter("default")
    merged = model.merge_and_unload()
    assert not torch.allclose(merged(x), expected)
    assert type(merged.head) is nn.Linear


def test_two_adapters_may_not_save_the_same_module(how):
    model = made(("default", "other"), modules_to_save=["head"])
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        model.base_model.set_adapter(["default", "other"])


@pytest.mark.skipif(not hasattr(peft, "get_base_model_state_dict"), reason="an older PEFT")
def test_the_base_models_state_is_read_and_written_through_the_adapters(how):
    net = Net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    model = peft.get_peft_model(net, config(modules_to_save=["head"]))
    other = Net().state_dict()
    for expected in (before, other):
        result = peft.set_base_model_state_dict(model, expected, strict=False)
        assert not result.missing_keys + result.unexpected_keys
        got = peft.get_base_model_state_dict(model)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in got)


def test_layers_are_chosen_by_number(how):
    net = nn.ModuleDict({"layers": nn.ModuleList(Net() for _ in range(3))})
    chosen = config(target_modules=["down"], layers_to_transform=[0, 2], layers_pattern="layers")
    model = peft.get_peft_model(net, chosen)
    found = [name for name, m in model.named_modules() if isinstance(m, their_layer.C3ALinear)]
    assert [name.split(".")[-2] for name in found] == ["0", "2"]


def test_a_block_size_that_divides_no_side_is_said(how):
    for target, which in (("down", "output"), ("head", "output"), ("up", "input")):
        with pytest.raises(ValueError, match=f"should be a factor of the {which} size"):
            peft.get_peft_model(
                Net(), config(8 if which == "output" else 24, target_modules=[target])
            )


@pytest.mark.parametrize("bias", ["all", "c3a_only"])
def test_biases_are_trained_as_asked(how, bias):
    model, x = made(bias=bias), torch.randn(5, 24)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    biases = {
        "down.base_layer.bias",
        "up.base_layer.bias",
        *(["head.bias"] if bias == "all" else []),
    }
    assert {n.removeprefix("base_model.model.") for n in changed if "c3a" not in n} == biases
    assert_near(model(x), of_net(model, x, "default"))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_language_model_trains_with_checkpoints_and_generates(how, reentrant, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 50}
    net = LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0))
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(copy.deepcopy(net), config(8, **targets)).train()
    ids = torch.randint(1, 50, (2, 7))

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    straight = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = gradients()
    assert len(straight) == 6
    for name in straight:
        assert_near(again[name], straight[name])
    model.gradient_checkpointing_disable()
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(net, tmp_path)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        loaded.generate(input_ids=ids, **options), model.generate(input_ids=ids, **options)
    )
    assert_near(loaded(inputs_embeds=loaded.get_input_embeddings()(ids)).logits, model(ids).logits)
    assert loaded.to(torch.bfloat16).generate(ids, **options).shape == (2, 11)


@pytest.mark.skipif(not hasattr(peft, "convert_to_lora"), reason="an older PEFT")
def test_peft_converts_an_adapter_to_lora(how):
    model, x = made(target_modules=["down"]), torch.randn(5, 24)
    expected = model(x)
    lora_config, state = peft.convert_to_lora(model, rank=12)
    twin = peft.get_peft_model(model.unload(), lora_config)
    assert not peft.set_peft_model_state_dict(twin, state).unexpected_keys
    assert_near(twin(x), expected, 1e-3)


# What PEFT gets wrong, accelerated


@pytest.mark.parametrize("names", [("default",), ("default", "other", "third")])
def test_gradients_of_active_adapters_are_right_in_float64(accelerated, names):
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 4)), config(target_modules=["0"]))
    for name, block_size in zip(names[1:], (2, 1), strict=False):
        model.add_adapter(name, config(block_size, target_modules=["0"]))
    model.base_model.set_adapter(list(names))
    layer = layers(model.double())[0]
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    kernels = [layer.c3a_kernel[name].detach().requires_grad_() for name in names]

    def call(x, *kernels):
        given = {f"c3a_kernel.{n}": k for n, k in zip(names, kernels, strict=True)}
        return torch.func.functional_call(layer, given, x)

    assert_near(call(x, *kernels), dense(layer, x, *names), 1e-6)
    assert torch.autograd.gradcheck(call, (x, *kernels), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (x, *kernels))


def test_active_adapters_add_up_and_merge_so(accelerated):
    names = ("default", "other", "third")
    model, x = made(names), torch.randn(5, 24)
    model.base_model.set_adapter(list(names))
    expected = of_net(model, x, *names)
    assert_near(model(x), expected)
    with torch.no_grad():
        assert_near(model(x), expected)
    model.merge_adapter()
    assert_near(model(x), expected)


def test_the_first_is_one_node_with_the_base_and_the_others_are_added_in_place(accelerated):
    model = made(("default", "other"))
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.down
    x = torch.randn(64, 24, requires_grad=True)
    y = layer(x)
    assert y.grad_fn.name() == "BlockCircConvAddBackward"
    (first, _), *_ = y.grad_fn.next_functions
    assert first.name() == "BlockCircConvLinearBackward"
    with saved_for_backward(layer) as saved:
        layer(x)
    assert saved.total == x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_copy_of_the_input_is_kept(accelerated, dtype):
    model = peft.get_peft_model(Net().to(dtype), config())
    layer = model.base_model.model.down
    x = torch.randn(64, 24, dtype=dtype, requires_grad=True)
    with saved_for_backward(layer) as saved:
        layer(x)
    assert saved.total == x.nbytes


def test_a_deleted_adapter_leaves_no_prepared_kernel_behind(accelerated):
    model, x = made(("default", "other")).eval(), torch.randn(2, 24)
    with torch.no_grad():
        model(x, adapter_names=["default", "other"])
        model.set_adapter("other")
        model(x)
    found = [*layers(model)[0]._c3a_prepared.values(), *layers(model)[0]._c3a_stacks.values()]
    kept = [weakref.ref(prepared) for prepared in found]
    del found
    assert len(kept) == 3  # the active one, and a stack for each block size
    model.set_adapter("default")
    model.delete_adapter("other")
    assert not any(prepared() for prepared in kept)
    assert_near(model(x), of_net(model, x, "default"))


def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(accelerated):
    model = made()
    y = model(torch.ones(0, 24))
    y.sum().backward()
    assert y.shape == (0, 4)
    kernel = layers(model)[0].c3a_kernel["default"]
    assert torch.equal(kernel.grad, torch.zeros_like(kernel))


def test_autocast_gives_the_result_the_dtype_of_the_base(accelerated):
    model, x = made(), torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = model.base_model.model.down(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y.detach(), dense(model.base_model.model.down, x, "default")) < 2e-2
    y.float().sum().backward()
    assert layers(model)[0].c3a_kernel["default"].grad.dtype == torch.float32


@pytest.mark.parametrize("names", [("default",), ("default", "other")])
def test_layers_compile_whole(accelerated, names):
    model, x = made(names), torch.randn(5, 24)
    model.base_model.set_adapter(list(names))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(x).sum(), layers(model)[0].c3a_kernel["default"])
    (expected,) = torch.autograd.grad(model(x).sum(), layers(model)[0].c3a_kernel["default"])
    assert_near(got, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unmerging_restores_every_bit(accelerated, dtype):
    model = peft.get_peft_model(Net().to(dtype), config())
    model.add_adapter("other", config(block_size=2))
    bases = [layer.base_layer for layer in layers(model)]
    weights = [base.weight for base in bases]
    before = [weight.detach().clone() for weight in weights]
    model.merge_adapter()
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(adapter_names=["other"])
    layer = layers(model)[0]
    delta = sum(
        c3a.circulant(layer.c3a_kernel[name].double()) / 24 for name in ("default", "other")
    )
    exact = before[0].double() + delta
    error = (bases[0].weight.double() - exact).abs()
    assert (error <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-7).all()  # rounded once
    model.unmerge_adapter()
    assert [base.weight for base in bases] == weights
    assert all(map(torch.equal, weights, before))


def test_a_merged_model_that_moves_is_unmerged_to_what_it_was(accelerated):
    model = made()
    before = layers(model)[0].base_layer.weight.detach().clone()
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    assert torch.equal(layers(model)[0].base_layer.weight, before.double())


def test_what_peft_has_merged_is_subtracted_when_an_accelerated_layer_unmerges():
    model, x = made(), torch.randn(5, 24)
    expected = model(x)
    before = layers(model)[0].base_layer.weight.detach().clone()
    model.merge_adapter()
    c3a.peft.accelerate(model)
    model.unmerge_adapter()
    assert_near(layers(model)[0].base_layer.weight, before, 1e-6)
    assert_near(model(x), expected)


def test_the_delta_is_a_gather_without_a_transform(accelerated):
    layer = layers(made())[0]
    expected = c3a.circulant(layer.c3a_kernel["default"].double()) / 24
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        delta = layer.get_delta_weight("default")
    assert_near(delta.double(), expected, 1e-6)
    assert not any("fft" in event.name for event in record.events())
    with pytest.raises(ValueError, match="Adapter absent not found"):
        layer.get_delta_weight("absent")


# Rows with adapters of their own


def test_each_row_gets_its_own_adapter(accelerated):
    model = made(("default", "other", "third"), modules_to_save=["head"]).eval()
    rows = ["other", "default", "__base__", "other", "third"]
    x = torch.randn(5, 3, 24)
    got = model(x, adapter_names=rows)
    net = model.base_model.model
    for row, name in enumerate(rows):
        names = () if name == "__base__" else (name,)
        hidden = dense(net.up, dense(net.down, x[row], *names).relu(), *names).relu()
        head = net.head.modules_to_save[name] if names else net.head.original_module
        assert_near(got[row], head(hidden))
    assert_near(model(x), of_net(model, x, "default"))  # and no hook is left


ROWS = ["other", "default", "__base__", "other", "fourth"]


def four_adapters(**options):
    """A layer with adapters of two block sizes: 4 for default and third, 2 for other and fourth."""
    model = made(("default", "other"), **options).eval()
    model.add_adapter("third", config(4, **options))
    model.add_adapter("fourth", config(2, **options))
    return model, layers(model)[0]


def by_definition(layer, x, rows):
    """Rows one by one, in float64 from the base's result on."""
    base = layer.get_base_layer()(x)
    matrices = [
        c3a.circulant(layer.c3a_kernel[name].double()) / layer.in_features
        if name in layer.c3a_kernel
        else None
        for name in rows
    ]
    deltas = [0.0 if m is None else r.double() @ m.T for r, m in zip(x, matrices, strict=True)]
    return torch.stack([y + delta for y, delta in zip(base, deltas, strict=True)])


@contextlib.contextmanager
def operators_called():
    names = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        yield names
    names += [event.name for event in record.events() if event.name.startswith("c3a::")]


@pytest.mark.parametrize("leading", [(5,), (5, 3), (5, 2, 3), (5, 0)], ids=str)
def test_rows_of_adapters_are_one_call_for_each_block_size(accelerated, leading):
    _, layer = four_adapters()
    x = torch.randn(*leading, 24)
    with torch.inference_mode():
        got = layer(x, adapter_names=ROWS)  # prepares
        with operators_called() as called:
            again = layer(x, adapter_names=ROWS)
    assert called == ["c3a::block_circ_conv_many_prepared_add_"] * 2
    assert torch.equal(again, got)
    assert_near(got, by_definition(layer, x, ROWS).to(got.dtype))
    assert torch.equal(got[2], layer.get_base_layer()(x)[2])
    assert layer(x[:0], adapter_names=[]).shape == (0, *leading[1:], 12)


def test_what_is_prepared_for_rows_is_never_stale(accelerated):
    _, layer = four_adapters()
    x = torch.randn(5, 24)
    with torch.no_grad():
        for write in (
            lambda w: None,
            lambda w: w.mul_(2),
            lambda w: w.data.neg_(),
            lambda w: w.numpy().__imul__(3),
        ):
            write(layer.c3a_kernel["other"].detach())
            assert_near(layer(x, adapter_names=ROWS), by_definition(layer, x, ROWS).float())
        rows = ["third", "default", "third", "__base__", "other"]  # others of the same stacks
        assert_near(layer(x, adapter_names=rows), by_definition(layer, x, rows).float())
        assert_near(layer(x, adapter_names=ROWS), by_definition(layer, x, ROWS).float())


def test_a_graph_keeps_the_prepared_kernels_of_its_rows(accelerated):
    _, layer = four_adapters()
    layer.requires_grad_(False)
    x = torch.randn(5, 24, requires_grad=True)
    expected = torch.autograd.grad(by_definition(layer, x, ROWS).sum(), x)[0]
    y = layer(x, adapter_names=ROWS)
    with operators_called() as called:
        layer(x, adapter_names=["third", "default", "third", "__base__", "other"])
    assert "c3a::prepare" in called  # into the same stack
    layer.c3a_kernel["other"].data.mul_(2)
    layer(x, adapter_names=ROWS)
    assert_near(torch.autograd.grad(y.sum(), x)[0], expected)


@pytest.mark.parametrize("leading", [(5,), (5, 3)], ids=str)
def test_rows_give_their_adapters_gradients(accelerated, leading):
    model, layer = four_adapters()
    model.double()
    for kernel in layer.c3a_kernel.values():
        kernel.requires_grad_()
    x = torch.randn(*leading, 24, dtype=torch.float64, requires_grad=True)
    used = [layer.c3a_kernel[name] for name in ("default", "other", "fourth")]
    h = torch.randn(*leading, 12, dtype=torch.float64)
    with operators_called() as called:
        y = layer(x, adapter_names=ROWS)
    assert called.count("c3a::block_circ_conv_many_add_") == 2
    got = torch.autograd.grad(y, [x, *used], h)
    expected = torch.autograd.grad(by_definition(layer, x, ROWS), [x, *used], h)
    for ours, theirs in zip(got, expected, strict=True):
        assert_near(ours, theirs, 1e-12)
    unused = torch.autograd.grad(
        layer(x, adapter_names=ROWS).sum(), layer.c3a_kernel["third"], allow_unused=True
    )
    assert unused[0] is None


def test_a_base_that_keeps_its_result_keeps_it_when_rows_are_added(accelerated):
    _, layer = four_adapters()
    kept = []
    layer.get_base_layer().register_forward_hook(lambda _m, _x, y: kept.append(y))
    x = torch.randn(5, 24)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got = layer(x, adapter_names=ROWS)
            (y,) = kept
            assert torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias))
            assert_near(got, by_definition(layer, x, ROWS).float())
            kept.clear()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_under_autocast_have_its_dtype(accelerated, dtype, grad):
    _, layer = four_adapters()
    x = torch.randn(5, 3, 24)
    with torch.autocast("cpu", dtype), torch.set_grad_enabled(grad):
        got = layer(x, adapter_names=ROWS)
    assert got.dtype == dtype
    assert_near(got.double(), by_definition(layer, x, ROWS), 0.02)


def test_rows_work_compiled_and_transformed(accelerated):
    _, layer = four_adapters()
    x = torch.randn(5, 3, 24)
    expected = by_definition(layer, x, ROWS).float()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_near(compiled(x, adapter_names=ROWS), expected)
    over_tokens = torch.func.vmap(lambda x: layer(x, adapter_names=ROWS), 1, 1)
    assert_near(over_tokens(x), expected)
    _, tangent = torch.func.jvp(lambda x: layer(x, adapter_names=ROWS), (x,), (x,))
    assert_near(tangent, (expected - layer.get_base_layer().bias))


def test_rows_of_many_threads_and_names_are_right(accelerated):
    model = made(("default",)).eval()
    names = [f"adapter {i}" for i in range(24)]
    for i, name in enumerate(names):
        model.add_adapter(name, config((2, 4)[i % 2]))
    layer = layers(model)[0]
    failed = []

    def serve(seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode():
            for _ in range(30):
                chosen = torch.randint(len(names), (6,), generator=generator).tolist()
                rows = [names[k] for k in chosen]
                x = torch.randn(6, 24, generator=generator)
                got, expected = layer(x, adapter_names=rows), by_definition(layer, x, rows)
                if relative_error(got.double(), expected) > 1e-5:
                    failed.append(rows)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_wrong_names_for_rows_are_said(accelerated):
    model, x = made(("default", "other")), torch.randn(2, 24)
    with pytest.raises(ValueError, match="in training mode"):
        model(x, adapter_names=["default", "other"])
    model.eval()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): absent; there are default"):
        model(x, adapter_names=["default", "absent"])
    with pytest.raises(ValueError, match="expected an adapter name for each of 2 rows, got 1"):
        model(x, adapter_names=["default"])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"need unmerged adapters, and \['default'\] are merged"):
        model(x, adapter_names=["default", "other"])


def test_rows_are_repeated_for_beams(accelerated):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 24, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    net = GPT2LMHeadModel(GPT2Config(**sizes, **tokens))
    targets = {"target_modules": ["c_attn", "mlp.c_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(net, config(8, **targets)).eval()
    model.add_adapter("other", config(4, **targets))
    prompt = torch.arange(1, 9).view(2, 4)
    common = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "min_new_tokens": 4}
    together = model.generate(input_ids=prompt, adapter_names=["other", "default"], **common)
    for row, name in enumerate(["other", "default"]):
        model.set_adapter(name)
        alone = model.generate(input_ids=prompt[row : row + 1], **common)
        assert torch.equal(together[row], alone[0])


# More bases


class GPTQLike(nn.Module):
    """Integers in buffers, no weight, and GPTQ's names."""

    def __init__(self, linear, names=("infeatures", "outfeatures")):
        super().__init__()
        setattr(self, names[0], linear.in_features)
        setattr(self, names[1], linear.out_features)
        scales = linear.weight.detach().abs().amax(1) / 127
        self.register_buffer("qweight", (linear.weight.detach().T / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x):
        return x @ (self.qweight * self.scales).to(x.dtype)


def by_torchao(linear):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model[0]


def by_bitsandbytes(bits):
    def make(linear):
        bnb = pytest.importorskip("bitsandbytes")
        if bits == 8:
            layer = bnb.nn.Linear8bitLt(
                linear.in_features, linear.out_features, has_fp16_weights=False
            )
        else:
            layer = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                compute_dtype=torch.float32,
                quant_type="nf4",
            )
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")

    return make


def conv1d(linear):
    layer = Conv1D(linear.out_features, linear.in_features)
    with torch.no_grad():
        layer.weight.copy_(linear.weight.T)
    return layer


BASES = {
    "Conv1D": conv1d,
    "GPTQ": GPTQLike,
    "AWQ": lambda linear: GPTQLike(linear, ("in_features", "out_features")),
    "torchao": by_torchao,
    "bitsandbytes, 8 bits": by_bitsandbytes(8),
    "bitsandbytes, 4 bits": by_bitsandbytes(4),
}


def on(base, **options):
    net = nn.Sequential(BASES[base](nn.Linear(64, 32)))
    options = {"target_modules": ["0"], "block_size": 8, **options}
    model = peft.get_peft_model(net, config(**options))
    layer = layers(model)[0]
    with torch.no_grad():
        layer.c3a_kernel["default"].mul_(8)
    return model, layer


@pytest.mark.parametrize("base", BASES)
def test_bases_other_than_linear_are_adapted(accelerated, base, tmp_path):
    model, layer = on(base)
    model.add_adapter("other", config(4, target_modules=["0"]))
    x = torch.randn(5, 64, requires_grad=True)
    for name in ("default", "other"):
        model.set_adapter(name)
        assert_near(model(x), dense(layer, x, name), 2e-3)
    model.set_adapter("default")
    model(x).square().sum().backward()
    assert layer.c3a_kernel["default"].grad.abs().sum() > 0
    assert layer.c3a_kernel["default"].dtype == torch.float32
    expected = model.eval()(x).detach()  # some bases compute otherwise in training
    model.save_pretrained(tmp_path)
    plain = copy.deepcopy(model).unload()
    assert not isinstance(plain[0], their_layer.C3ALinear)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path)
    assert_near(loaded(x).detach(), expected, 1e-5)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("grad", [False, True])
def test_rows_are_served_on_other_bases_too(accelerated, base, grad):
    model, layer = on(base)
    model.eval()
    model.add_adapter("other", config(4, target_modules=["0"]))
    rows, x = ["other", "__base__", "default", "other"], torch.randn(4, 3, 64)
    with torch.set_grad_enabled(grad):
        got = model(x, adapter_names=rows)
        expected = by_definition(layer, x, rows)
    assert got.requires_grad == grad
    assert_near(got.double(), expected, 1e-5)
    assert torch.equal(got[1], layer.get_base_layer()(x)[1])


@pytest.mark.parametrize("base", ["torchao", "bitsandbytes, 8 bits", "bitsandbytes, 4 bits"])
def test_merging_into_a_quantised_base_says_the_loss_and_is_undone(accelerated, base):
    model, layer = on(base)
    model.eval()
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected, of_base = model(x), layer.get_base_layer()(x)
        weight = layer.base_layer.weight
        with pytest.warns(UserWarning, match=r"errs by \S+ of the adapter's own norm"):
            model.merge_adapter(safe_merge=True)
        assert type(layer.base_layer.weight) is type(weight)
        assert relative_error(model(x), expected) < (0.15 if "4" in base else 0.03)
        assert relative_error(of_base, expected) > 0.3
        model.unmerge_adapter()
        assert layer.base_layer.weight is weight
        assert torch.equal(layer.get_base_layer()(x), of_base)
        assert_near(model(x), expected, 1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_our_own_layer_merges_into_a_base_of_bitsandbytes(bits):
    base = by_bitsandbytes(bits)(nn.Linear(64, 32))
    layer = c3a.C3ALinear(base, 8).eval()
    x = torch.randn(5, 64)
    with torch.no_grad():
        layer.c3a_kernel.normal_(std=8)
        expected, of_base = layer(x), base(x)
        with pytest.warns(UserWarning, match=r"errs by \S+ of the adapter's own norm"):
            layer.merge()
        for _ in range(2):
            assert relative_error(layer(x), expected) < (0.15 if bits == 4 else 0.03)
            layer.enabled = False
            assert torch.equal(layer(x), of_base)
            layer.enabled = True
        layer.unmerge()
        assert_near(layer(x), expected, 1e-5)


class Int8Params(nn.Parameter):
    """As bitsandbytes has it: quantises what moves, and hands its factors to the layer's state."""

    __module__ = "bitsandbytes.stand_in"

    def __new__(cls, data, requires_grad=False, has_fp16_weights=False):
        self = torch.Tensor._make_subclass(cls, data, requires_grad)
        self.CB = self.SCB = None
        self.has_fp16_weights = has_fp16_weights
        return self

    def to(self, device):
        self.SCB = self.data.float().abs().amax(1)
        self.data = self.CB = (self.data.float() * (127 / self.SCB[:, None])).round().to(torch.int8)
        return self


class Linear8bit(nn.Linear):
    """A stand-in of bitsandbytes' layer, which a first call empties the weight for."""

    def __init__(self, *sizes):
        super().__init__(*sizes, bias=False)
        self.weight = Int8Params(self.weight.data).to("cpu")
        self.state = type("State", (), {"CB": None, "SCB": None})()

    def forward(self, x):
        if self.weight.CB is not None:
            self.state.CB, self.state.SCB = self.weight.CB, self.weight.SCB
            self.weight.CB = self.weight.SCB = None
        return x @ (self.state.CB.float() * self.state.SCB[:, None] / 127).T


@pytest.mark.parametrize("called", [True, False])
def test_eight_bits_keep_their_factors_through_merging(called):
    base = Linear8bit(64, 32)
    layer = c3a.C3ALinear(base, 8)
    x = torch.randn(5, 64)
    with torch.no_grad():
        layer.c3a_kernel.normal_(std=8)
        if called:
            base(x)
        with pytest.warns(UserWarning, match="quantised the sum anew, as Int8Params"):
            layer.merge()
        got = layer(x)
        layer.unmerge()
        assert relative_error(got, layer(x)) < 0.03
        assert relative_error(base(x), layer(x)) > 0.3


def test_merging_where_there_is_no_weight_is_refused(accelerated):
    model, _ = on("GPTQ")
    with pytest.raises(TypeError, match="cannot merge into a GPTQLike: .* got a NoneType"):
        model.merge_adapter()
    assert not layers(model)[0].merged


def test_conv1d_merges_in_its_own_layout(accelerated):
    model, layer = on("Conv1D")
    x = torch.randn(5, 64)
    expected = model(x)
    assert layer.get_delta_weight("default").shape == (64, 32)
    assert_near(copy.deepcopy(model).merge_and_unload()(x), expected)


def test_a_target_without_features_is_refused(accelerated):
    with pytest.raises(TypeError, match="expected a target with in and out features, got a Tanh"):
        peft.get_peft_model(nn.Sequential(nn.Tanh()), config(target_modules=["0"]))


# Dropout


def test_dropout_is_the_adapters_and_trainings_alone():
    with c3a.peft.accelerate(dropout=0.5):
        model = made()
    x = torch.randn(64, 24)
    layer = model.base_model.model.down
    torch.manual_seed(1)
    got = layer(x)
    torch.manual_seed(1)
    seen = nn.functional.dropout(x, 0.5)
    expected = layer.base_layer(x) + seen @ layer.get_delta_weight("default").T
    assert_near(got, expected)
    assert "dropout=0.5" in repr(layer)
    model.eval()
    assert_near(model(x), of_net(model, x, "default"))
    model.train()
    c3a.peft.accelerate(model, dropout=0.0)
    assert torch.equal(layer(x), layer(x))
    with pytest.raises(ValueError, match="expected 0 <= dropout < 1, got 1"):
        c3a.peft.accelerate(dropout=1)


# Accelerating and restoring


def test_importing_c3a_imports_no_peft():
    code = "import sys, c3a; assert 'peft' not in sys.modules, 'peft'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_runs():
    (test,) = doctest.DocTestFinder().find(c3a.peft.accelerate, globs={})
    runner = doctest.DocTestRunner()
    runner.run(test)
    assert runner.tries == 5
    assert runner.failures == 0


def test_a_model_is_accelerated_within_a_block_and_again_as_it_was_after_it():
    model, x = made(), torch.randn(5, 24)
    before = [(type(m), sorted(vars(m))) for m in model.modules()]
    expected = model(x)
    with c3a.peft.accelerate(model):
        assert all(isinstance(m, c3a.peft.AcceleratedC3ALinear) for m in layers(model))
        assert isinstance(model.base_model, their_model.C3AModel)
        assert_near(model(x), expected)
        with torch.no_grad():
            model.eval()(x)
        with c3a.peft.accelerate(model, dropout=0.25):
            assert layers(model)[0]._c3a_dropout == 0.25
        assert layers(model)[0]._c3a_dropout == 0
        model.add_adapter("later", config(target_modules=["head"]))
        assert len(layers(model)) == 3
    assert [(type(m), sorted(vars(m))) for m in model.modules()][: len(before)][:3] == before[:3]
    assert {type(m) for m in layers(model)} == {their_layer.C3ALinear}
    assert torch.equal(model(x), expected)


def test_new_models_are_accelerated_until_restored():
    first = vars(their_model.C3AModel).get("__init__")
    c3a.peft.accelerate()
    c3a.peft.accelerate()
    model = made()
    direct = their_model.C3AModel(Net(), config(), "default")
    c3a.peft.restore()
    assert {type(m) for m in layers(model)} == {c3a.peft.AcceleratedC3ALinear}
    assert {type(m) for m in layers(direct)} == {c3a.peft.AcceleratedC3ALinear}
    assert {type(m) for m in layers(made())} == {their_layer.C3ALinear}
    assert vars(their_model.C3AModel).get("__init__") is first
    c3a.peft.restore(model)
    c3a.peft.restore(model)
    assert {type(m) for m in layers(model)} == {their_layer.C3ALinear}


def test_a_merged_layer_that_is_restored_is_unmerged_by_peft():
    model = made()
    before = layers(model)[0].base_layer.weight.detach().clone()
    c3a.peft.accelerate(model)
    model.merge_adapter()
    c3a.peft.restore(model)
    assert not torch.allclose(layers(model)[0].base_layer.weight, before)
    model.unmerge_adapter()
    assert_near(layers(model)[0].base_layer.weight, before, 1e-6)


def test_a_layer_that_peft_cannot_have_stays_accelerated_and_says_so(accelerated):
    model, layer = on("Conv1D")
    with pytest.warns(UserWarning, match="layers on Conv1D stay accelerated"):
        c3a.peft.restore(model)
    assert isinstance(layer, c3a.peft.AcceleratedC3ALinear)


def test_a_model_without_such_layers_is_an_error():
    with pytest.raises(ValueError, match="expected a model with C3A layers of PEFT's, got a Net"):
        c3a.peft.accelerate(Net())


def test_a_release_that_is_not_known_is_warned_of_once_and_left_alone(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.99.1")
    model = made()
    with pytest.warns(UserWarning, match=r"peft 0.99.1 is newer than what was tried"):
        c3a.peft.accelerate(model)
    with c3a.peft.accelerate():
        assert {type(m) for m in [*layers(model), *layers(made())]} == {their_layer.C3ALinear}


def test_other_threads_call_a_model_that_is_accelerated():
    model, x = made().eval(), torch.randn(5, 24)
    with torch.no_grad():
        expected, wrong = model(x), []

    def call():
        for _ in range(100):
            with torch.no_grad():
                if not torch.allclose(model(x), expected, atol=1e-4):
                    wrong.append(1)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        with c3a.peft.accelerate(model):
            pass
    for thread in threads:
        thread.join()
    assert not wrong
