"""A model that trains in seconds, and sentences for it."""

from pathlib import Path

import torch
import transformers

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "film", "the", "a", "was", "it"]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_model(folder: Path, kind=transformers.BertModel, **changes) -> Path:
    """Write a BERT of 2 layers with random weights and its tokenizer."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*_SPECIAL, *WORDS]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {
        "vocab_size": len(_SPECIAL) + len(WORDS),
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    kind(transformers.BertConfig(**{**sizes, **changes})).save_pretrained(folder)
    return folder


def write_reviews(path: Path) -> Path:
    """Write 120 sentences of two classes that one word tells apart."""
    rows = ["review,verdict"]
    for i in range(60):
        rows.append(f"the film was {WORDS[i % 3]},yes")
        rows.append(f"a film it was {WORDS[3 + i % 3]},no")
    path.write_text("\n".join(rows))
    return path
