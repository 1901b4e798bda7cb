"""A causal language model: train an adapter with transformers' Trainer, save it, load it again.

    pip install 'c3a[examples]'
    python examples/causal_lm.py            # a tiny Llama, made on the spot
    python examples/causal_lm.py --model folder-or-hub-name --text my.txt --output runs/my_adapter

The tiny model reads bytes and has random weights, so the adapters do all the learning.
"""

import argparse
import tempfile
from pathlib import Path
from pydoc_data.topics import topics  # Python's own manual: 700 KB of English

import torch
import transformers

import c3a


def base_model(name: str | None) -> torch.nn.Module:
    if name:
        return transformers.AutoModelForCausalLM.from_pretrained(name)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        initializer_range=0.1,  # so that the frozen output layer can tell bytes apart
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def token_ids(text: str, name: str | None) -> torch.Tensor:
    if name:
        return torch.tensor(transformers.AutoTokenizer.from_pretrained(name)(text)["input_ids"])
    return torch.tensor(list(text.encode()))


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a local folder or a hub's name (default: a tiny Llama)")
    parser.add_argument("--text", type=Path, help="what to learn (default: Python's manual)")
    parser.add_argument("--output", type=Path, help="where the adapter goes")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    output = options.output or Path(tempfile.mkdtemp()) / "adapter"
    text = options.text.read_text() if options.text else "\n".join(topics.values())

    ids = token_ids(text, options.model)
    length = min(64, len(ids) // 10)
    windows = ids[: len(ids) // length * length].view(-1, length)
    examples = [{"input_ids": row, "labels": row} for row in windows]
    held_out = min(32, len(examples) // 5)
    held_out, examples = examples[:held_out], examples[held_out:]

    model = base_model(options.model)
    c3a.patch_model(model, "all-linear", block_size="auto", rank=8)
    print(c3a.summary(model))

    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(output.parent / "trainer"),
            learning_rate=0.3,  # the default scale is 1 / in_features: rates of 0.1 to 1 are right
            weight_decay=0.0,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            max_steps=25 if options.quick else 300,
            per_device_train_batch_size=8,
            save_strategy="no",
            logging_steps=50,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=examples,
        eval_dataset=held_out,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"loss on held-out text: {before:.2f} before, {after:.2f} after")

    c3a.save_adapter(model, output, task_type="CAUSAL_LM")
    again = c3a.load_adapter(base_model(options.model), output)  # patches the base model itself
    batch = windows[:2]
    with torch.no_grad():
        here, there = (m.cpu().eval()(batch).logits for m in (model, again))
    difference = (here - there).abs().max()
    print(f"saved to {output}; loaded again, logits differ by {difference:.1e}")
    return before, after


if __name__ == "__main__":
    main()
