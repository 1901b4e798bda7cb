"""Make a package of an adapted model with AOTInductor, for serve.cpp or any other process.

python examples/cpp/package.py model.pt2
"""

import sys

import torch
from torch import nn

import c3a


def main(path: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32)).eval()
    c3a.patch_model(model, "all-linear", block_size=16, init="gaussian")
    batch = torch.export.Dim("batch", min=1, max=1024)
    with torch.no_grad():
        program = torch.export.export(model, (torch.ones(2, 64),), dynamic_shapes=({0: batch},))
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        for size in (1, 5):
            y = model(torch.ones(size, 64))
            numbers = " ".join(f"{y[-1, feature]:.4f}" for feature in (0, 1, 31))
            print(f"{list(y.shape)} {numbers}")


if __name__ == "__main__":
    main(sys.argv[1])
