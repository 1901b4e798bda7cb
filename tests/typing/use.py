"""The README's use, as a type checker sees it: ``make lint`` runs mypy on this, nothing runs it."""

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import c3a

model = nn.Sequential(nn.Linear(768, 768), nn.GELU(), nn.Linear(768, 2))
patched = c3a.patch_model(model, ["0"], block_size=128, modules_to_save=["2"])
assert_type(patched, nn.Sequential)
c3a.patch_model(model, "all-linear", "auto", rank=16)
config = peft.C3AConfig(target_modules=["0"])
assert_type(c3a.patch_model(model, config), nn.Sequential)
assert_type(c3a.patch_model(model, config=config), nn.Sequential)
assert_type(c3a.param_groups(model, 0.3, head_lr=1e-3), list[dict[str, Any]])
c3a.patch_model(model, lambda name, module: name == "0", {"0": 128})
assert_type(c3a.summary(model).trainable, int)

assert_type(c3a.save_adapter(model, "runs/my_adapter", task_type="SEQ_CLS"), Path)
assert_type(c3a.load_adapter(model, Path("runs/my_adapter")), nn.Sequential)
assert_type(c3a.merge(model), nn.Sequential)
assert_type(c3a.unmerge(model), nn.Sequential)
with c3a.disabled(model) as base:
    assert_type(base, nn.Sequential)
assert_type(c3a.unpatch_model(model, merge=True), nn.Sequential)

layer = c3a.C3ALinear(nn.Linear(64, 64), 16, dtype=torch.bfloat16)
x = torch.randn(4, 64)
assert_type(layer(x), Tensor)
assert_type(layer.c3a_kernel, nn.Parameter)
assert_type(layer.weight, Tensor)
assert_type(layer.train(), c3a.C3ALinear)
assert_type(layer.merge(safe=False), None)
layer.scale, layer.enabled = 0.5, False
layer(x, x)  # type: ignore[call-arg]
c3a.C3ALinear(nn.Linear(64, 64), block_size="auto")  # type: ignore[arg-type]

w = torch.randn(4, 4, 16)
w_hat = c3a.prepare(w, torch.float64, transposed=True)
assert_type(w_hat, Tensor)
assert_type(c3a.block_circ_conv(x, w, scale=0.1), Tensor)
assert_type(c3a.block_circ_conv_add(x, x, w), Tensor)
assert_type(c3a.block_circ_conv_prepared(x, w_hat, 16), Tensor)
assert_type(c3a.block_circ_conv_prepared_add(x, x, w_hat, 16, None), Tensor)
assert_type(c3a.block_circ_conv_many(x, w, torch.zeros(1, dtype=torch.int64), 0.5), Tensor)
assert_type(c3a.block_circ_conv_many_prepared(x, w_hat, torch.zeros(1), 16, None), Tensor)
assert_type(c3a.circulant(w), Tensor)
assert_type(c3a.nearest_kernel(x, 16, pad=True), tuple[Tensor, Tensor])
c3a.block_circ_conv(x, w, "one")  # type: ignore[arg-type]
