"""Experts whose matrices are parameters of three dimensions: an adapter for each, or a word."""

import copy
import json
import pickle
import re
import warnings

import accelerate
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import nn

import c3a
import c3a.lora
from c3a import experts as of_experts
from c3a.cli import main
from c3a.memory import peak_allocated
from cases import relative_error

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


def gpt_oss():
    config = transformers.GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8, pad_token_id=0
    )
    return transformers.GptOssForCausalLM(config)


def llama4():
    config = transformers.Llama4TextConfig(
        **SIZES, num_local_experts=4, intermediate_size_mlp=24, head_dim=8
    )
    return transformers.Llama4ForCausalLM(config)


TOKENS = torch.arange(1, 13).reshape(2, 6)
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
# Llama 4 has one way of its own, gpt-oss's and its matrices are (in, out).
WAYS = [
    *((make, how) for make in (mixtral, qwen3, gpt_oss) for how in ("eager", "batched_mm")),
    (llama4, "eager"),
    *((make, "grouped_mm") for make in (mixtral, qwen3, gpt_oss)),
]
some_ways = pytest.mark.parametrize(("make", "how"), WAYS)


def made(make, how="eager"):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3:
                parameter.normal_(std=0.3)
    model.set_experts_implementation(how)
    return model if how == "grouped_mm" else model.double()  # torch's has no float64


def patched(model, *targets, **options):
    options = {"block_size": 4, "target_parameters": BOTH, "scale": 0.3, **options}
    dtype = next(model.parameters()).dtype
    return c3a.patch_model(model, *targets, **{"init": "gaussian", "dtype": dtype, **options})


def adapters(model):
    return {name: a for name, a in model.named_modules() if isinstance(a, of_experts.C3AExperts)}


def dense_parameters(model, kernels):
    """The definition: each expert's matrix, with the dense one of its kernel added."""
    found = {}
    for (name, stack), kernel in zip(of_experts.stacks(model).items(), kernels, strict=True):
        delta = 0.3 * torch.stack([c3a.circulant(w) for w in kernel])
        found[name] = stack.weight + (delta.mT if stack.is_turned else delta)
    return found


def assert_same_state(got, expected):
    assert got.keys() == expected.keys()
    assert [key for key in got if not torch.equal(got[key], expected[key])] == []


@some_ways
def test_every_way_of_computing_agrees_with_dense_matrices(make, how, monkeypatch):
    base = made(make, how)
    model = patched(copy.deepcopy(base))
    # transformers turns to float32 in norms
    tolerance = 1e-12 if base.dtype == torch.float64 else 2e-5
    kernels = [a.c3a_kernel for a in adapters(model).values()]
    assert len(kernels) == 4
    embedded = base.get_input_embeddings()(TOKENS).detach().requires_grad_()
    copies = [w.detach().clone().requires_grad_() for w in kernels]
    dense = dense_parameters(base, copies)
    expected = torch.func.functional_call(base, dense, kwargs={"inputs_embeds": embedded}).logits
    g = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, [embedded, *copies], g)

    def never(*_):
        raise AssertionError("the matrices were added up")

    monkeypatch.setattr(of_experts._Matrices, "add_delta", never)
    got = model(inputs_embeds=embedded).logits
    assert relative_error(got, expected) < tolerance
    assert relative_error(got, base(inputs_embeds=embedded).logits) > 0.1
    for one, other in zip(
        torch.autograd.grad(got, [embedded, *kernels], g), gradients, strict=True
    ):
        assert relative_error(one, other) < tolerance


@pytest.mark.parametrize("how", ["eager", "grouped_mm"])
def test_a_step_needs_no_memory_for_the_matrices(how):
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(**sizes, num_local_experts=8)
    model = made(lambda: transformers.MixtralForCausalLM(config), how).float()
    x = torch.randn(32, 64, requires_grad=True)
    routing = torch.randint(8, (32, 2)), torch.rand(32, 2)

    def step():
        model.model.layers[0].mlp.experts(x, *routing).sum().backward()

    step()
    plain = peak_allocated(step)
    matrices = sum(stack.weight.nbytes for stack in of_experts.stacks(model).values())
    patched(model, block_size=16)
    step()  # gradients are there from now on
    kernels = sum(a.c3a_kernel.nbytes for a in adapters(model).values())
    assert kernels < matrices / 10
    assert peak_allocated(step) < plain + 2 * kernels


class Experts(nn.Module):
    """Whose code computes in a way that is usual of nobody."""

    def __init__(self):
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(3, 8, 4, dtype=torch.float64))

    def forward(self, x):
        return torch.einsum("ti,eoi->teo", x, self.matrices)


def test_what_is_not_known_of_experts_gets_the_sum():
    base, x = Experts(), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    model = patched(copy.deepcopy(base), target_parameters=["matrices"])
    (kernel,) = (a.c3a_kernel for a in adapters(model).values())
    (dense,) = dense_parameters(base, [kernel]).values()
    expected = torch.einsum("ti,eoi->teo", x, dense)
    got = model(x)
    assert relative_error(got, expected) < 1e-12
    g = torch.randn_like(got)
    for one, other in zip(
        torch.autograd.grad(got, [x, kernel], g),
        torch.autograd.grad(expected, [x, kernel], g),
        strict=True,
    ):
        assert relative_error(one, other) < 1e-12
    assert (model.matrices.dtype, model.matrices.shape) == (base.matrices.dtype, (3, 8, 4))
    assert model.matrices.requires_grad
    with pytest.raises(RuntimeError, match="cannot be written to"), torch.no_grad():
        model.matrices.zero_()


def test_products_that_are_usual_of_experts_need_no_sum(monkeypatch):
    base = Experts()
    model = patched(copy.deepcopy(base), target_parameters=["matrices"])
    (kernel,) = (a.c3a_kernel for a in adapters(model).values())
    (dense,) = dense_parameters(base, [kernel]).values()
    x, g = torch.randn(5, 4).double(), torch.randn(5, 8).double()
    which, one = torch.tensor([2, 0, -1, 1, 0], dtype=torch.int32), torch.tensor(1)
    ways = [
        lambda w: F.linear(x, w[2]),
        lambda w: F.linear(g, w[one].T),
        lambda w: F.linear(g, w[1].t()),
        lambda w: F.linear(x, w[-1], torch.ones(8).double()),
        lambda w: g @ w[one],
        lambda w: torch.matmul(x, w[0].mT),
        lambda w: torch.mm(x, w[0].transpose(0, 1)),
        lambda w: w[which].bmm(x[:, :, None]),
        lambda w: torch.bmm(g[:, None], w[which]),
        lambda w: torch.bmm(x.expand(3, 5, 4), w.mT),
        lambda w: g.expand(3, 5, 8) @ w,
    ]
    expected = [way(dense) for way in ways]
    monkeypatch.delattr(of_experts._Matrices, "add_delta")
    for way, of_dense in zip(ways, expected, strict=True):
        assert relative_error(way(model.matrices), of_dense) < 1e-12


def test_rows_behind_the_last_group_of_grouped_mm_are_nobodys():
    base = Experts().float()
    model = patched(copy.deepcopy(base), target_parameters=["matrices"])
    (kernel,) = (a.c3a_kernel for a in adapters(model).values())
    (dense,) = dense_parameters(base, [kernel]).values()
    x, ends = torch.randn(9, 4), torch.tensor([2, 2, 6], dtype=torch.int32)
    got = F.grouped_mm(x, model.matrices.mT, offs=ends)[:6]
    assert relative_error(got, F.grouped_mm(x, dense.mT, offs=ends)[:6]) < 1e-5


@pytest.mark.parametrize("make", [mixtral, qwen3])
@pytest.mark.parametrize("how", ["eager", "grouped_mm"])
def test_experts_are_trained_with_layers_saved_and_loaded(make, how, tmp_path):
    base = made(make, how).float()
    state = {name: t.clone() for name, t in base.state_dict().items()}
    model = c3a.patch_model(base, "all-linear", 4, target_parameters=BOTH)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith("c3a_kernel") for name in trained)
    optimizer = torch.optim.AdamW(c3a.param_groups(model, lr=0.3))
    model.train()
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(model(input_ids=TOKENS, labels=TOKENS).loss)
        losses[-1].backward()
        assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
        optimizer.step()
    assert losses[-1] < losses[0]
    expected = model.eval()(TOKENS).logits
    now = model.state_dict()
    experts = {name for name in state if "experts" in name}
    assert len(experts) == 4  # by the names that they had
    assert all(torch.equal(now[name], state[name]) for name in experts)

    with pytest.warns(UserWarning, match=r"PEFT library cannot; its C3A adapts no experts: model"):
        c3a.save_adapter(model, tmp_path)
    again = c3a.load_adapter(made(make, how).float(), tmp_path)
    assert torch.equal(again(TOKENS).logits, expected)
    assert c3a.summary(again) == c3a.summary(model)
    kernels = load_file(tmp_path / "adapter_model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    kernel = kernels[f"base_model.model.{name}.c3a_kernel"]
    assert kernel.ndim == 4
    assert torch.equal(kernel, model.model.layers[1].mlp.experts.c3a_adapters.down_proj.c3a_kernel)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(config["target_parameters"]) == 4
    assert name in config["target_parameters"]
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    over = c3a.patch_model(made(make, how).float(), "all-linear", 4, target_parameters=BOTH)
    assert torch.equal(c3a.load_adapter(over, tmp_path)(TOKENS).logits, expected)

    with pytest.raises(ValueError, match=r"kernels of experts, which are not converted"):
        c3a.lora.export(tmp_path, tmp_path / "lora", rank=2)
    assert main(["inspect", str(tmp_path)]) in (0, None)
    c3a.unpatch_model(model)
    assert_same_state(model.state_dict(), state)


def test_peft_says_that_it_knows_no_experts(tmp_path):
    model = patched(made(mixtral, "grouped_mm"), ["q_proj"])
    with pytest.warns(UserWarning, match="adapts no experts"):
        c3a.save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="target_parameters"):
        peft.PeftModel.from_pretrained(made(mixtral), tmp_path)


def test_sizes_by_pattern_and_scales_of_their_own_come_back(tmp_path):
    sizes = {r"experts\.gate_up_proj": 8, "down_proj": 4, "q_proj": 2}
    options = {"target_parameters": BOTH, "init": "gaussian", "scale": 0.7}
    model = c3a.patch_model(made(qwen3), ["q_proj"], sizes, **options)
    expected = model(TOKENS).logits
    with pytest.warns(UserWarning, match="adapts no experts"):
        c3a.save_adapter(model, tmp_path)
    again = c3a.load_adapter(made(qwen3), tmp_path)
    assert relative_error(again(TOKENS).logits, expected) < 1e-5
    assert {row.name.rpartition(".")[2]: row.block_size for row in c3a.summary(again).layers} == {
        "gate_up_proj": 8,
        "down_proj": 4,
        "q_proj": 2,
    }


def test_unpatching_gives_class_parameters_and_state_back():
    base = made(mixtral)
    kind = type(base.model.layers[0].mlp.experts)
    parameters = dict(base.named_parameters())
    model = patched(base, ["q_proj"])
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, kind)
    assert type(experts).__name__ == kind.__name__
    assert "C3AExperts(experts=4, in_features=16, out_features=48, block_size=4, " in repr(model)
    assert c3a.unpatch_model(model) is base
    assert type(experts) is kind
    now = dict(base.named_parameters())
    assert now.keys() == parameters.keys()
    assert all(now[name] is parameters[name] for name in now)
    assert all(p.requires_grad for p in now.values())
    assert experts.gate_up_proj is parameters["model.layers.0.mlp.experts.gate_up_proj"]


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_merging_disabling_and_unpatching_with_the_adapters(make):
    base = made(make)
    plain = base(TOKENS).logits
    model = patched(base, ["q_proj"])
    adapted = model(TOKENS).logits
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with c3a.disabled(model):
        assert torch.equal(model(TOKENS).logits, plain)
    c3a.merge(model)
    assert relative_error(model(TOKENS).logits, adapted) < 1e-12
    assert "(4 experts) (merged)" in str(c3a.summary(model))
    assert_same_state(model.state_dict(), state)
    with c3a.disabled(model):
        assert torch.equal(model(TOKENS).logits, plain)
    for kernel in (a.c3a_kernel for a in adapters(model).values()):
        assert not model(TOKENS).logits.requires_grad or kernel.requires_grad
    model.load_state_dict({name: t * 0.5 if "experts" in name else t for name, t in state.items()})
    assert relative_error(model(TOKENS).logits, adapted) > 1e-3
    halved = model(TOKENS).logits
    c3a.unmerge(model)
    assert relative_error(model(TOKENS).logits, halved) < 1e-12
    model.load_state_dict(state)
    assert torch.equal(model(TOKENS).logits, adapted)
    c3a.unpatch_model(model, merge=True)
    assert relative_error(model(TOKENS).logits, adapted) < 1e-12
    assert not adapters(model)
    assert "c3a" not in str(model.state_dict().keys())


def test_merging_what_would_not_be_finite_is_refused_and_nothing_merged():
    model = patched(made(mixtral))
    last = list(adapters(model).values())[-1]
    with torch.no_grad():
        last.c3a_kernel[1, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj: merging would make 4 "):
        c3a.merge(model)
    assert not any(adapter.merged for adapter in adapters(model).values())


def test_a_base_checkpoint_loads_into_a_patched_model():
    state = made(mixtral).state_dict()
    model = patched(made(mixtral))
    with torch.no_grad():
        model.model.layers[0].mlp.experts.c3a_adapters.down_proj.base.zero_()
    found = model.load_state_dict(state, strict=False)
    assert all(name.endswith("c3a_kernel") for name in found.missing_keys)
    assert not found.unexpected_keys
    assert_same_state(c3a.unpatch_model(model).state_dict(), state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_are_models_of_their_own(copied):
    model = patched(made(gpt_oss), ["q_proj"])
    expected = model(TOKENS).logits
    other = copied(model)
    assert torch.equal(other(TOKENS).logits, expected)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.base.zero_()
            adapter.c3a_kernel.zero_()
    assert torch.equal(other(TOKENS).logits, expected)
    assert "c3a" not in str(c3a.unpatch_model(other).state_dict().keys())


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_kernels_stay_wide_in_a_narrow_model(how):
    model = patched(made(mixtral, how).float())
    for merged in (False, True):
        expected = model(TOKENS).logits
        if merged:
            c3a.merge(model)
        narrow = copy.deepcopy(model).bfloat16()
        assert {a.c3a_kernel.dtype for a in adapters(narrow).values()} == {torch.float32}
        assert {a.weight.dtype for a in adapters(narrow).values()} == {torch.bfloat16}
        y = narrow(TOKENS).logits
        assert y.dtype == torch.bfloat16
        assert relative_error(y, expected) < 0.05
        if not merged:
            y.sum().backward()
            assert all(a.c3a_kernel.grad.any() for a in adapters(narrow).values())


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_under_autocast_and_with_checkpoints_of_activations(how):
    model = patched(made(mixtral, how).float())
    kernels = [a.c3a_kernel for a in adapters(model).values()]
    expected = model(TOKENS).logits
    gradients = torch.autograd.grad(expected.square().sum(), kernels)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(model(TOKENS).logits, expected) < 0.05
    model.activation_checkpointing_enable()
    model.train()
    again = torch.autograd.grad(model(TOKENS).logits.square().sum(), kernels)
    for one, other in zip(again, gradients, strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("how", ["batched_mm", "grouped_mm"])
def test_experts_compile_to_sums_of_matrices(how):
    block = patched(made(mixtral, how).float()).model.layers[0].mlp
    kernels, x = [a.c3a_kernel for a in adapters(block).values()], torch.randn(1, 6, 16)
    expected = block(x)
    gradients = torch.autograd.grad(expected.square().sum(), kernels)
    got = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
    assert relative_error(got, expected) < 1e-5
    again = torch.autograd.grad(got.square().sum(), kernels)
    for one, other in zip(again, gradients, strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("merged", [False, True])
def test_save_pretrained_of_a_patched_model(merged, tmp_path):
    kind = transformers.MixtralForCausalLM
    model = patched(made(mixtral).float(), ["q_proj"], scale=None)
    expected = model(TOKENS).logits
    if merged:
        c3a.merge(model).save_pretrained(tmp_path)
        again = kind.from_pretrained(tmp_path)
    else:
        with pytest.warns(UserWarning, match=r"from_pretrained cannot.*adapts no experts"):
            model.save_pretrained(tmp_path)
        kernels = {name for name, p in model.named_parameters() if p.requires_grad}
        there = set(load_file(tmp_path / "model.safetensors"))
        # Mixtral's files have another name for the block that holds the experts.
        assert kernels <= {name.replace("block_sparse_moe", "mlp") for name in there}
        # as Trainer does when it resumes
        other = patched(made(mixtral).float(), ["q_proj"], init="zeros", scale=None)
        found = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
        assert kernels.isdisjoint(found.missing_keys)
        assert torch.equal(other(TOKENS).logits, expected)
        again = c3a.load_pretrained(kind, tmp_path)
        assert c3a.summary(again) == c3a.summary(model)
    assert relative_error(again.eval()(TOKENS).logits, expected) < 1e-5
    assert relative_error(model(TOKENS).logits, expected) < 1e-5  # it may go on


def test_a_configuration_of_peft_gives_experts_their_block_sizes_too():
    config = peft.C3AConfig(
        target_modules=["q_proj"], block_size=4, block_size_pattern={"experts.down_proj": 8}
    )
    model = c3a.patch_model(made(mixtral), config, target_parameters=iter(BOTH))
    sizes = {row.name.rpartition(".")[2]: row.block_size for row in c3a.summary(model).layers}
    assert sizes == {"q_proj": 4, "gate_up_proj": 4, "down_proj": 8}


def test_a_scale_that_is_assigned_counts_merged_or_not():
    model = patched(made(mixtral))
    expected = model(TOKENS).logits
    c3a.merge(model)
    for adapter in adapters(model).values():
        adapter.scale = 0.6
    assert relative_error(model(TOKENS).logits, expected) > 1e-3
    for adapter in adapters(model).values():
        adapter.scale = 0.3
        assert adapter.merged
    assert relative_error(model(TOKENS).logits, expected) < 1e-12


def test_offloaded_experts_are_adapted_where_they_compute():
    model = patched(made(mixtral))
    expected = model(TOKENS).logits
    offloaded = accelerate.cpu_offload(made(mixtral), torch.device("cpu"))
    assert offloaded.model.layers[0].mlp.experts.gate_up_proj.is_meta
    patched(offloaded, dtype=torch.float64)
    kernels = {name: t for name, t in model.state_dict().items() if "c3a" in name}
    offloaded.load_state_dict(kernels, strict=False)
    assert torch.equal(offloaded(TOKENS).logits, expected)
    with pytest.raises(RuntimeError, match="patched after it was offloaded"):
        accelerate.cpu_offload(model, torch.device("cpu"))(TOKENS)


@pytest.mark.parametrize(
    ("parameters", "options", "error", "said"),
    [
        (["gate"], {}, ValueError, r"'gate' to be a parameter .* got no parameter of that name; "),
        (["gate.weight"], {}, ValueError, r"got one of shape \(4, 16\); there are: model.layers.*"),
        ("down_proj", {}, TypeError, "expected target_parameters to be a list of names, got "),
        (BOTH, {"block_size": 5}, ValueError, r"in_features = 16 and .* do: 1, 2, 4, 8, 16; model"),
        (BOTH, {"block_size": 5, "pad": True}, ValueError, r"these do: 1, 2, 4, 8, 16; model"),
        (BOTH, {"dropout": 0.1}, ValueError, "dropout=0 with target_parameters"),
        (BOTH, {"modules_to_save": ["experts"]}, ValueError, "trained whole instead of adapted"),
        (BOTH, {"init": "ones"}, ValueError, "expected init to be one of"),
        (BOTH, {"dtype": torch.int8}, TypeError, "got dtype torch.int8"),
        (BOTH, {"scale": 0}, ValueError, "expected a finite scale other than 0"),
    ],
)
def test_what_cannot_be_adapted_of_experts_is_said_and_changes_nothing(
    parameters, options, error, said
):
    model = made(mixtral)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(error, match=said):
        c3a.patch_model(model, target_parameters=parameters, **{"block_size": 4, **options})
    assert_same_state(model.state_dict(), state)
    assert all(p.requires_grad for p in model.parameters())


def test_experts_of_whole_numbers_are_refused():
    model = Experts()
    model.matrices = nn.Parameter(torch.ones(3, 8, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"matrices: expected one of .* got torch.int8"):
        c3a.patch_model(model, block_size=4, target_parameters=["matrices"])


def test_a_patched_model_is_not_patched_again_nor_sharded():
    model = patched(made(mixtral))
    with pytest.raises(ValueError, match="is patched already"):
        c3a.patch_model(model, ["q_proj"], 4)
    with pytest.raises(
        ValueError, match=r"got experts \(model.layers.0.mlp.experts.gate_up_proj\)"
    ):
        c3a.fully_shard(model)


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
    assert "target_parameters=['experts.down_proj', 'experts.gate_up_proj']" in said
    for way_out in ("target_modules", "modules_to_save"):
        assert way_out in said
    assert {layer.name.rpartition(".")[2] for layer in c3a.summary(model).layers} == {
        *("q_proj", "k_proj", "v_proj", "o_proj")
    }


def test_peft_s_configuration_says_so_too():
    with pytest.warns(UserWarning, match="skips 4 parameters"):
        c3a.patch_model(mixtral(), peft.C3AConfig(target_modules="all-linear", block_size=4))


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (["q_proj", "v_proj"], {}),
        (r".*_proj", {}),
        ("all-linear", {"modules_to_save": ["experts"]}),
        ("all-linear", {"target_parameters": BOTH}),
    ],
)
def test_nothing_is_said_where_layers_are_named_or_the_experts_learn(targets, options):
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
