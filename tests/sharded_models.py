"""What test_sharding.py runs in two and four processes: patched models, whole and in parts."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as fully_shard_of_torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

import c3a
from c3a import distributed
from c3a.adapter_files import CONFIG, WEIGHTS
from c3a.trainer import AdapterCallback

WIDTH, HEADS, KV_HEADS, INNER, B = 32, 4, 2, 64, 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, WIDTH * KV_HEADS // HEADS, bias=True)
        self.v_proj = nn.Linear(WIDTH, WIDTH * KV_HEADS // HEADS, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.up_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention, self.mlp = Attention(), Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x))


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def patched(dtype: torch.dtype = torch.float32) -> Llama:
    torch.manual_seed(1)
    model = Llama().to(dtype)
    return c3a.patch_model(model, TARGETS, B, init="gaussian", scale=0.05, modules_to_save=["head"])


def inputs(tokens: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(4, tokens, WIDTH).to(dtype)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole(t: torch.Tensor) -> torch.Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    # An eps that keeps rounding errors of tiny gradients from growing into steps.
    return torch.optim.AdamW(trained(model).values(), lr=0.01, eps=1e-3)


def backward(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()


def step(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    backward(model, x, optimizer)
    optimizer.step()


def in_tensor_parallel(model: Llama, mesh: DeviceMesh, sequence: bool = False) -> Llama:
    layout = Shard(1) if sequence else None
    for block in model.blocks:
        styles = {
            f"attention.{name}": c3a.ColwiseParallel(input_layouts=layout)
            for name in ("q_proj", "k_proj", "v_proj")
        }
        styles |= {
            f"mlp.{name}": c3a.ColwiseParallel(input_layouts=layout)
            for name in ("gate_proj", "up_proj")
        }
        styles["attention.o_proj"] = c3a.RowwiseParallel(output_layouts=layout)
        styles["mlp.down_proj"] = c3a.RowwiseParallel(output_layouts=layout)
        if sequence:
            styles["norm_1"] = styles["norm_2"] = SequenceParallel(use_local_output=True)
        parallelize_module(block, mesh, styles)
        for norm in (block.norm_1, block.norm_2):
            norm.requires_grad_(False)  # SequenceParallel makes parameters anew, which are not
    return model


def assert_as_one_process(
    model: nn.Module,
    single: nn.Module,
    x: torch.Tensor,
    part: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    tolerance: float = 1e-5,
) -> None:
    """Compare results, loss and gradients, then weights and results after steps of AdamW."""
    optimizers = [adamw(model), adamw(single)]
    for _ in range(3):
        torch.testing.assert_close(model(part(x)), part(single(x)), rtol=tolerance, atol=tolerance)
        backward(model, part(x), optimizers[0])
        backward(single, x, optimizers[1])
        expected = trained(single)
        for name, parameter in trained(model).items():
            assert parameter.grad is not None, name
            torch.testing.assert_close(
                whole(parameter.grad), expected[name].grad, rtol=tolerance, atol=tolerance, msg=name
            )
        for optimizer in optimizers:
            optimizer.step()
    model.eval()
    single.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model(part(x)), part(single(x)), rtol=20 * tolerance, atol=20 * tolerance
        )


def mine(x: torch.Tensor) -> torch.Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def world() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def in_fsdp(model: Llama, mesh: DeviceMesh | None = None, **options: object) -> Llama:
    for block in model.blocks:
        c3a.fully_shard(block, mesh=mesh, **options)
    return c3a.fully_shard(model, mesh=mesh, **options)


# Checks


def tensor_parallel_models_are_those_of_one_process(_: Path) -> None:
    model = in_tensor_parallel(patched(), world())
    q_proj, down_proj = model.blocks[0].attention.q_proj, model.blocks[0].mlp.down_proj
    assert q_proj.c3a_kernel.to_local().shape == (WIDTH // B // 2, WIDTH // B, B)
    assert down_proj.c3a_kernel.to_local().shape == (WIDTH // B, INNER // B // 2, B)
    assert not q_proj.base_layer.weight.requires_grad
    assert_as_one_process(model, patched(), inputs())


def sequence_parallel_models_are_those_of_one_process(_: Path) -> None:
    model, single, x = in_tensor_parallel(patched(), world(), sequence=True), patched(), inputs()
    here = dist.get_rank()
    found = model.blocks(x.chunk(2, dim=1)[here])
    expected = single.blocks(x)
    torch.testing.assert_close(found, expected.chunk(2, dim=1)[here], rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    gradients = trained(single)
    for name, parameter in trained(model.blocks).items():
        torch.testing.assert_close(
            whole(parameter.grad), gradients[f"blocks.{name}"].grad, rtol=1e-4, atol=1e-4, msg=name
        )


def styles_say_what_they_cannot_divide(_: Path) -> None:
    odd = c3a.C3ALinear(nn.Linear(24, 16), 8)
    with pytest.raises(ValueError, match="expected input blocks that 2 processes can divide"):
        parallelize_module(odd, world(), c3a.RowwiseParallel())
    assert not isinstance(odd.c3a_kernel, DTensor)
    parallelize_module(odd, world(), c3a.ColwiseParallel())
    with pytest.raises(ValueError, match="is not merged"):
        layer = c3a.C3ALinear(nn.Linear(16, 16), 8)
        layer.merge()
        parallelize_module(layer, world(), c3a.ColwiseParallel())
    plain = parallelize_module(nn.Linear(16, 16), world(), c3a.ColwiseParallel())
    assert plain.weight.placements == (Shard(0),)


def fsdp_models_are_those_of_one_process(_: Path) -> None:
    model = in_fsdp(patched(), world())
    layer = model.blocks[0].attention.q_proj
    assert isinstance(layer, FSDPModule)
    assert isinstance(layer.base_layer, FSDPModule)
    assert_as_one_process(model, patched(), inputs(), mine)


def a_bfloat16_model_trains_with_kernels_in_float32(_: Path) -> None:
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):
        fully_shard_of_torch(patched(torch.bfloat16), mesh=world())(inputs(dtype=torch.bfloat16))
    model, single, x = in_fsdp(patched(torch.bfloat16)), patched(torch.bfloat16), inputs()
    x = x.bfloat16()
    assert_as_one_process(model, single, x, mine, tolerance=0.03)
    kernel = model.blocks[0].attention.q_proj.c3a_kernel
    assert kernel.dtype == kernel.grad.dtype == torch.float32


def mixed_precision_leaves_kernels_in_float32(_: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = in_fsdp(patched(), mp_policy=policy)
    seen = []
    layer = model.blocks[0].mlp.up_proj
    layer.base_layer.register_forward_hook(
        lambda base, _, y: seen.append((base.weight.dtype, layer.c3a_kernel.dtype, y.dtype)),
        prepend=True,  # FSDP's own gives the gathered weight back
    )
    backward(model, inputs(), adamw(model))
    assert seen == [(torch.bfloat16, torch.float32, torch.bfloat16)]
    assert layer.c3a_kernel.grad.dtype == torch.float32


def _assert_same_files(folder: Path, other: Path) -> None:
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        file.name for file in other.iterdir()
    )
    assert (folder / CONFIG).read_bytes() == (other / CONFIG).read_bytes()
    # Not by bytes: safetensors writes its metadata in any order.
    with (
        safe_open(folder / WEIGHTS, "pt") as file,
        safe_open(other / WEIGHTS, "pt") as expected,
    ):
        assert file.metadata() == expected.metadata()
        assert list(file.keys()) == list(expected.keys())
        for key in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(key), expected.get_tensor(key)), key


def _adapters_go_from_and_to_files(model: Llama, folder: Path) -> None:
    single, x = patched(), inputs()
    with torch.no_grad():  # another adapter than the model's
        for parameter in trained(single).values():
            parameter.mul_(0.5)
    alone = folder / f"alone-{dist.get_rank()}"
    c3a.load_adapter(single, c3a.save_adapter(single, alone))
    model(x)  # FSDP may have gathered what is saved and written
    c3a.load_adapter(model, alone)
    torch.testing.assert_close(model(x), single(x), rtol=1e-5, atol=1e-5)
    c3a.save_adapter(single, alone := folder / f"again-{dist.get_rank()}")
    together = c3a.save_adapter(model, folder / "together")
    _assert_same_files(together, alone)
    with pytest.raises(OSError, match="expected .* to be a file or new"):
        (folder / "blocked" / "adapter_config.json").mkdir(parents=True, exist_ok=True)
        dist.barrier()
        c3a.save_adapter(model, folder / "blocked")
    assert c3a.summary(model) == c3a.summary(single)


def fsdp_models_save_and_load_adapters(folder: Path) -> None:
    _adapters_go_from_and_to_files(in_fsdp(patched()), folder / "fsdp")
    held = in_fsdp(patched(), reshard_after_forward=False)
    _adapters_go_from_and_to_files(held, folder / "held")


def tensor_parallel_models_save_and_load_adapters(folder: Path) -> None:
    _adapters_go_from_and_to_files(in_tensor_parallel(patched(), world()), folder / "tp")


def _is_merged_as_one_process(model: Llama) -> None:
    single, x = patched(), inputs()
    before = {name: whole(p).clone() for name, p in model.named_parameters()}
    y = model(x)
    c3a.merge(model)
    c3a.merge(single)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    weights = dict(single.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(whole(parameter), weights[name]), name
    with c3a.disabled(model), c3a.disabled(single):
        torch.testing.assert_close(model(x), single(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    c3a.unmerge(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(whole(parameter), before[name]), name
    torch.testing.assert_close(model(x), y)
    distributed.reshard(model)  # what is written to gathered parameters is lost
    with torch.no_grad():
        model.blocks[0].mlp.up_proj.c3a_kernel.fill_(torch.inf)
    with pytest.raises(ValueError, match="blocks.0.mlp.up_proj: merging would make 2048 of 2048"):
        c3a.merge(model)


def the_trainers_callback_saves_what_is_sharded(folder: Path) -> None:
    model, first = in_fsdp(patched()), dist.get_rank() == 0
    callback = AdapterCallback(folder / "callback", every=1, keep=1)
    for number in (1, 2):
        state = SimpleNamespace(is_world_process_zero=first, global_step=number)
        callback.on_step_end(None, state, None, model=model)
    callback.on_train_end(None, state, None, model=model)
    dist.barrier()
    assert sorted(path.name for path in (folder / "callback").iterdir()) == ["adapter", "adapter-2"]


def fsdp_models_merge(_: Path) -> None:
    _is_merged_as_one_process(in_fsdp(patched()))
    _is_merged_as_one_process(in_fsdp(patched(), reshard_after_forward=False))


def a_shared_weight_is_not_merged_into(_: Path) -> None:
    """A sharded weight is written in place, which what shares it would see."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    c3a.patch_model(model, ["0"], 4, init="gaussian")
    fully_shard_of_torch(model, mesh=world())  # one group, in which a shared weight stays one
    before = whole(model[0].base_layer.weight)
    with pytest.raises(ValueError, match="c3a: 0: cannot merge: others share its weight"):
        c3a.merge(model)
    assert torch.equal(whole(model[0].base_layer.weight), before)


def tensor_parallel_models_merge(_: Path) -> None:
    _is_merged_as_one_process(in_tensor_parallel(patched(), world()))


def prepared_kernels_are_never_stale(_: Path) -> None:
    model, single, x = in_fsdp(patched()), patched(), inputs()
    optimizers = [adamw(model), adamw(single)]
    for _ in range(3):
        for m in (model, single):
            m.eval()
            for layer in m.modules():
                if isinstance(layer, c3a.C3ALinear):
                    layer.prepare()
        with torch.no_grad():
            torch.testing.assert_close(model(x), single(x), rtol=1e-4, atol=1e-4)
        for m, optimizer in zip((model, single), optimizers, strict=True):
            step(m, x, optimizer)


def what_is_sharded_is_not_patched(folder: Path) -> None:
    c3a.save_adapter(patched(), mine_in := folder / f"for-{dist.get_rank()}")
    model = fully_shard_of_torch(Llama(), mesh=world())
    with pytest.raises(ValueError, match="sharded over processes"):
        c3a.patch_model(model, TARGETS, B)
    with pytest.raises(ValueError, match="sharded over processes"):
        c3a.load_adapter(model, mine_in)
    with pytest.raises(ValueError, match="no C3ALinear layer"):
        c3a.fully_shard(Llama(), mesh=world())


OPTIONS = StateDictOptions(ignore_frozen_params=True)


def _trained_on(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        step(model, inputs(), optimizer)


def _state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    of_model, of_optimizer = get_state_dict(model, optimizer, options=OPTIONS)
    return {"model": of_model, "optimizer": of_optimizer}


def checkpoints_hold_what_is_trained(folder: Path) -> None:
    model = in_fsdp(patched())
    optimizer = adamw(model)
    _trained_on(model, optimizer, 2)
    state = _state_of(model, optimizer)
    assert set(state["model"]) == set(trained(model))
    dcp.save(state, checkpoint_id=folder / "checkpoint")


def resumed_is_as_never_stopped(model: nn.Module, checkpoint: Path) -> None:
    """Continue what ``checkpoints_hold_what_is_trained`` saved, in any number of processes."""
    optimizer, single = adamw(model), patched()
    state = _state_of(model, optimizer)
    dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),
    )
    _trained_on(model, optimizer, 2)
    _trained_on(single, adamw(single), 4)
    expected = trained(single)
    for name, parameter in trained(model).items():
        torch.testing.assert_close(
            whole(parameter), expected[name].detach(), rtol=1e-4, atol=1e-4, msg=name
        )


# In four processes


def grid() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))


def on_grid() -> Llama:
    mesh = grid()
    return in_fsdp(in_tensor_parallel(patched(), mesh["tensor"]), mesh["data"])


def of_my_row(x: torch.Tensor) -> torch.Tensor:
    return x.chunk(2)[grid().get_local_rank("data")]


def fsdp_and_tensor_parallel_are_as_one_process(_: Path) -> None:
    assert_as_one_process(on_grid(), patched(), inputs(), of_my_row)


def fsdp_and_tensor_parallel_save_and_load(folder: Path) -> None:
    _adapters_go_from_and_to_files(on_grid(), folder / "grid")


def fsdp_and_tensor_parallel_merge(_: Path) -> None:
    _is_merged_as_one_process(on_grid())


def a_checkpoint_of_two_processes_resumes_in_four(folder: Path) -> None:
    checkpoint = Path(json.loads((folder / "checkpoint.json").read_text()))
    resumed_is_as_never_stopped(on_grid(), checkpoint)
    resumed_is_as_never_stopped(in_fsdp(patched()), checkpoint)


TWO = [
    tensor_parallel_models_are_those_of_one_process,
    sequence_parallel_models_are_those_of_one_process,
    styles_say_what_they_cannot_divide,
    fsdp_models_are_those_of_one_process,
    a_bfloat16_model_trains_with_kernels_in_float32,
    mixed_precision_leaves_kernels_in_float32,
    fsdp_models_save_and_load_adapters,
    tensor_parallel_models_save_and_load_adapters,
    the_trainers_callback_saves_what_is_sharded,
    fsdp_models_merge,
    a_shared_weight_is_not_merged_into,
    tensor_parallel_models_merge,
    prepared_kernels_are_never_stale,
    what_is_sharded_is_not_patched,
    checkpoints_hold_what_is_trained,
]
FOUR = [
    fsdp_and_tensor_parallel_are_as_one_process,
    fsdp_and_tensor_parallel_save_and_load,
    fsdp_and_tensor_parallel_merge,
    a_checkpoint_of_two_processes_resumes_in_four,
]
