"""What test_sharding.py runs in two processes with transformers and accelerate."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.parallel import parallelize_module

import c3a
from sharded_models import trained, whole

transformers.logging.disable_progress_bar()
TOKENS = torch.stack([torch.arange(1, 9), torch.arange(15, 7, -1)] * 2)


def llama(dtype: torch.dtype = torch.float32) -> transformers.LlamaForCausalLM:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    options = {"init": "gaussian", "scale": 0.1, "modules_to_save": ["lm_head"]}
    return c3a.patch_model(model, "all-linear", 4, **options)


def in_fsdp(model: transformers.LlamaForCausalLM) -> transformers.LlamaForCausalLM:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        c3a.fully_shard(block, mesh=mesh)
    return c3a.fully_shard(model, mesh=mesh)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def assert_same_folder(folder: Path, other: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    for name in names:
        if name.endswith(".safetensors"):
            found, expected = load_file(folder / name), load_file(other / name)
            assert found.keys() == expected.keys()
            assert [key for key in found if not torch.equal(found[key], expected[key])] == []
        else:
            assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def sharded_models_save_themselves_as_one_process(folder: Path) -> None:
    model, single = in_fsdp(llama()), llama()
    logits(model)  # FSDP may have gathered what is saved
    single.save_pretrained(folder / "alone")
    model.save_pretrained(folder / "together")
    dist.barrier()
    assert_same_folder(folder / "together", folder / "alone")
    full = {key: whole(t) for key, t in model.state_dict().items()}
    if dist.get_rank() == 0:  # as Trainer: who has all of it saves alone
        model.save_pretrained(folder / "given", state_dict=full)
        assert_same_folder(folder / "given", folder / "alone")
        with pytest.raises(ValueError, match="expected a state_dict with all of the sharded model"):
            model.save_pretrained(folder / "part", state_dict={"lm_head.weight": full.popitem()[1]})
    else:
        model.save_pretrained(folder / "given", is_main_process=False, state_dict={})
    dist.barrier()
    again = c3a.load_pretrained(transformers.LlamaForCausalLM, folder / "together")
    torch.testing.assert_close(logits(again), logits(single), rtol=1e-4, atol=1e-4)
    with pytest.raises(OSError, match="is a folder"):
        (folder / "blocked" / "adapter_config.json").mkdir(parents=True, exist_ok=True)
        dist.barrier()
        model.save_pretrained(folder / "blocked")


def tensor_parallel_models_save_themselves_as_one_process(folder: Path) -> None:
    model, single = llama(), llama()
    styles = {"gate_proj": c3a.ColwiseParallel(), "down_proj": c3a.RowwiseParallel()}
    styles["up_proj"] = c3a.ColwiseParallel()
    for block in model.model.layers:
        parallelize_module(block.mlp, init_device_mesh("cpu", (dist.get_world_size(),)), styles)
    for name, merge in (("tp", False), ("tp merged", True)):
        if merge:
            c3a.merge(model)
            c3a.merge(single)
        single.save_pretrained(folder / f"{name} alone")
        model.save_pretrained(folder / name)
        dist.barrier()
        assert_same_folder(folder / name, folder / f"{name} alone")


def merged_and_sharded_models_save_themselves_as_one_process(folder: Path) -> None:
    model, single = c3a.merge(in_fsdp(llama())), c3a.merge(llama())
    single.save_pretrained(folder / "merged alone")
    model.save_pretrained(folder / "merged")
    dist.barrier()
    assert_same_folder(folder / "merged", folder / "merged alone")
    with pytest.raises(ValueError, match="expected no state_dict for a merged model"):
        model.save_pretrained(folder / "given merged", state_dict=model.state_dict())
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder / "merged")
    torch.testing.assert_close(logits(loaded), logits(single))


def sharded_models_are_not_unpatched(_: Path) -> None:
    model = in_fsdp(llama())
    before = {name: id(part) for name, part in model.named_modules()}
    for merge in (False, True):
        with pytest.raises(ValueError, match="c3a.unpatch_model: the model is sharded"):
            c3a.unpatch_model(model, merge=merge)
    assert {name: id(part) for name, part in model.named_modules()} == before
    assert not any(layer.merged for layer in c3a.patch.adapted_layers(model).values())


def _among_processes() -> None:
    """Tell accelerate of the processes, as torchrun does."""
    rank, count = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ["OMP_NUM_THREADS"] = "1"  # or it warns of it
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def _accelerator(wrap: str) -> Accelerator:
    """Return accelerate's FSDP2 on the CPU, where it leaves the plugin aside if left alone."""
    _among_processes()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy=wrap,
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.distributed_type == DistributedType.MULTI_CPU
    assert not accelerator.is_fsdp2
    for state in (PartialState(), accelerator.state):  # the second is made anew from the first
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2
    return accelerator


def _trained_with(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator | None
) -> list[float]:
    """Take steps of two batches each, clipped; all processes' data are one process's."""
    losses = []
    for _ in range(3):
        parts = TOKENS.chunk(2)
        total = 0.0
        for part in parts:
            mine = part[dist.get_rank()][None] if accelerator else part
            loss = model(mine, labels=mine).loss / len(parts)
            (accelerator.backward if accelerator else torch.Tensor.backward)(loss)
            total += loss.item()
        parameters = trained(model).values()
        if accelerator:
            accelerator.clip_grad_norm_(parameters, 0.5)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def _is_trained_by_accelerate(sharded_first: bool, dtype: torch.dtype, tolerance: float) -> None:
    accelerator = _accelerator("no_wrap" if sharded_first else "transformer_based_wrap")
    model, single = llama(dtype), llama(dtype)
    if sharded_first:
        in_fsdp(model)
    optimizers = [
        torch.optim.AdamW(trained(m).values(), lr=0.01, eps=1e-3) for m in (model, single)
    ]
    model, optimizers[0] = accelerator.prepare(model, optimizers[0])
    assert isinstance(model, FSDPModule)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, FSDPModule) == sharded_first
    _trained_with(model, optimizers[0], accelerator)
    _trained_with(single, optimizers[1], None)
    expected = trained(single)
    for name, parameter in trained(model).items():
        assert parameter.dtype == expected[name].dtype
        torch.testing.assert_close(
            whole(parameter), expected[name].detach(), rtol=tolerance, atol=tolerance, msg=name
        )
    assert layer.c3a_kernel.dtype == torch.float32


def accelerate_trains_data_parallel(_: Path) -> None:
    _among_processes()
    accelerator = Accelerator(cpu=True)
    model, single = llama(), llama()
    optimizers = [
        torch.optim.AdamW(trained(m).values(), lr=0.01, eps=1e-3) for m in (model, single)
    ]
    parallel, optimizers[0] = accelerator.prepare(model, optimizers[0])
    assert isinstance(parallel, torch.nn.parallel.DistributedDataParallel)
    _trained_with(parallel, optimizers[0], accelerator)
    _trained_with(single, optimizers[1], None)
    for name, parameter in trained(single).items():
        torch.testing.assert_close(trained(model)[name], parameter, rtol=1e-4, atol=1e-4, msg=name)


def accelerate_trains_what_is_sharded_here(_: Path) -> None:
    _is_trained_by_accelerate(True, torch.float32, 1e-4)
    _is_trained_by_accelerate(True, torch.bfloat16, 3e-2)


def accelerate_shards_by_its_plugin(folder: Path) -> None:
    _is_trained_by_accelerate(False, torch.float32, 1e-4)
    _is_trained_by_accelerate(False, torch.bfloat16, 3e-2)


def accelerate_saves_and_resumes(folder: Path) -> None:
    accelerator = _accelerator("no_wrap")

    def prepared() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = in_fsdp(llama())
        optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01, eps=1e-3)
        return accelerator.prepare(model, optimizer)

    model, optimizer = prepared()
    _trained_with(model, optimizer, accelerator)
    accelerator.save_state(folder / "state")
    c3a.save_adapter(model, folder / "adapter")
    _trained_with(model, optimizer, accelerator)
    accelerator.free_memory()
    resumed, its = prepared()
    accelerator.load_state(folder / "state")
    _trained_with(resumed, its, accelerator)
    expected = trained(model)
    for name, parameter in trained(resumed).items():
        assert torch.equal(whole(parameter), whole(expected[name])), name


TWO = [
    sharded_models_save_themselves_as_one_process,
    tensor_parallel_models_save_themselves_as_one_process,
    merged_and_sharded_models_save_themselves_as_one_process,
    sharded_models_are_not_unpatched,
    accelerate_trains_data_parallel,
    accelerate_trains_what_is_sharded_here,
    accelerate_shards_by_its_plugin,
    accelerate_saves_and_resumes,
]
