"""The command line, end to end on a tiny model and file; the packaged data."""

import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import httpx2 as httpx
import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import c3a
from c3a.cli import data, finetune, main
from c3a.files import write_folder
from tiny_model import WORDS, write_model, write_reviews

pytestmark = pytest.mark.filterwarnings(
    # torch's and transformers' own, from within Trainer
    "ignore::DeprecationWarning:(torch|transformers|accelerate)",
    "ignore::FutureWarning",
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("reviews") / "reviews.csv")


def arguments(tiny, reviews, output, *more):
    columns = ["--text-column", "review", "--label-column", "verdict"]
    where = ["--model", str(tiny), "--data", str(reviews), *columns, "--output", str(output)]
    return ["finetune", *where, "--batch-size", "8", *map(str, more)]


@pytest.fixture(scope="session")
def run(tiny, reviews, tmp_path_factory) -> Path:
    """The output folder of a C3A run that had the time to learn."""
    output = tmp_path_factory.mktemp("run") / "out"
    assert main(arguments(tiny, reviews, output, "--block-size", 12, "--steps", 60)) == 0
    return output


def test_finetune_learns_and_leaves_the_adapter_metrics_and_curve(run):
    assert sorted(path.name for path in run.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "curve.png",
        "metrics.json",
    ]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test_accuracy"] >= 0.9
    assert metrics["labels"] == ["no", "yes"]
    # 2 layers of query, key, value, output (24 x 24), up, down (24 x 48); the pooler (24 x 24)
    assert metrics["adapter_parameters"] == (2 * (4 * 24 * 24 + 2 * 24 * 48) + 24 * 24) // 12
    assert metrics["head_parameters"] == 24 * 2 + 2
    assert metrics["saved_bytes"] > 0
    assert metrics["seconds_per_step"] > 0
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_adapter_gives_the_tested_accuracy_when_loaded_here_and_in_peft(run, tiny, reviews):
    import peft

    examples = data.read(reviews, "review", "verdict")
    _, _, test = data.split(examples, seed=0)
    expected = json.loads((run / "metrics.json").read_text())["test_accuracy"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    batch = tokenizer(test.texts, padding=True, return_tensors="pt")

    def base():
        config = transformers.AutoConfig.from_pretrained(run)
        return transformers.AutoModelForSequenceClassification.from_pretrained(tiny, config=config)

    outputs = []
    for model in (c3a.load_adapter(base(), run), peft.PeftModel.from_pretrained(base(), run)):
        with torch.no_grad():
            outputs.append(model.eval()(**batch).logits)
        accuracy = (outputs[-1].argmax(-1) == torch.tensor(test.labels)).double().mean().item()
        assert accuracy == pytest.approx(expected)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


def test_merge_writes_an_ordinary_model_with_the_same_outputs(run, tiny, tmp_path, capsys):
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
    assert "13 layers" in capsys.readouterr().out
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "no", 1: "yes"}
    assert not any("c3a" in key for key in merged.state_dict())
    config = transformers.AutoConfig.from_pretrained(run)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny, config=config)
    c3a.load_adapter(model, run)
    batch = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")(
        ["the film was great"], return_tensors="pt"
    )
    expected = model.eval()(**batch).logits
    torch.testing.assert_close(merged.eval()(**batch).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "bitfit", "head", "full"])
def test_every_method_runs_and_saves(method, tiny, reviews, tmp_path, capsys):
    output = tmp_path / method
    options = ["--method", method, "--steps", 3, "--target-modules", "query", "value"]
    assert main(arguments(tiny, reviews, output, *options)) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    expected = {
        "lora": 4 * 8 * 2 * 24,  # rank 8
        "bitfit": 2 * (4 * 24 + 48 + 24 + 2 * 24) + 24 + 24,
        "head": 0,
        "full": transformers.BertModel.from_pretrained(tiny).num_parameters(),
    }
    assert metrics["adapter_parameters"] == expected[method]
    assert metrics["head_parameters"] == 50
    weights = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    assert (output / weights).exists()
    assert method in capsys.readouterr().out


def test_json_lines_steps_regex_and_compile(tiny, tmp_path):
    path = tmp_path / "reviews.jsonl"
    rows = [{"text": f"the film was {WORDS[i % 6]}", "label": (i % 6) // 3} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    options = ["--model", str(tiny), "--data", str(path), "--output", str(tmp_path / "out")]
    options += ["--target-modules", r".*\.(query|value)", "--steps", "2", "--compile"]
    assert main(["finetune", *options]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["query", "value"]
    assert config["block_size"] == 3  # 24 over the default rank of 8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere.csv"], "c3a: nowhere.csv: No such file or directory\n"),
        (["--data", "text.parquet"], "expected a file ending in .csv, .tsv, .jsonl, .json"),
        (["--text-column", "body"], "expected a column 'body', there are review, verdict"),
        (["--target-modules", "q_proj"], "no module is named 'q_proj'; linear layers of the model"),
        (["--target-modules", "(", "--method", "lora"], "--target-modules (: "),
        (["--block-size", "7"], "block_size 7 does not divide in_features = 24"),
        (["--steps", "0"], "expected 0 < --steps < 2**31, got 0"),
        (["--epochs", "inf"], "expected 0 < --epochs < 2**31, got inf"),
        (["--epochs", "nan"], "expected 0 < --epochs < 2**31, got nan"),
        (["--lr", "nan"], "expected 0 < --lr < 2**31, got nan"),
        (["--lr", "-1"], "expected 0 < --lr < 2**31, got -1"),
        (["--head-lr", "inf"], "expected 0 < --head-lr < 2**31, got inf"),
        (["--head-lr", "0"], "expected 0 < --head-lr < 2**31, got 0"),
        (["--seed", "-1"], "expected 0 <= --seed < 2**32, got -1"),
        (["--max-length", "2"], "expected --max-length > 2, the special tokens of this model"),
        (["--rank", "25", "--method", "lora"], "expected --rank <= 24, the largest rank"),
        (["--model", "./nowhere"], "or a hub's name, there is no folder ./nowhere"),
        (["--model", __file__], f"or a hub's name, {__file__} is a file"),
        (["--model", "no name"], "there is no folder no name here: and no hub has such names"),
        (["--model", str(Path(__file__).parent)], "holds no config.json"),
    ],
)
def test_bad_input_is_one_clear_line_and_writes_nothing(
    more, message, tiny, reviews, tmp_path, capsys
):
    output = tmp_path / "out"
    assert main(arguments(tiny, reviews, output, *more)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("c3a: ")
    assert "c3a." not in said
    assert not output.exists()


def test_texts_longer_than_the_model_takes_are_told_before_training(tiny, tmp_path, capsys):
    path = tmp_path / "long.csv"
    rows = [f"{'a ' * 40 if i == 7 else ''}film,{i % 2}" for i in range(40)]
    path.write_text("text,label\n" + "\n".join(rows))
    command = ["finetune", "--model", str(tiny), "--data", str(path), "--steps", "2"]
    assert main(command) == 2
    assert "the model cannot take a text of 43 tokens (--max-length): " in capsys.readouterr().err
    assert main([*command, "--max-length", "32"]) == 0


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        (["--method", "full", "--lr", "1e9", "--steps", "50"], 1.0),
        (["--steps", "1"], math.nan),
    ],
)
def test_a_loss_that_is_not_finite_ends_the_run(options, weight, reviews, tmp_path, capsys):
    base = write_model(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["encoder.layer.1.output.LayerNorm.weight"].fill_(weight)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert main(arguments(base, reviews, tmp_path / "out", *options)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"c3a: the loss is (nan|inf) after \d+ steps; nothing was written", said)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_nothing_half_written(tiny, reviews, tmp_path):
    output = tmp_path / "out"
    command = arguments(tiny, reviews, output, "--steps", 2_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "c3a", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    shown = ""
    while "validation=" not in shown:  # the first is over: training goes on
        shown += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted; nothing was written" in errors
    assert list(tmp_path.iterdir()) == []


def test_the_default_run_starts_on_the_packaged_model_and_data(tmp_path, capsys):
    assert main(["finetune", "--steps", "2", "--output", str(tmp_path / "out")]) == 0
    assert "5974 sentences to train on, 852 to validate, 1704 to test" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert 0.4 < metrics["test_accuracy"] <= 1
    assert main(["inspect", str(tmp_path / "out")]) == 0


def test_outputs_are_new_folders_or_replace_an_earlier_run_whole(tiny, reviews, tmp_path, capsys):
    output = tmp_path / "out"
    options = ["--method", "head", "--steps", "1"]
    output.mkdir()
    (output / "notes.txt").touch()
    assert main(arguments(tiny, reviews, output, *options)) == 2
    assert "a new or empty folder" in capsys.readouterr().err
    (output / "notes.txt").unlink()
    assert main(arguments(tiny, reviews, output, *options)) == 0
    assert (output / "model.safetensors").exists()
    assert main(arguments(tiny, reviews, output, "--steps", "1")) == 0
    assert (output / "adapter_model.safetensors").exists()
    assert not (output / "model.safetensors").exists()
    assert list(tmp_path.iterdir()) == [output]
    assert main(["merge", str(output), str(output)]) == 2
    assert "a new or empty folder" in capsys.readouterr().err
    assert main(arguments(tiny, reviews, output, "--method", "head", "--lr", "1")) == 2
    assert "--method head takes --head-lr" in capsys.readouterr().err


def test_ctrl_c_is_told_also_where_a_library_turns_it_into_another_error(monkeypatch, capsys):
    def run(options):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("a library's own") from None

    monkeypatch.setattr(finetune, "run", run)
    before = signal.getsignal(signal.SIGINT)
    assert main(["finetune"]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_folder_is_as_it_was(existing, tmp_path):
    folder = tmp_path / "out"
    if existing:
        folder.mkdir()
        (folder / "old").touch()

    def write(fresh):
        (fresh / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, write)
    assert [path.name for path in tmp_path.rglob("*")] == (["out", "old"] if existing else [])


def with_config(run: Path, folder: Path, name: str = "adapter_config.json", **changes) -> Path:
    """Return a copy of an adapter's folder with another configuration."""
    if not folder.exists():
        shutil.copytree(run, folder)
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**config, **changes}))
    return folder


def test_merge_says_where_the_base_model_should_have_been(run, tmp_path, capsys):
    adapter = with_config(run, tmp_path / "adapter", base_model_name_or_path="/home/someone/else")
    assert main(["merge", str(adapter), str(tmp_path / "merged")]) == 2
    assert "there is no folder /home/someone/else; pass --model" in capsys.readouterr().err
    adapter = with_config(run, tmp_path / "adapter", base_model_name_or_path=str(run))
    assert main(["merge", str(adapter), str(tmp_path / "merged")]) == 2
    assert f"{run} holds an adapter" in capsys.readouterr().err


GPT2 = transformers.GPT2Config(vocab_size=16, n_embd=24, n_layer=2, n_head=2, n_positions=32)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (transformers.BertModel, {"num_hidden_layers": 3}, "16 beyond the model (encoder.layer.2"),
        (
            transformers.BertForPreTraining,
            {"num_hidden_layers": 3},
            "16 beyond the model (bert.encoder.layer.2",
        ),
        (transformers.BertModel, {"num_hidden_layers": 1}, "16 missing (bert.encoder.layer.1."),
        (transformers.BertModel, {"hidden_size": 12}, "of another size (bert.embeddings."),
        (transformers.BertModel, {"vocab_size": 20}, "1 of another size (bert.embeddings.word"),
        (transformers.BertForMaskedLM, {}, "2 missing (bert.pooler.dense.bias, bert.pooler"),
        (lambda _: transformers.GPT2Model(GPT2), {}, " missing (bert.embeddings.LayerNorm"),
    ],
)
def test_merge_refuses_a_base_without_its_weights(kind, changes, message, run, tmp_path, capsys):
    base = write_model(tmp_path / "base", kind, **changes)
    shutil.copy(run / "config.json", base / "config.json")
    assert main(["merge", str(run), str(tmp_path / "merged"), "--model", str(base)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"c3a: the weights of {base} are not those of this BertForSequence")
    assert message in said
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (transformers.BertModel, {"num_hidden_layers": 3}, "num_hidden_layers 2, {} has 3"),
        (transformers.BertModel, {"vocab_size": 20}, "vocab_size 16, {} has 20"),
        (lambda _: transformers.GPT2Model(GPT2), {}, "model_type 'bert', {} has 'gpt2'"),
    ],
)
def test_merge_refuses_a_base_of_other_sizes(kind, changes, message, run, tmp_path, capsys):
    base = write_model(tmp_path / "base", kind, **changes)
    assert main(["merge", str(run), str(tmp_path / "merged"), "--model", str(base)]) == 2
    said = capsys.readouterr().err
    assert f"c3a: the model of {run} has {message.format(base)}" in said
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (transformers.BertForPreTraining, {}),  # heads that a classifier lacks
        (transformers.BertForSequenceClassification, {"num_labels": 5}),
    ],
)
def test_merge_takes_a_base_with_another_head(kind, changes, run, tmp_path):
    base = write_model(tmp_path / "base", kind, **changes)
    assert main(["merge", str(run), str(tmp_path / "merged"), "--model", str(base)]) == 0
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == 2


def test_finetune_takes_a_base_without_a_pooler_and_no_more_than_that(
    tiny, reviews, tmp_path, capsys
):
    base = write_model(tmp_path / "base", transformers.BertForMaskedLM)
    output = tmp_path / "out"
    assert main(arguments(base, reviews, output, "--steps", "1")) == 0
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "bert.pooler.dense"]
    shutil.rmtree(output)

    weights = load_file(tiny / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert main(arguments(base, reviews, output, "--steps", "1")) == 2
    said = capsys.readouterr().err
    assert f"the weights of {base} are not those of this BertForSequenceClassification" in said
    assert "1 missing (bert.encoder.layer.1.output.dense.weight)" in said
    assert not output.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": ["no", "yes"]}, "expected id2label to be a mapping from indices to names"),
        ({"id2label": {"first": "no"}}, "expected id2label to be a mapping from indices to names"),
        ({"label2id": {"no": "0"}}, "expected label2id to be a mapping from names to indices"),
        ({"pad_token_id": -1}, "expected pad_token_id to be a token's number, got -1"),
        ({"problem_type": 1}, "expected problem_type to be a name, got 1"),
    ],
)
def test_labels_of_wrong_types_are_named(changes, message, run, tmp_path, capsys):
    adapter = with_config(run, tmp_path / "adapter", "config.json", **changes)
    assert main(["merge", str(adapter), str(tmp_path / "merged")]) == 2
    assert f"c3a: {adapter / 'config.json'}: {message}" in capsys.readouterr().err


def test_code_that_comes_with_a_folder_is_never_run(run, tiny, reviews, tmp_path, capsys):
    code = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
    auto_map = {
        "AutoConfig": "evil.Config",
        "AutoModelForSequenceClassification": "evil.Model",
    }
    for kind in ("bert", "unheard-of"):
        adapter = tmp_path / f"adapter-{kind}"
        with_config(run, adapter, "config.json", model_type=kind, auto_map=auto_map)
        base = tmp_path / f"base-{kind}"
        with_config(tiny, base, "config.json", model_type=kind, auto_map=auto_map)
        for folder in (adapter, base):
            (folder / "evil.py").write_text(code)
        expected = 0 if kind == "bert" else 2
        merged = tmp_path / f"merged-{kind}"
        assert main(["merge", str(adapter), str(merged)]) == expected
        command = arguments(base, reviews, tmp_path / f"out-{kind}", "--steps", "1")
        assert main(command) == expected
    assert not list(tmp_path.rglob("ran"))
    adapter = with_config(run, tmp_path / "adapter", "config.json", attn_implementation="some/code")
    assert main(["merge", str(adapter), str(tmp_path / "merged")]) == 0


class TestHub:
    """Models by name. Nothing here asks the hub: its answer is the test's."""

    @pytest.fixture
    def answer(self, monkeypatch):
        """Call it with what the hub is to raise; it returns the list of names asked for."""

        def set_answer(error):
            asked = []

            def model_info(self, name, *, timeout):
                assert timeout <= 10
                asked.append(name)
                raise error

            monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
            return asked

        return set_answer

    def not_found(self):
        request = httpx.Request("GET", "https://huggingface.co")
        response = httpx.Response(404, request=request)
        return huggingface_hub.errors.RepositoryNotFoundError("404", response=response)

    def test_a_name_is_asked_for_once_and_not_found_or_not_reachable(
        self, answer, reviews, tmp_path, capsys
    ):
        asked = answer(self.not_found())
        command = arguments("bert-base-uncasedd", reviews, tmp_path / "out")
        assert main(command) == 2
        assert "and no public model of that name at https://" in capsys.readouterr().err
        assert asked == ["bert-base-uncasedd"]
        asked = answer(httpx.ConnectError("Name or service not known"))
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "the local cache has no such model, and https://" in said
        assert "cannot be reached (ConnectError: Name or service not known)" in said
        assert asked == ["bert-base-uncasedd"]

    def test_a_path_is_never_asked_for(self, answer, reviews, tmp_path, capsys):
        asked = answer(self.not_found())
        for path in (reviews, "./nowhere", "/no/where", "~/no/where", "a/b/c"):
            assert main(arguments(path, reviews, tmp_path / "out")) == 2
        assert asked == []

    def test_a_cached_model_works_offline(
        self, answer, tiny, reviews, tmp_path, monkeypatch, capsys
    ):
        cache = tmp_path / "cache"
        folder = cache / "models--someone--tiny"
        shutil.copytree(tiny, folder / "snapshots" / ("0" * 40))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        answer(httpx.ConnectError("Name or service not known"))
        output = tmp_path / "out"
        looked_up = []
        real = socket.getaddrinfo
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda *a, **k: looked_up.append(a) or real(*a, **k)
        )
        assert main(arguments("someone/tiny", reviews, output, "--steps", "1")) == 0
        assert json.loads((output / "metrics.json").read_text())["model"] == "someone/tiny"
        assert main(["merge", str(output), str(tmp_path / "merged")]) == 0
        assert looked_up == []
        config = json.loads((output / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "someone/tiny"


@pytest.fixture
def small_disk():
    """No file may grow beyond 30 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["merge", "finetune"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    command, run, tiny, reviews, tmp_path, small_disk, capsys
):
    output = tmp_path / "out"
    options = {
        "merge": ["merge", str(run), str(output)],
        "finetune": arguments(tiny, reviews, output, "--method", "head", "--steps", "1"),
    }
    assert main(options[command]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"c3a: {output}: ")
    assert "File too large" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("level", "status"), [("nonsense", 2), ("", 0)])
def test_a_bad_cpu_level_is_one_line_and_an_empty_one_is_none(level, status):
    command = [sys.executable, "-m", "c3a", "info"]
    environment = {**os.environ, "C3A_CPU_LEVEL": level}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    if status:
        expected = "c3a: expected C3A_CPU_LEVEL to be one of this machine's levels ("
        assert done.stderr.startswith(expected)
        assert done.stderr.count("\n") == 1


def test_too_little_memory_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(finetune, "run", lambda options: torch.empty(2**55))
    assert main(["finetune"]) == 2
    assert capsys.readouterr().err.startswith("c3a: out of memory; a smaller --batch-size")


def test_an_error_of_our_own_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(finetune, "run", lambda options: options.no_such_thing)
    with pytest.raises(AttributeError, match="no_such_thing"):
        main(["finetune"])


def test_warnings_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(finetune, "run", lambda options: warnings.warn("c3a: odd", stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["finetune"]) == 0
    assert capsys.readouterr().err == "c3a: warning: odd\n"


def test_target_modules_on_the_command_line():
    assert finetune._targets(["all-linear"]) == "all-linear"
    assert finetune._targets(["query"]) == ["query"]
    assert finetune._targets(["query", "value"]) == ["query", "value"]
    assert finetune._targets([r".*\.query"]) == r".*\.query"


def test_help_says_every_default_once_and_none_as_none(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    _, *texts = re.split(r"\n  (?=-)", capsys.readouterr().out.partition("options:")[2])
    assert len(texts) == 18
    for text in texts:
        without = text.startswith(("-h", "--steps", "--compile"))
        assert text.count("(default: ") + text.count("(default:\n") == (not without), text
        assert "None" not in text
