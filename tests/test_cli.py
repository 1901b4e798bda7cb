"""The command line, end to end on a tiny model and file; the packaged data."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import c3a
from c3a.cli import data, finetune, main
from c3a.files import write_folder

pytestmark = pytest.mark.filterwarnings(
    # torch's and transformers' own, from within Trainer
    "ignore::DeprecationWarning:(torch|transformers|accelerate)",
    "ignore::FutureWarning",
)
WORDS = ["good", "fine", "great", "bad", "poor", "awful", "film", "the", "a", "was", "it"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A BERT of 2 layers with random weights and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    rows = ["review,verdict"]
    for i in range(60):
        rows.append(f"the film was {WORDS[i % 3]},yes")
        rows.append(f"a film it was {WORDS[3 + i % 3]},no")
    path.write_text("\n".join(rows))
    return path


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


def test_inspect_prints_rank_and_norm_and_draws_the_spectra(run, tmp_path, capsys):
    picture = tmp_path / "spectra.png"
    assert main(["inspect", str(run), "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "bert.pooler.dense" in printed
    assert "24/24" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    kernel = load_file(run / "adapter_model.safetensors")[
        "base_model.model.bert.pooler.dense.c3a_kernel"
    ]
    norm = c3a.circulant(kernel).norm() / 24
    assert f"{norm:.3g}" in printed


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
        (["--data", "nowhere.csv"], "nowhere.csv"),
        (["--data", "text.parquet"], "expected a file ending in .csv, .tsv, .jsonl, .json"),
        (["--text-column", "body"], "has no column 'body'; it has review, verdict"),
        (["--target-modules", "q_proj"], "no module is named 'q_proj'; linear layers of the model"),
        (["--block-size", "7"], "block_size 7 does not divide in_features = 24"),
        (["--steps", "0"], "expected --steps > 0, got 0"),
        (["--model", "./nowhere"], "to be a folder or a hub's name, ./nowhere is neither"),
    ],
)
def test_bad_input_is_one_clear_line_and_writes_nothing(
    more, message, tiny, reviews, tmp_path, capsys
):
    output = tmp_path / "out"
    assert main(arguments(tiny, reviews, output, *more)) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


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


def test_the_packaged_sentences_are_all_there_and_split_by_class():
    examples = data.rotten_tomatoes()
    assert len(examples) == 8530
    assert sum(examples.labels) == 4265
    train, validation, test = data.split(examples, seed=0)
    assert (len(train), len(validation), len(test)) == (5974, 852, 1704)
    assert (sum(validation.labels), sum(test.labels)) == (426, 852)
    texts = [set(part.texts) for part in (train, validation, test)]
    assert sum(map(len, (train, validation, test))) == 8530
    assert len(texts[0] & texts[2]) <= 5  # the set has a few sentences twice
    assert data.split(examples, seed=0)[2] == test
    assert data.split(examples, seed=1)[2] != test


def test_files_with_gaps_or_too_little_data_are_named(tmp_path):
    path = tmp_path / "gaps.csv"
    path.write_text("text,label\na,1\n,0\nb,\n")
    with pytest.raises(ValueError, match="2 rows lack a text or a label, first row 2"):
        data.read(path, "text", "label")
    few = data.Examples(["a"] * 12, [0] * 11 + [1], ["x", "y"])
    with pytest.raises(ValueError, match="at least 10 examples of each class, 'y' has 1"):
        data.split(few, seed=0)
    with pytest.raises(ValueError, match="at least 2 classes"):
        data.split(data.Examples(["a"] * 12, [0] * 12, ["x"]), seed=0)


def test_words_that_look_missing_or_like_numbers_stay_as_they_are(tmp_path):
    path = tmp_path / "words.csv"
    path.write_text("text,label\nNA,None\nnull,good\n")
    assert data.read(path, "text", "label") == data.Examples(
        ["NA", "null"], [0, 1], ["None", "good"]
    )
    path = tmp_path / "words.jsonl"
    path.write_text('{"text": "00", "label": 1}\n{"text": "01", "label": "x"}\n')
    assert data.read(path, "text", "label") == data.Examples(["00", "01"], [0, 1], ["1", "x"])


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


def test_merge_says_where_the_base_model_should_have_been(run, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    shutil.copytree(run, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/home/someone/else"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert main(["merge", str(adapter), str(tmp_path / "merged")]) == 2
    assert "is not at /home/someone/else; pass --model" in capsys.readouterr().err


def test_target_modules_on_the_command_line():
    assert finetune._targets(["all-linear"]) == "all-linear"
    assert finetune._targets(["query"]) == ["query"]
    assert finetune._targets(["query", "value"]) == ["query", "value"]
    assert finetune._targets([r".*\.query"]) == r".*\.query"
