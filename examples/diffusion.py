"""A diffusion model: a small denoiser that draws circles learns to draw crosses.

    python examples/diffusion.py

Its attention projections have the names of the diffusers library (``to_q``, ``to_k``, ``to_v``,
``to_out.0``), so the call of ``c3a.patch_model`` is the one for a UNet or a transformer of theirs.
Only those projections are adapted.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn

import c3a

SIDE, PATCH, WIDTH, NOISE_LEVELS = 16, 4, 64, 100


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Identity()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.to_out[0](attended)


class Denoiser(nn.Module):
    """Predicts the noise in images; patches are tokens, the noise level is added to each."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        tokens = (SIDE // PATCH) ** 2
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.place = nn.Parameter(torch.randn(tokens, WIDTH) / math.sqrt(WIDTH))
        self.level = nn.Embedding(NOISE_LEVELS, WIDTH)
        self.attentions = nn.ModuleList(Attention(WIDTH) for _ in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(layers)
        )
        self.out = nn.Linear(WIDTH, PATCH * PATCH)

    def forward(self, images: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        x = self.embed(patches) + self.place + self.level(level)[:, None]
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            x = x + attention(F.layer_norm(x, (WIDTH,)))
            x = x + mlp(F.layer_norm(x, (WIDTH,)))
        patches = self.out(F.layer_norm(x, (WIDTH,))).transpose(1, 2)
        return F.fold(patches, (SIDE, SIDE), PATCH, stride=PATCH)


def drawings(kind: str, count: int) -> torch.Tensor:
    """Circles or crosses of random size and place, (count, 1, SIDE, SIDE), between -1 and 1."""
    x, y = (torch.rand(2, count, 1, 1) * 6 + 5).unbind()
    radius = torch.rand(count, 1, 1) * 2 + 2.5
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    right, down = column - x, row - y
    if kind == "circle":
        distance = ((right.square() + down.square()).sqrt() - radius).abs()
    else:
        inside = (right.abs() <= radius) & (down.abs() <= radius)
        distance = torch.where(inside, (right.abs() - down.abs()).abs(), torch.inf)
    return (2 * torch.exp(-distance.square()) - 1)[:, None]


ALPHA = torch.cos(torch.linspace(0, math.pi / 2, NOISE_LEVELS + 1)[1:]).clamp(0.01).square()


def loss_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    level = torch.randint(NOISE_LEVELS, (len(images),))
    alpha, noise = ALPHA[level].view(-1, 1, 1, 1), torch.randn_like(images)
    return F.mse_loss(model(alpha.sqrt() * images + (1 - alpha).sqrt() * noise, level), noise)


def train(model: nn.Module, kind: str, steps: int, lr: float) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, drawings(kind, 32)).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def sample(model: nn.Module, count: int) -> torch.Tensor:
    """Draw by DDIM, from noise down to level 0."""
    images = torch.randn(count, 1, SIDE, SIDE)
    for level in reversed(range(0, NOISE_LEVELS, 4)):
        alpha = ALPHA[level]
        noise = model(images, torch.full((count,), level))
        clean = ((images - (1 - alpha).sqrt() * noise) / alpha.sqrt()).clamp(-1, 1)
        lower = ALPHA[level - 4] if level >= 4 else torch.tensor(1.0)
        images = lower.sqrt() * clean + (1 - lower).sqrt() * noise
    return images


@torch.no_grad()
def test_loss(model: nn.Module, kind: str) -> float:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return loss_of(model, drawings(kind, 512)).item()


def show(image: torch.Tensor) -> None:
    for row in image[0]:
        print("  " + "".join(" .:*#"[int((value + 1) * 2.49)] * 2 for value in row.clamp(-1, 1)))


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    quick = parser.parse_args(arguments).quick
    torch.manual_seed(0)

    model = Denoiser()
    train(model, "circle", steps=250 if quick else 2000, lr=4e-3)
    before = test_loss(model, "cross")

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    c3a.patch_model(model, targets, block_size=16)
    print(c3a.summary(model))
    train(model, "cross", steps=100 if quick else 1000, lr=0.3)
    after = test_loss(model, "cross")

    print(f"error of the noise on crosses: {before:.3f} before, {after:.3f} after")
    torch.manual_seed(2)
    print("one sample, adapted:")
    show(sample(model, 1)[0])
    return before, after


if __name__ == "__main__":
    main()
