"""A vision model: a small ViT that reads digits learns to read them rotated, by adapters alone.

    pip install 'c3a[examples]'
    python examples/vision.py

scikit-learn brings the images (1,797 of 8 x 8 pixels), so nothing is downloaded. The loop is plain
torch; the ViT's own training stands for the checkpoint that you would start from.
"""

import argparse

import torch
import transformers
from sklearn.datasets import load_digits

import c3a


def small_vit() -> torch.nn.Module:
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=10,
    )
    return transformers.ViTForImageClassification(config)


def train(model, images, labels, steps: int, lr: float) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        loss = model(pixel_values=images[batch], labels=labels[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model, images, labels) -> float:
    return (model.eval()(images).logits.argmax(-1) == labels).double().mean().item()


def main(arguments: list[str] | None = None) -> tuple[float, float, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    quick = parser.parse_args(arguments).quick
    torch.manual_seed(0)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    rotated = images.rot90(1, dims=(-2, -1))
    seen, unseen = slice(0, 1400), slice(1400, None)

    model = small_vit()
    train(model, images[seen], labels[seen], steps=150 if quick else 600, lr=2e-3)
    upright = accuracy(model, images[unseen], labels[unseen])
    before = accuracy(model, rotated[unseen], labels[unseen])

    c3a.patch_model(model, "all-linear", block_size=16, modules_to_save=["classifier"])
    print(c3a.summary(model))
    train(model, rotated[seen], labels[seen], steps=100 if quick else 600, lr=0.3)
    after = accuracy(model, rotated[unseen], labels[unseen])
    c3a.merge(model)  # an ordinary ViT from here on: no cost at inference
    merged = accuracy(model, rotated[unseen], labels[unseen])

    print(f"upright digits, base model   {upright:.1%}")
    print(f"rotated digits, base model   {before:.1%}")
    print(f"rotated digits, adapted      {after:.1%}, merged {merged:.1%}")
    return upright, before, after


if __name__ == "__main__":
    main()
