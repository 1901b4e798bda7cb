"""save_pretrained of patched models, Trainer's checkpoints, and adapters saved alone."""

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, TrainingArguments

import c3a
from c3a.trainer import AdapterCallback
from tiny_model import write_model

pytestmark = [
    # torch's and transformers' own, from within Trainer
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is an Enum subclass.*"),
    pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded:UserWarning"),
]
X = torch.stack([torch.arange(1, 9), torch.arange(15, 7, -1), torch.arange(8) % 3 + 5])
CANNOT = "ignore:.*from_pretrained cannot:UserWarning"


@pytest.fixture(autouse=True, scope="module")
def quiet():
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_model(
        tmp_path_factory.mktemp("bert") / "model", transformers.BertForSequenceClassification
    )


def classifier(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def patched(folder, **options):
    torch.manual_seed(1)
    model = classifier(folder)
    options = {"init": "gaussian", "modules_to_save": ["classifier"], **options}
    c3a.patch_model(model, "all-linear", 6, **options)
    with torch.no_grad():
        model.classifier.weight.normal_()
    return model


def llama(**changes):
    sizes = {
        "vocab_size": 16,
        "hidden_size": 12,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    config = transformers.LlamaConfig(**{**sizes, **changes})
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def outputs(model):
    found = model(X, output_hidden_states=True)
    return torch.cat([found.hidden_states[-1].flatten(), found.logits.flatten()])


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def state_of(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_same_state(got, expected):
    assert got.keys() == expected.keys()
    assert [key for key in got if not torch.equal(got[key], expected[key])] == []


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_patched_models_folder_gives_the_same_function_to_from_pretrained(bert, tmp_path):
    model = patched(bert)
    assert not torch.allclose(outputs(model), outputs(classifier(bert)), atol=0.1)
    model.save_pretrained(tmp_path)
    assert_close(outputs(classifier(tmp_path)), outputs(model))
    names = set(load_file(tmp_path / "model.safetensors"))
    base = set(classifier(bert).state_dict())
    assert names == base | {n for n, p in model.named_parameters() if n.endswith("c3a_kernel")}
    again = c3a.load_pretrained(AutoModelForSequenceClassification, tmp_path)
    assert_same_state(state_of(again), state_of(model))
    assert c3a.summary(again).adapter == c3a.summary(model).adapter


def test_where_peft_is_not_installed_a_folder_gives_the_base_and_says_so(
    bert, tmp_path, monkeypatch, caplog
):
    model = patched(bert)
    model.save_pretrained(tmp_path)
    for module in (transformers.integrations.peft, transformers.models.auto.auto_factory):
        monkeypatch.setattr(module, "is_peft_available", lambda *_: False)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()  # which other tests may have lowered
    try:
        base = classifier(tmp_path)
    finally:
        transformers.logging.set_verbosity(verbosity)
    assert re.search(r"bert\.pooler\.dense\.c3a_kernel +\| UNEXPECTED", caplog.text)
    expected = state_of(model)
    base_and_head = c3a.unpatch_model(model)  # to which the trained head comes back
    base_and_head.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert_close(outputs(base), outputs(base_and_head))
    assert_same_state(state_of(c3a.load_adapter(base, tmp_path)), expected)


def test_a_plain_base_and_a_saved_folder_load_into_a_patched_model(bert, tmp_path):
    model = patched(bert)
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    again = patched(bert)
    found = again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert not found.missing_keys + found.unexpected_keys
    assert torch.equal(outputs(again), expected)
    c3a.merge(again)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_close(outputs(again), expected)
    plain = {key: 2 * t for key, t in classifier(bert).state_dict().items()}
    found = model.load_state_dict(plain, strict=False)
    assert not found.unexpected_keys
    assert all(key.endswith("c3a_kernel") for key in found.missing_keys)
    layer = model.bert.pooler.dense
    assert torch.equal(layer.base_layer.weight, plain["bert.pooler.dense.weight"])
    assert torch.equal(layer.base_layer.bias, plain["bert.pooler.dense.bias"])
    with pytest.raises(RuntimeError, match=r"Missing key.*bert.pooler.dense.c3a_kernel"):
        model.load_state_dict(plain)


@pytest.mark.parametrize("disabled", [False, True])
def test_a_merged_models_folder_is_that_of_an_ordinary_model(disabled, bert, tmp_path):
    model = c3a.merge(patched(bert))
    expected = outputs(model)
    with c3a.disabled(model) if disabled else torch.no_grad():
        model.save_pretrained(tmp_path, state_dict=None if disabled else model.state_dict())
    assert set(load_file(tmp_path / "model.safetensors")) == set(classifier(bert).state_dict())
    assert not (tmp_path / "adapter_config.json").exists()
    assert_close(outputs(classifier(tmp_path)), expected)
    assert torch.equal(outputs(model), expected)


def test_what_cannot_be_written_rightly_is_refused_before_anything_is_written(bert, tmp_path):
    model = patched(bert)
    model.save_pretrained(tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="expected push_to_hub=False for a patched model"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(ValueError, match="expected distributed_checkpoint=False"):
        model.save_pretrained(tmp_path, distributed_checkpoint=True)
    model.bert.pooler.dense.merge()
    with pytest.raises(
        ValueError, match=r"some layers are merged \(bert.pooler.dense\) and some not \(bert.enc"
    ):
        model.save_pretrained(tmp_path)
    c3a.merge(model)
    with pytest.raises(ValueError, match="holds an adapter .*would add to the merged weights"):
        model.save_pretrained(tmp_path)
    c3a.unmerge(model)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["classifier"]), model)
    with pytest.raises(ValueError, match=r"save_pretrained: .* the PEFT library's adapters"):
        model.save_pretrained(tmp_path)
    assert files(tmp_path) == before


@pytest.mark.parametrize("broken", ["base", "adapter"])
def test_a_save_that_fails_leaves_the_folder_as_it_was(broken, bert, tmp_path, monkeypatch):
    model = patched(bert)
    model.save_pretrained(tmp_path)
    before = files(tmp_path)

    def fail(*_args, **_kwargs):
        raise OSError("no space left")

    with torch.no_grad():
        model.classifier.weight.add_(1)
    where = {"base": "transformers.modeling_utils.safe_save_file"}
    monkeypatch.setattr(where.get(broken, "c3a.adapter_files.save_file"), fail)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path)
    assert files(tmp_path) == before


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["lm_head", "q_proj"]], ids=str)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.*:UserWarning")
def test_tied_weights_and_shards(merged, targets, tmp_path):
    model = llama()
    c3a.patch_model(model, targets, 4, init="gaussian")
    if merged:
        c3a.merge(model)
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (
        merged and "lm_head" in targets
    )
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert not (tmp_path / "model.safetensors").exists()
    shards = {p.name for p in tmp_path.glob("model-*.safetensors")}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert shards == set(index["weight_map"].values())
    assert len(shards) > 2
    assert_close(outputs(transformers.LlamaForCausalLM.from_pretrained(tmp_path)), outputs(model))
    if not merged:
        again = c3a.load_pretrained(transformers.LlamaForCausalLM, tmp_path)
        assert_same_state(state_of(again), state_of(model))
        again.lm_head.requires_grad_(False)
        for parameter in again.parameters():
            parameter.data.zero_()
        transformers.trainer_utils.load_sharded_checkpoint(again, tmp_path, strict=False)
        assert_same_state(state_of(again), state_of(model))
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model-*.safetensors")) + list(tmp_path.glob("*.index.json"))
    assert_close(outputs(transformers.LlamaForCausalLM.from_pretrained(tmp_path)), outputs(model))


def test_options_of_transformers_keep_their_meaning(bert, tmp_path):
    model = patched(bert).bfloat16()
    state = model.state_dict()
    given = {key: t.float() for key, t in state.items()}
    names = list(given)
    model.save_pretrained(tmp_path, True, given, variant="fp32", save_original_format=False)
    assert list(given) == names
    saved = load_file(tmp_path / "model.fp32.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    kernel = load_file(tmp_path / "adapter_model.safetensors")
    assert kernel["base_model.model.bert.pooler.dense.c3a_kernel"].dtype == torch.float32
    again = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, variant="fp32", dtype=torch.bfloat16
    )
    ours, theirs = outputs(model), outputs(again)
    assert (ours - theirs).norm() < 0.03 * ours.norm()
    model.save_pretrained(tmp_path / "not main", is_main_process=False)
    assert not list((tmp_path / "not main").iterdir())


@pytest.mark.filterwarnings(CANNOT)
def test_what_peft_cannot_load_is_said_and_refused_by_from_pretrained(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=16, n_embd=12, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    c3a.patch_model(model, ["c_attn", "c_fc"], 6, init="gaussian")
    with pytest.warns(UserWarning, match=r"from_pretrained cannot.*c_attn \(Conv1D\)") as warned:
        model.save_pretrained(tmp_path)
    assert warned[0].filename == __file__
    with pytest.raises(TypeError, match="Conv1D.* is not supported"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    again = c3a.load_pretrained(transformers.GPT2LMHeadModel, tmp_path)
    assert_same_state(state_of(again), state_of(model))
    c3a.merge(model).save_pretrained(tmp_path / "merged")
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    assert_close(outputs(merged), outputs(model))


@pytest.mark.parametrize("patched_first", [False, True])
def test_what_accelerate_has_offloaded_is_saved(patched_first, tmp_path):
    import accelerate

    model = llama()
    c3a.patch_model(model, ["q_proj", "down_proj"], 4, init="gaussian")
    expected, kernels = outputs(model), {k: v.clone() for k, v in model.state_dict().items()}
    if not patched_first:
        c3a.unpatch_model(model)
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    model = accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=tmp_path / "offloaded", force_hooks=True
    )
    assert any(p.is_meta for p in model.parameters())
    if not patched_first:
        c3a.patch_model(model, ["q_proj", "down_proj"], 4)
        for name, layer in c3a.patch.adapted_layers(model).items():
            layer.c3a_kernel = torch.nn.Parameter(kernels[f"{name}.c3a_kernel"])
    assert_close(outputs(model), expected)
    model.save_pretrained(tmp_path / "saved")
    assert_close(
        outputs(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved")), expected
    )


def test_a_quantised_base_is_saved_with_its_kernels(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig

    llama(hidden_size=16, intermediate_size=32).save_pretrained(tmp_path / "base")
    quantised = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantised
    )
    c3a.patch_model(model, ["q_proj", "down_proj"], 4, init="gaussian")
    model.save_pretrained(tmp_path / "saved")
    saved = c3a.load_pretrained(transformers.LlamaForCausalLM, tmp_path / "saved")
    assert_close(outputs(saved), outputs(model))
    assert type(saved.model.layers[0].self_attn.q_proj.base_layer.weight).__name__ != "Parameter"


def test_copies_and_pickles_save_themselves(bert, tmp_path):
    model = patched(bert)
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            twin.bert.encoder.layer[1].output.dense.c3a_kernel.normal_(0, 20)
        folder = tmp_path / str(number)
        twin.save_pretrained(folder)
        assert_close(outputs(classifier(folder)), outputs(twin))
        assert not torch.allclose(outputs(twin), outputs(model), atol=1e-3)
        c3a.unpatch_model(twin)
        assert "save_pretrained" not in vars(twin)
    assert "save_pretrained" in vars(model)


def test_unpatching_gives_every_save_pretrained_back(bert, tmp_path):
    model = classifier(bert)
    outputs(model)  # transformers' own marks
    before = {name: dict(vars(part)) for name, part in model.named_modules()}
    c3a.patch_model(model, ["query"], 6)
    assert {name for name, part in model.named_modules() if "save_pretrained" in vars(part)} == {
        "",
        "bert",
    }
    c3a.unpatch_model(model.bert)  # the whole has no adapter any more, and is an ordinary model
    model.save_pretrained(tmp_path / "in part")
    assert "adapter_config.json" not in os.listdir(tmp_path / "in part")
    assert_close(outputs(classifier(tmp_path / "in part")), outputs(model))
    c3a.unpatch_model(model)
    after = {name: dict(vars(part)) for name, part in model.named_modules()}
    assert {n: set(v) for n, v in after.items()} == {n: set(v) for n, v in before.items()}
    model.save_pretrained(tmp_path)
    assert_close(outputs(classifier(tmp_path)), outputs(model))


def test_a_part_of_a_patched_model_saves_itself(bert, tmp_path):
    model = patched(bert)
    model.bert.save_pretrained(tmp_path)
    again = transformers.BertModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_close(again(X).pooler_output, model.bert(X).pooler_output)


def test_a_model_that_only_the_call_has_is_saved(bert, tmp_path):
    patched(bert).save_pretrained(tmp_path)
    assert_close(outputs(classifier(tmp_path)), outputs(patched(bert)))


def test_the_hub_gets_the_adapter_too(bert, tmp_path, monkeypatch):
    model, sent = patched(bert), set()
    hub = SimpleNamespace(create_repo=lambda *_, **__: SimpleNamespace(repo_id="me/mine"))
    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card)
    monkeypatch.setattr(
        model, "_upload_modified_files", lambda folder, *_, **__: sent.update(os.listdir(folder))
    )
    model.push_to_hub("me/mine")
    assert {"model.safetensors", "adapter_model.safetensors", "adapter_config.json"} <= sent


def test_the_command_line_merges_a_saved_folder(bert, tmp_path):
    from c3a.cli import main

    model = patched(bert)
    model.save_pretrained(tmp_path / "saved")
    verbosity = transformers.logging.get_verbosity()
    try:
        assert main(["merge", str(tmp_path / "saved"), str(tmp_path / "merged")]) == 0
    finally:
        transformers.logging.set_verbosity(verbosity)
    assert_close(outputs(classifier(tmp_path / "merged")), outputs(model))


def test_a_model_with_pefts_layers_is_told_how_to_load_without_them(bert, tmp_path):
    patched(bert).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_pretrained found .* use c3a.load_pretrained"):
        c3a.load_adapter(classifier(tmp_path), tmp_path)


def test_compiled_models_save_themselves_too(bert, tmp_path):
    model = patched(bert, scale=0.1)
    torch.compile(model).save_pretrained(tmp_path)
    assert_close(outputs(classifier(tmp_path)), outputs(model))


def test_plain_modules_are_left_alone(tmp_path):
    model = c3a.patch_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), ["0"], 2)
    assert not hasattr(model, "save_pretrained")
    torch.save(model.state_dict(), tmp_path / "state")
    assert set(torch.load(tmp_path / "state")) == {
        "0.c3a_kernel",
        "0.base_layer.weight",
        "0.base_layer.bias",
    }


def test_a_folder_without_its_base_has_what_is_trained(bert, tmp_path):
    model = patched(bert)
    model.save_pretrained(tmp_path / "saved", with_base=False)
    trained = {n.replace(".base_layer", "") for n, p in model.named_parameters() if p.requires_grad}
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == trained
    assert not (tmp_path / "saved" / "config.json").exists()
    assert_close(outputs(classifier(tmp_path / "saved")), outputs(model))
    again = c3a.load_pretrained(AutoModelForSequenceClassification, tmp_path / "saved")
    assert_same_state(state_of(again), state_of(model))
    assert_same_state(
        state_of(c3a.load_adapter(classifier(bert), tmp_path / "saved")), state_of(model)
    )


def test_a_base_that_is_nowhere_else_is_not_left_out(bert, tmp_path):
    model = patched(bert)
    model.save_pretrained(tmp_path / "whole")
    before = files(tmp_path / "whole")
    with pytest.raises(ValueError, match="holds a model .config.json., whose weights would be"):
        model.save_pretrained(tmp_path / "whole", with_base=False)
    with pytest.raises(ValueError, match="with_base=True for a merged model"):
        c3a.merge(model).save_pretrained(tmp_path / "merged", with_base=False)
    made = c3a.patch_model(llama(), ["q_proj"], 4)
    with pytest.raises(ValueError, match="with_base=True for a model that from_pretrained has not"):
        made.save_pretrained(tmp_path / "made", with_base=False)
    with pytest.raises(ValueError, match="with_base=True for a model that from_pretrained has not"):
        trainer_of(made, tmp_path / "run", [AdapterCallback(with_base=False)]).train()
    plain = c3a.patch_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), ["0"], 2)
    with pytest.raises(ValueError, match="expected a patched model of transformers"):
        AdapterCallback(with_base=False).on_train_begin(None, None, None, model=plain)
    assert files(tmp_path / "whole") == before


# Trainer


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = torch.tensor([2, 5 + i % 11, 6 + i % 7, 3])
        return {"input_ids": ids, "labels": torch.tensor(i % 2)}


def trainer_of(model, folder, callbacks=(), **options):
    options = {
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
        "use_cpu": True,
        **options,
    }
    return transformers.Trainer(
        model,
        TrainingArguments(folder, **options),
        train_dataset=Sentences(),
        eval_dataset=Sentences(),
        callbacks=list(callbacks),
    )


def test_trainer_resumes_from_the_middle_to_the_same_bits(bert, tmp_path, caplog):
    whole = patched(bert, init="zeros")
    trainer_of(whole, tmp_path / "whole").train()
    expected = state_of(whole)
    assert any(expected[key].any() for key in expected if key.endswith("c3a_kernel"))

    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    resumed = patched(bert, init="gaussian")
    trainer_of(resumed, tmp_path / "run").train(resume_from_checkpoint=True)
    assert_same_state(state_of(resumed), expected)
    assert "missing keys" not in caplog.text
    assert "unexpected keys" not in caplog.text

    whole.eval()
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    assert_close(outputs(classifier(checkpoint)), outputs(whole))
    loaded = c3a.load_pretrained(AutoModelForSequenceClassification, checkpoint)
    assert_same_state(state_of(loaded), expected)


def test_trainer_resumes_from_checkpoints_without_the_base(bert, tmp_path, caplog):
    whole = patched(bert, init="zeros")
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "bf16": True}
    callback = AdapterCallback(with_base=False)
    trainer = trainer_of(whole, tmp_path / "whole", [callback], **options)
    trainer.train()
    expected = state_of(whole)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert len(load_file(checkpoint / "model.safetensors")) == sum(
        parameter.requires_grad for parameter in whole.parameters()
    )

    shutil.copytree(checkpoint, tmp_path / "run" / "checkpoint-3")
    resumed = patched(bert, init="gaussian")
    again = trainer_of(resumed, tmp_path / "run", [AdapterCallback(with_base=False)], **options)
    again.train(resume_from_checkpoint=True)
    assert_same_state(state_of(resumed), expected)
    assert "missing keys" not in caplog.text
    assert "unexpected keys" not in caplog.text

    last = tmp_path / "whole" / "checkpoint-6"
    loaded = c3a.load_pretrained(AutoModelForSequenceClassification, last)
    assert_same_state(state_of(loaded), expected)
    trainer.save_model(str(tmp_path / "saved"))  # not one of Trainer's checkpoints
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) > set(
        classifier(bert).state_dict()
    )


def trained_to_a_best_third_step(model, folder, callback):
    """Train; of the evaluations after steps 3 and 6 the first one is the better."""
    trainer = trainer_of(
        model,
        folder,
        [callback],
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    scores = iter([2.0, 1.0])
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *a, **k: {**evaluate(*a, **k), "eval_score": next(scores)}
    trainer.train()
    return trainer


def test_trainer_takes_the_best_of_checkpoints_without_the_base(bert, tmp_path):
    model = patched(bert, init="zeros")
    trained_to_a_best_third_step(model, tmp_path, AdapterCallback(every=3, with_base=False))
    best = c3a.load_adapter(classifier(bert), tmp_path / "adapter-3")
    assert_same_state(state_of(model), state_of(best))


def by_hand(model, batch, accumulated=1, clip=1.0, dtype=None):
    """Do what Trainer does in six steps, on sentences in their order."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
    sentences, losses, norms = Sentences(), [], []
    for step in range(6):
        optimizer.zero_grad()
        loss = 0.0
        for part in range(accumulated):
            start = (step * accumulated + part) * batch
            rows = [sentences[i % len(sentences)] for i in range(start, start + batch)]
            inputs = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                found = model(**inputs).loss / accumulated
            found.backward()
            loss += found.item()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, clip).item())
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] -= 0.01 / 6
        losses.append(loss)
    return losses, norms


@pytest.mark.parametrize(
    ("options", "settings", "tolerance"),
    [
        pytest.param({}, {}, 1e-5, id="plain"),
        pytest.param(
            {"gradient_accumulation_steps": 2},
            {"batch": 2, "accumulated": 2},
            1e-5,
            id="accumulated",
        ),
        pytest.param({"max_grad_norm": 0.05}, {"clip": 0.05}, 1e-5, id="clipped"),
        pytest.param({"bf16": True}, {"dtype": torch.bfloat16}, 1e-2, id="bfloat16"),
        pytest.param({"torch_compile": True}, {}, 1e-3, marks=pytest.mark.slow, id="compiled"),
    ],
)
def test_trainer_does_what_a_loop_does(options, settings, tolerance, tmp_path):
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    write_model(tmp_path / "bert", transformers.BertForSequenceClassification, **quiet)
    model, single = (patched(tmp_path / "bert", init="zeros") for _ in range(2))
    settings = {"batch": 4, **settings}
    trainer = trainer_of(
        model,
        tmp_path / "run",
        save_strategy="no",
        logging_steps=1,
        per_device_train_batch_size=settings["batch"],
        train_sampling_strategy="sequential",
        learning_rate=0.01,
        **options,
    )
    # BERT takes the number of items, which a mean over several batches needs, and ignores it
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    losses, norms = by_hand(single, **settings)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    torch.testing.assert_close(
        [entry["loss"] for entry in logged], losses, rtol=tolerance, atol=max(tolerance, 1e-4)
    )
    torch.testing.assert_close(
        [float(entry["grad_norm"]) for entry in logged],
        norms,
        rtol=10 * tolerance,
        atol=max(tolerance, 1e-4),
    )
    kernels = [layer.c3a_kernel for layer in c3a.patch.adapted_layers(model).values()]
    assert {kernel.dtype for kernel in kernels} == {torch.float32}
    assert all(kernel.any() for kernel in kernels)


def test_trainer_loads_the_best_model_and_saves_it(bert, tmp_path):
    model = patched(bert, init="zeros")
    trainer = trained_to_a_best_third_step(model, tmp_path, AdapterCallback(every=3))
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    best = c3a.load_pretrained(AutoModelForSequenceClassification, tmp_path / "checkpoint-3")
    assert_same_state(state_of(model), state_of(best))
    trainer.save_model(str(tmp_path / "saved"))
    assert_close(outputs(classifier(tmp_path / "saved")), outputs(model.eval()))
    # the callback's last one is the best model, too
    last = c3a.load_adapter(classifier(bert), tmp_path / "adapter")
    assert_same_state(state_of(last), state_of(model))
    step = c3a.load_adapter(classifier(bert), tmp_path / "adapter-6")
    assert not torch.allclose(outputs(step), outputs(model), atol=1e-5)


def test_the_callback_saves_adapters_alone(bert, tmp_path):
    model = patched(bert, init="zeros")
    expected = {
        "epoch": ("epoch", None, {"adapter", "adapter-4", "adapter-6"}),
        "steps": (4, None, {"adapter", "adapter-4"}),
        "newest": (2, 2, {"adapter", "adapter-4", "adapter-6"}),
    }
    callbacks = [
        AdapterCallback(tmp_path / name, every, keep=keep, task_type="SEQ_CLS")
        for name, (every, keep, _) in expected.items()
    ]
    trainer_of(model, tmp_path / "run", callbacks, save_strategy="no").train()
    assert not list((tmp_path / "run").glob("*"))
    for name, (_, _, saved) in expected.items():
        assert {path.name for path in (tmp_path / name).iterdir()} == saved
        for folder in (tmp_path / name).iterdir():
            assert set(files(folder)) == {"adapter_model.safetensors", "adapter_config.json"}
            assert c3a.adapter.read_adapter(folder).config["task_type"] == "SEQ_CLS"
        loaded = c3a.load_adapter(classifier(bert), tmp_path / name / "adapter")
        assert_same_state(state_of(loaded), state_of(model))


def test_the_callback_is_of_the_main_process_and_keeps_the_newest(bert, tmp_path):
    model, callback = patched(bert), AdapterCallback(every=1, keep=2)
    arguments = SimpleNamespace(output_dir=str(tmp_path))
    for step, is_main in ((7, True), (8, True), (5, True), (6, False)):
        state = SimpleNamespace(global_step=step, is_world_process_zero=is_main)
        callback.on_step_end(arguments, state, None, model=model)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter-8", "adapter-5"}
    callback.on_train_end(arguments, state, None, model=model)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": "step"}, "expected every to be 'epoch' or a number of steps >= 1, got 'step'"),
        ({"every": 0}, "expected every to be .*got 0"),
        ({"every": True}, "expected every to be .*got True"),
        ({"keep": 0}, "expected keep to be a number >= 1, got 0"),
    ],
)
def test_the_callback_says_what_it_expects(options, message):
    with pytest.raises(ValueError, match=message):
        AdapterCallback(**options)


def test_the_callback_refuses_a_model_without_adapters_when_training_begins(bert, tmp_path):
    with pytest.raises(ValueError, match="the model has no C3ALinear layer; patch it before"):
        trainer_of(classifier(bert), tmp_path, [AdapterCallback()]).train()


def test_the_callback_needs_transformers_and_the_package_does_not():
    program = """
import sys
sys.modules["transformers"] = None
import c3a
try:
    import c3a.trainer
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "needs the transformers library: pip install 'c3a[finetune]'" in done.stdout


def test_sentence_transformers_saves_what_it_can_load(bert, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_model(tmp_path / "bert")
        model = sentence_transformers.SentenceTransformer(str(tmp_path / "bert"), device="cpu")
        c3a.patch_model(model, ["query", "value"], 6, init="gaussian")
        model.save_pretrained(str(tmp_path / "saved"))
        again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
        got, expected = (m.encode("the film was good") for m in (again, model))
    assert abs(got - expected).max() < 1e-4
