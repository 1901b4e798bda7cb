"""The operator without layers: a kernel is found by gradient descent, then prepared for inference.

    python examples/bare_operator.py

An unknown block-circulant matrix turns signals into measurements. The operator is the model and its
kernel the only parameter; no module, no optimizer and no C3ALinear are needed.
"""

import argparse

import torch

import c3a

M, N, B = 3, 2, 64  # the matrix has M*B rows and N*B columns


def loss_of(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (torch.ops.c3a.block_circ_conv(x, w) - y).square().mean()


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    steps = 12 if parser.parse_args(arguments).quick else 40

    torch.manual_seed(0)
    true_w = torch.randn(M, N, B) / (N * B) ** 0.5
    x = torch.randn(1024, N * B)
    y = x @ c3a.circulant(true_w).T  # the definition, dense

    # Gradient descent by torch.func: the operator goes through grad, vmap and jvp.
    gradient = torch.func.grad(loss_of)
    w = torch.zeros_like(true_w)
    for step in range(steps):
        w = w - gradient(w, x, y)
        if step % (steps // 4) == 0:
            print(f"step {step:3d}  loss {loss_of(w, x, y):.2e}")
    error = ((w - true_w).norm() / true_w.norm()).item()
    print(f"relative error of the kernel after {steps} steps: {error:.1e}")

    # How much each single example would like to move the kernel.
    each = torch.func.vmap(gradient, in_dims=(None, 0, 0))(w, x[:8], y[:8])
    print("norms of 8 gradients:", ", ".join(f"{norm:.1e}" for norm in each.flatten(1).norm(dim=1)))

    # The kernel is known: transform it once, then serve one signal at a time.
    w_hat = c3a.prepare(w)
    served = torch.cat([c3a.block_circ_conv_prepared(one, w_hat, B) for one in x[:8].split(1)])
    print("served with the same bits:", torch.equal(served, c3a.block_circ_conv(x[:8], w)))
    return error


if __name__ == "__main__":
    main()
