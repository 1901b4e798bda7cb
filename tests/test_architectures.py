"""Tiny models of many kinds: patched or under PEFT, trained, saved and loaded by both libraries."""

import contextlib

import peft
import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

import c3a
import c3a.peft
from c3a.patch import adapted_layers

TOKENS = torch.arange(1, 13).reshape(2, 6)
TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
CAUSAL = TEXT | {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
IMAGES = {"image_size": 8, "patch_size": 4, "num_channels": 3}


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def llama():
    config = transformers.LlamaConfig(**CAUSAL)
    return transformers.LlamaForCausalLM(config), {"input_ids": TOKENS}


def qwen3():
    config = transformers.Qwen3Config(**CAUSAL)
    return transformers.Qwen3ForCausalLM(config), {"input_ids": TOKENS}


def gemma3():
    config = transformers.Gemma3TextConfig(
        **CAUSAL, layer_types=["sliding_attention", "full_attention"], sliding_window=4
    )
    return transformers.Gemma3ForCausalLM(config), {"input_ids": TOKENS}


def gpt2():
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config), {"input_ids": TOKENS}


def mamba2():
    config = transformers.Mamba2Config(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=2,
        head_dim=16,
        state_size=8,
        n_groups=1,
        chunk_size=4,
    )
    return transformers.Mamba2ForCausalLM(config), {"input_ids": TOKENS, "use_cache": False}


def t5():
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    inputs = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4]}
    return transformers.T5ForConditionalGeneration(config), inputs


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=32,
        d_model=16,
        num_mel_bins=4,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=0,
        **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")},
    )
    inputs = {"input_features": random(2, 4, 16), "decoder_input_ids": TOKENS[:, :4]}
    return transformers.WhisperForConditionalGeneration(config), inputs


def vit():
    config = transformers.ViTConfig(**TEXT | IMAGES, num_labels=4)
    return transformers.ViTForImageClassification(config), {"pixel_values": random(2, 3, 8, 8)}


def clip():
    config = transformers.CLIPConfig(
        text_config={**TEXT, "eos_token_id": 31, "pad_token_id": 0},
        vision_config={**TEXT, **IMAGES},
        projection_dim=8,
    )
    return transformers.CLIPModel(config), {
        "input_ids": TOKENS,
        "pixel_values": random(2, 3, 8, 8),
    }


def unet():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return model, {
        "sample": random(2, 4, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": random(2, 5, 16),
    }


def sd3():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return model, {
        "hidden_states": random(2, 4, 8, 8),
        "encoder_hidden_states": random(2, 5, 16),
        "pooled_projections": random(2, 16),
        "timestep": torch.tensor([3, 7]),
    }


def flux():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    return model, {
        "hidden_states": random(2, 4, 4),
        "encoder_hidden_states": random(2, 5, 16),
        "pooled_projections": random(2, 16),
        "timestep": torch.tensor([0.3, 0.7]),
        "guidance": torch.tensor([2.0, 3.0]),
        "img_ids": random(4, 3),
        "txt_ids": torch.zeros(5, 3),
    }


# Layers whose results the architecture does not use.
UNUSED = {sd3: "transformer_blocks.1.attn.add_q_proj"}
OF_TRANSFORMERS = [vit, llama, qwen3, gemma3, t5, whisper, gpt2, mamba2, clip]
OF_DIFFUSERS = [unet, sd3, flux]


@pytest.fixture(params=[*OF_TRANSFORMERS, *OF_DIFFUSERS], ids=lambda make: make.__name__)
def make(request):
    """A function for the same model each time, in eval mode, and its inputs."""

    def model_and_inputs():
        torch.manual_seed(0)
        model, inputs = request.param()
        return model.eval(), inputs

    model_and_inputs.unused = UNUSED.get(request.param, "nothing")
    return model_and_inputs


def output(model, inputs):
    found = model(**inputs)
    return found.logits if hasattr(found, "logits") else found[0]


def train(model, inputs):
    """Two steps towards random numbers; return the gradients of both."""
    kernels = {name: p for name, p in model.named_parameters() if "c3a_kernel" in name}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {*map(id, kernels.values())}
    optimizer = torch.optim.AdamW(c3a.param_groups(model, lr=0.1))
    gradients = []
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        y = output(model, inputs)
        loss = (y - random(*y.shape)).square().mean()
        loss.backward()
        assert loss.isfinite()
        gradients.append({name: p.grad for name, p in kernels.items()})
        optimizer.step()
    model.eval()
    return gradients


def assert_all_learn(gradients, unused):
    for of_step in gradients:
        without = {name for name, g in of_step.items() if g is None or not g.any()}
        assert without == {name for name in of_step if unused in name}


def sizes_of(model):
    return {name: layer.block_size for name, layer in adapted_layers(model).items()}


def sizes_of_theirs(model):
    ending = ".c3a_kernel.default"
    return {
        name.removeprefix("base_model.model.").removesuffix(ending): kernel.shape[-1]
        for name, kernel in model.named_parameters()
        if name.endswith(ending)
    }


def has_conv1d(model):
    return any(isinstance(module, Conv1D) for module in model.modules())


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_patched_model_is_trained_saved_and_loaded_by_both(make, tmp_path):
    base, inputs = make()
    before = output(base, inputs).clone()
    state = {name: t.clone() for name, t in base.state_dict().items()}
    model = c3a.patch_model(base, "all-linear", "auto", rank=4)
    assert_same(output(model, inputs), before)
    with torch.enable_grad():
        gradients = train(model, inputs)
    assert_all_learn(gradients, make.unused)
    expected = output(model, inputs)
    assert not torch.allclose(expected, before, rtol=1e-2, atol=1e-2)
    with (
        pytest.warns(UserWarning, match="Conv1D") if has_conv1d(base) else contextlib.nullcontext()
    ):
        c3a.save_adapter(model, tmp_path)
    assert_same(output(c3a.load_adapter(make()[0], tmp_path), inputs), expected)
    with c3a.peft.accelerate() if has_conv1d(base) else contextlib.nullcontext():
        theirs = peft.PeftModel.from_pretrained(make()[0], tmp_path)
    assert_same(output(theirs, inputs), expected)
    restored = c3a.unpatch_model(model).state_dict()
    assert restored.keys() == state.keys()
    assert [name for name in state if not torch.equal(restored[name], state[name])] == []


def test_a_model_of_peft_is_trained_under_acceleration_and_loads_here(make, tmp_path):
    sizes = sizes_of(c3a.patch_model(make()[0], "all-linear", "auto", rank=4))
    base, inputs = make()
    state = {name: t.clone() for name, t in base.state_dict().items()}
    config = peft.C3AConfig(
        target_modules=[*sizes], block_size=1, block_size_pattern=sizes, init_weights=True
    )
    with c3a.peft.accelerate():
        model = peft.get_peft_model(base, config)
    assert_all_learn(train(model, inputs), make.unused)
    with torch.no_grad():
        expected = output(model, inputs)
        model.save_pretrained(tmp_path)
        ours = c3a.load_adapter(make()[0], tmp_path)
        # not always those of the pattern, of which PEFT takes some keys for ends of longer names
        assert sizes_of(ours) == sizes_of_theirs(model)
        assert_same(output(ours, inputs), expected)
    restored = model.unload().state_dict()
    assert [name for name in state if not torch.equal(restored[name], state[name])] == []


@pytest.mark.parametrize(
    ("make", "targets", "error", "said"),
    [
        (
            vit,
            ["projection"],
            TypeError,
            "projection is a Conv2d, which has no in and out features",
        ),
        (mamba2, ["conv1d"], TypeError, "conv1d is a Conv1d, which has no in and out features"),
        (mamba2, ["in_proj"], ValueError, "out_features = 82; these do: 1, 2 "),
    ],
)
def test_projections_that_cannot_be_adapted_are_named_with_the_reason(make, targets, error, said):
    with pytest.raises(error, match=said):
        c3a.patch_model(make()[0], targets, 4)
