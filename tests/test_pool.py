"""A pool of adapters: each row of a batch gets the one that it names, within a bound of memory."""

import asyncio
import copy
import pickle
import threading
import time
import warnings
from contextlib import nullcontext

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import c3a
from c3a.adapter_files import CONFIG, WEIGHTS
from cases import Net, relative_error

SIZE = 64 * 1024


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def save(model, folder, block_size=4, targets=("down", "up"), scale=1.0, **options):
    """Save an adapter of the model with random kernels; return the model that has it."""
    tuned = c3a.patch_model(
        copy.deepcopy(model), list(targets), block_size, init="gaussian", scale=scale, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT cannot load some
        c3a.save_adapter(tuned, folder)
    return tuned.eval()


def saved(model, folder, names, **options):
    """Save adapters; return their folders and the models that have them, also of None."""
    tuned = {name: save(model, folder / name, **options) for name in names}
    return {name: folder / name for name in names}, {**tuned, None: copy.deepcopy(model)}


def row_by_row(tuned, names, x):
    with torch.inference_mode():
        return torch.stack([tuned[name](row[None])[0] for name, row in zip(names, x, strict=True)])


def near(got, expected, tolerance=1e-5):
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert relative_error(got.double(), expected.double()) < tolerance


# What rows compute


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)], ids=str)
def test_each_row_gets_the_adapter_that_it_names_and_none_gets_the_model_alone(tmp_path, leading):
    model = Net()
    folders, tuned = saved(model, tmp_path, "abc")
    names = ["b", None, "a", "b", "c"]
    x = torch.randn(5, *leading, 24)
    before = model(x)
    pool = c3a.AdapterPool(model, max_bytes=SIZE, folders=folders)
    with torch.inference_mode():
        with pool.rows(names):
            got = model(x)
        if x.numel():
            near(got, row_by_row(tuned, names, x))
        assert torch.equal(got[1], before[1])
        assert torch.equal(model(x), before)
        with pool.rows([]):
            assert model(x[:0]).shape == (0, *leading, 4)
    assert set(pool.resident) == {"a", "b", "c"}
    assert pool.registered == ("a", "b", "c")


def test_adapters_may_differ_in_layers_and_block_sizes_and_be_padded_or_of_peft(tmp_path):
    model = Net()
    tuned = {
        "both": save(model, tmp_path / "both", 4),
        "coarse": save(model, tmp_path / "coarse", 12, scale=2.0),
        "down": save(model, tmp_path / "down", 6, targets=["down"]),
        "padded": save(model, tmp_path / "padded", 5, pad=True),
        None: copy.deepcopy(model),
    }
    config = peft.C3AConfig(target_modules=["up"], block_size=2, init_weights="gaussian")
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.save_pretrained(tmp_path / "peft")
    tuned["peft"] = c3a.load_adapter(copy.deepcopy(model), tmp_path / "peft")
    pool = c3a.AdapterPool(model, max_bytes=SIZE)
    names = ["padded", "peft", "both", None, "coarse", "down", "both"]
    for name in {*names} - {None}:
        pool.register(name, tmp_path / name)
    x = torch.randn(7, 3, 24)
    with pool.rows(names), torch.no_grad():
        near(model(x), row_by_row(tuned, names, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_rows_have_the_models_dtype(tmp_path, dtype):
    model = Net()
    folders, tuned = saved(model, tmp_path, "ab")
    exact = row_by_row(tuned, "ba", x := torch.randn(2, 3, 24))
    model.to(dtype)
    pool = c3a.AdapterPool(model, max_bytes=SIZE, folders=folders)
    with pool.rows(["b", "a"]), torch.no_grad():
        got = model(x.to(dtype))
        assert got.dtype == dtype
        near(got.double(), exact.double(), {torch.float64: 1e-5}.get(dtype, 0.05))
        model.to(torch.float32)  # what was prepared for the other dtype is not used
    with pool.rows(["b", "a"]), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        near(model(x).double(), exact.double(), 0.05)


def test_conv1d_and_layers_that_stand_in_two_places_are_served(tmp_path):
    layer = Conv1D(16, 16)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    folders, tuned = saved(model, tmp_path, "ab", targets=["0"])
    pool = c3a.AdapterPool(model, max_bytes=SIZE, folders=folders)
    x = torch.randn(2, 3, 16)
    with pool.rows(["b", "a"]), torch.no_grad():
        near(model(x), row_by_row(tuned, "ba", x))
    assert model[0] is model[2]


class WithoutWeight(nn.Module):
    """As quantised layers are: integers in buffers."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", (linear.weight.detach() * 64).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) / 64).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_without_a_dense_weight_are_served(tmp_path, dtype):
    model = nn.Sequential(WithoutWeight(nn.Linear(16, 8)))
    folders, tuned = saved(model, tmp_path, "ab", targets=["0"])
    pool = c3a.AdapterPool(model, max_bytes=SIZE, folders=folders)
    x = torch.randn(2, 3, 16).to(dtype)
    with pool.rows(["b", "a"]), torch.no_grad():
        near(model(x), row_by_row(tuned, "ba", x), 1e-5 if dtype == torch.float32 else 0.02)
    assert not hasattr(model[0], "weight")


def test_rows_take_the_place_of_a_patched_models_own_adapter(tmp_path):
    base = Net()
    folders, tuned = saved(base, tmp_path, "ab", targets=["down"])
    model = save(base, tmp_path / "own", 2, targets=["up"])
    x = torch.randn(3, 24)
    with torch.inference_mode():
        own = model(x)
        pool = c3a.AdapterPool(model, max_bytes=SIZE, folders=folders)
        assert torch.equal(model(x), own)
        with pool.rows(["b", None, "a"]):
            near(model(x), row_by_row(tuned, ["b", None, "a"], x))
            assert torch.equal(model.up.weight, base.up.weight)
        assert not torch.equal(model.up.weight, base.up.weight)
        with pytest.raises(ValueError, match=r"is a c3a.AdapterPool's; call the pool's close\(\)"):
            c3a.save_adapter(model, tmp_path / "again")
        pool.close()
        assert torch.equal(model(x), own)
        c3a.merge(model)
        with pytest.raises(ValueError, match="AdapterPool: the model is merged"):
            c3a.AdapterPool(model, max_bytes=SIZE)


def gpt2():
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **tokens)).eval(), ["c_attn", "mlp.c_proj"]


def t5():
    sizes = {"d_model": 24, "d_kv": 12, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    tokens = {"decoder_start_token_id": 0, "vocab_size": 50}
    return T5ForConditionalGeneration(T5Config(**sizes, **tokens)).eval(), ["q", "v", "wo"]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("make", [gpt2, t5])
def test_generate_gives_each_prompt_its_adapter(tmp_path, make, beams):
    model, targets = make()
    folders, tuned = saved(model, tmp_path, "ab", targets=targets, scale=3.0)
    prompts = torch.arange(1, 13).view(3, 4)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False}
    names = ["b", None, "a"]
    alone = [
        tuned[name].generate(input_ids=prompt[None], **options)[0]
        for name, prompt in zip(names, prompts, strict=True)
    ]
    assert len({tuple(tokens.tolist()[-5:]) for tokens in alone}) == 3
    pool = c3a.AdapterPool(model, max_bytes=2**20, folders=folders)
    with pool.rows(names, beams=beams):
        together = model.generate(input_ids=prompts, **options)
    assert torch.equal(together, torch.stack(alone))


def test_a_layer_is_one_call_for_each_block_size_without_a_transform(tmp_path):
    model = Net()
    folders, _ = saved(model, tmp_path, "abc", targets=["down"])
    save(model, folders["c"], 2, targets=["down"])
    pool = c3a.AdapterPool(model, max_bytes=SIZE, folders=folders)
    with torch.inference_mode():
        for expected in (3, 0):
            with (
                torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record,
                pool.rows(["a", "b", "c", None]),
            ):
                model(torch.randn(4, 24))
            called = [event.name for event in record.events() if event.name.startswith("c3a::")]
            assert called.count("c3a::prepare") == expected
            assert called[-2:] == ["c3a::block_circ_conv_many_prepared_add_"] * 2


# The bound of memory


def test_the_adapters_that_were_used_longest_ago_make_room(tmp_path):
    model = Net()
    folders, tuned = saved(model, tmp_path, "abcd")
    pool = c3a.AdapterPool(model, max_bytes=SIZE, folders=folders)
    x = torch.randn(1, 24)

    def use(*names):
        with pool.rows(names), torch.inference_mode():
            near(
                model(x.expand(len(names), -1)), row_by_row(tuned, names, x.expand(len(names), -1))
            )

    use("a")
    one = pool.nbytes
    pool.close()
    pool = c3a.AdapterPool(model, max_bytes=3 * one, folders=folders)
    for names, resident in [
        ("a", "a"),
        ("b", "ab"),
        ("a", "ba"),
        ("c", "bac"),
        ("d", "acd"),
        ("ba", "dab"),
        ("bad", "bad"),
    ]:
        use(*names)
        assert pool.resident == tuple(resident)
        assert pool.nbytes <= 3 * one
    with pytest.raises(ValueError, match=rf"fit max_bytes = {3 * one} together, got 'c' of {one}"):
        use(*"abcd")
    use("c")
    pool.clear()
    assert pool.nbytes == 0
    use("b")


def test_adapters_of_other_shapes_get_the_memory_of_those_that_went(tmp_path):
    model = Net()
    small, tuned = saved(model, tmp_path, ["a", "b", "c", "d"], targets=["up"])
    large, more = saved(model, tmp_path, ["e", "f"], block_size=2)
    tuned |= more
    limit = 7000  # two large ones, or eight small ones
    pool = c3a.AdapterPool(model, max_bytes=limit, folders={**small, **large})
    x = torch.randn(2, 24)
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        two = torch.randint(7, (2,), generator=generator)
        names = [[None, *"abcdef"][k] for k in two]
        with pool.rows(names), torch.inference_mode():
            near(model(x), row_by_row(tuned, names, x))
        assert 0 <= pool.nbytes <= limit


def test_what_rows_are_using_stays_and_others_wait_for_it(tmp_path):
    model = Net()
    folders, tuned = saved(model, tmp_path, "ab")
    x = torch.randn(1, 24)
    pool = c3a.AdapterPool(model, max_bytes=SIZE, folders=folders)
    with pool.rows(["a"]):
        pass
    one = pool.nbytes
    pool.close()
    pool = c3a.AdapterPool(model, max_bytes=one, folders=folders)
    began, results = threading.Event(), {}

    def other():
        began.set()
        with pool.rows(["b"]), torch.inference_mode():
            results["b"] = model(x)

    with torch.inference_mode(), pool.rows(["a"]):
        near(model(x), row_by_row(tuned, "a", x))
        thread = threading.Thread(target=other)
        thread.start()
        began.wait()
        time.sleep(0.1)
        assert not results
        assert pool.resident == ("a",)
        near(model(x), row_by_row(tuned, "a", x))
    thread.join(30)
    near(results["b"], row_by_row(tuned, "b", x))
    with pool.rows(["b"]):
        late = []

        def impatient():
            try:
                with pool.rows(["a"], timeout=0.05):
                    late.append("in")
            except TimeoutError as error:
                late.append(str(error))

        thread = threading.Thread(target=impatient)
        thread.start()
        thread.join(30)
    assert "'a' waited too long for memory that other rows use" in late[0]
    assert f"max_bytes = {one}" in late[0]


def test_a_thousand_are_registered_a_hundred_resident_and_eight_threads_right(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    save(model, tmp_path / "0", targets=["0", "2"])
    tensors = load_file(tmp_path / "0" / WEIGHTS)
    kernels, folders = {}, {}
    for i in range(1000):
        folders[f"user {i}"] = folder = tmp_path / str(i)
        folder.mkdir(exist_ok=True)
        kernels[f"user {i}"] = [torch.randn_like(w) for w in tensors.values()]
        save_file(dict(zip(tensors, kernels[f"user {i}"], strict=True)), folder / WEIGHTS)
        (folder / CONFIG).write_bytes((tmp_path / "0" / CONFIG).read_bytes())
    pool = c3a.AdapterPool(model, max_bytes=SIZE, folders=folders)
    assert pool.nbytes == 0
    with pool.rows(["user 0"]):
        one = pool.nbytes
    pool.close()
    pool = c3a.AdapterPool(model, max_bytes=100 * one, folders=folders)
    first, last = ((layer.weight.detach(), layer.bias.detach()) for layer in (model[0], model[2]))
    wrong, most, loads = [], [], []

    def of_one(name, x):
        w, v = (c3a.circulant(kernel) / 8 for kernel in kernels[name])
        hidden = nn.functional.linear(x, first[0] + w, first[1]).tanh()
        return nn.functional.linear(hidden, last[0] + v, last[1])

    def serve(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(25):
            some = torch.randint(1000, (7,), generator=generator).tolist()
            names = [f"user {k}" for k in some]
            x = torch.randn(8, 8, generator=generator)
            with pool.rows([*names, None]), torch.inference_mode():
                y = model(x)
                y = model(x)
                most.append(len(pool.resident))
            expected = [of_one(name, row) for name, row in zip(names, x, strict=False)]
            plain = nn.functional.linear(x[7], *first).tanh()
            expected.append(nn.functional.linear(plain, *last))
            if relative_error(y.double(), torch.stack(expected).double()) > 1e-5:
                wrong.append(names)
        loads.append(seed)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(loads) == 8
    assert not wrong
    assert max(most) == 100
    assert pool.nbytes == 100 * one


# Names and folders


def test_errors_say_what_was_expected_and_change_nothing(tmp_path):
    model = Net()
    folders, tuned = saved(model, tmp_path, "ab")
    pool = c3a.AdapterPool(model, max_bytes=SIZE, folders=folders)
    other = nn.Sequential(nn.Linear(8, 8))
    save(other, tmp_path / "other", targets=["0"])
    narrow = Net()
    narrow.down = nn.Linear(8, 12)
    save(narrow, tmp_path / "narrow", targets=["down"])
    save(model, tmp_path / "heads", modules_to_save=["head"])
    save(model, tmp_path / "damaged")
    (tmp_path / "damaged" / WEIGHTS).write_bytes(b"damaged")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / CONFIG).write_text('{"peft_type": "C3A"}')
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"")
    lora = peft.LoraConfig(target_modules=["up"])
    peft.get_peft_model(copy.deepcopy(model), lora).save_pretrained(tmp_path / "lora")
    for name in ("other", "narrow", "heads", "damaged", "pickle", "lora", "absent"):
        pool.register(name, tmp_path / name)
    x = torch.randn(2, 24)
    with pool.rows(["a", "b"]):
        pass
    before, size = pool.resident, pool.nbytes
    for name, kind, message in [
        (
            "who",
            ValueError,
            "expected registered names, got 'who'; registered: 'a', 'b', .* [(]9[)]",
        ),
        (
            "other",
            ValueError,
            "'other': .* expected a linear layer of the model's at 0, got none",
        ),
        ("narrow", ValueError, r"down: expected shape \(3, 6, 4\) at block size 4 for 24 features"),
        ("heads", ValueError, r"tensors beside kernels \('head.bias', 'head.weight'\), which rows"),
        ("damaged", ValueError, "damaged/adapter_model.safetensors is not a whole safetensors"),
        ("pickle", FileNotFoundError, "adapter_model.bin is a pickle, which is never read"),
        ("lora", ValueError, 'expected "peft_type": "C3A", got \'LORA\''),
        ("absent", FileNotFoundError, "'absent': no adapter_config.json in .*absent"),
    ]:
        with pytest.raises(kind, match=message) as caught, pool.rows(["a", name]):
            pass
        assert str(caught.value).startswith("c3a.AdapterPool")
        assert "\n" not in str(caught.value)
        assert set(pool.resident) == set(before)
        assert pool.nbytes == size
    with pool.rows(["b", "a"]), torch.inference_mode():
        near(model(x), row_by_row(tuned, "ba", x))


def test_adapters_of_experts_are_refused(tmp_path):
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()
    patched = save(model, tmp_path, targets=["q_proj"], target_parameters=["experts.down_proj"])
    pool = c3a.AdapterPool(model, max_bytes=SIZE, folders={"a": tmp_path})
    with pytest.raises(ValueError, match="linear layer .*experts.down_proj, got a parameter of ex"):
        pool.rows(["a"]).__enter__()
    assert pool.nbytes == 0
    with pytest.raises(ValueError, match=r"own adapter is in experts \(model.*experts.down_proj\)"):
        c3a.AdapterPool(patched, max_bytes=SIZE)


def test_wrong_arguments_and_calls_are_said(tmp_path):
    model = Net()
    folders, _ = saved(model, tmp_path, "ab")
    for wrong in (0, 1.5, True, "1 GB"):
        with pytest.raises(ValueError, match="expected max_bytes to be a whole number >= 1, got"):
            c3a.AdapterPool(model, max_bytes=wrong)
    pool = c3a.AdapterPool(model, max_bytes=SIZE, folders=folders)
    with pytest.raises(TypeError, match="register: expected a name, got 3"):
        pool.register(3, tmp_path)
    for wrong in ("ab", ["a", 3]):
        with pytest.raises(TypeError, match="expected a name or None for each row, got"):
            pool.rows(wrong).__enter__()
    with pytest.raises(ValueError, match="expected beams >= 1, got 0"):
        pool.rows(["a"], beams=0).__enter__()
    with pool.rows(["a", "b"]):
        with torch.no_grad(), pytest.raises(ValueError, match=r"input of 2 rows, .* got \(3, 24\)"):
            model(torch.randn(3, 24))
        with pytest.raises(RuntimeError, match="one rows block at a time, got another in it"):
            pool.rows(["a"]).__enter__()
        with pytest.raises(RuntimeError, match="expected a call without gradients"):
            model(torch.randn(2, 24, requires_grad=True))
    with pool.rows(["a"]), torch.no_grad(), pytest.raises(ValueError, match=r"got \(24,\)"):
        model(torch.randn(24))
    with pool.rows(["a", "b"], beams=2), torch.no_grad():
        model(torch.randn(2, 24))
        model(torch.randn(4, 24))
        with pytest.raises(ValueError, match=r"of 2 or, with 2 beams, 4 rows"):
            model(torch.randn(6, 24))
    with pytest.raises(ValueError, match="is a c3a.AdapterPool's"):
        c3a.AdapterPool(model, max_bytes=SIZE)
    theirs = peft.get_peft_model(Net(), peft.C3AConfig(target_modules=["up"], block_size=2))
    with pytest.raises(ValueError, match="holds the PEFT library's adapters .* adapter_names"):
        c3a.AdapterPool(theirs, max_bytes=SIZE)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled; close it first"):
            copied(model)
    pool.close()
    pool.close()
    for call in (lambda: pool.rows(["a"]).__enter__(), lambda: pool.register("c", tmp_path)):
        with pytest.raises(ValueError, match="the pool is closed"):
            call()
    copy.deepcopy(model)


def test_a_name_that_is_registered_again_or_removed_means_so_from_the_next_rows_on(tmp_path):
    model = Net()
    folders, tuned = saved(model, tmp_path, "ab")
    pool = c3a.AdapterPool(model, max_bytes=SIZE, folders=folders)
    x = torch.randn(1, 24)

    def load_b():
        with pool.rows(["b"]):
            pass

    with torch.inference_mode():
        with pool.rows(["a"]):
            pool.register("a", folders["b"])
            assert pool.resident == ()
            thread = threading.Thread(target=load_b)  # not in the place of what is in use
            thread.start()
            thread.join(30)
            assert pool.resident == ("b",)
            near(model(x), row_by_row(tuned, "a", x))
        with pool.rows(["a"]):
            near(model(x), row_by_row(tuned, "b", x))
            pool.remove("a")
            near(model(x), row_by_row(tuned, "b", x))
        with (
            pytest.raises(ValueError, match="expected registered names, got 'a'"),
            pool.rows(["a"]),
        ):
            pass
        with pytest.raises(ValueError, match=r"remove: expected registered names, got 'a'"):
            pool.remove("a")
        pool.clear()
        assert pool.nbytes == 0


# The model within


def test_a_models_state_dict_keeps_its_names_and_its_layers_come_back(tmp_path):
    model = Net()
    folders, tuned = saved(model, tmp_path, "ab")
    base, state = model.down, {key: t.clone() for key, t in model.state_dict().items()}
    pool = c3a.AdapterPool(model, max_bytes=SIZE, folders=folders)
    with pool.rows(["a"]):
        pass
    assert model.down is not base
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict({key: t + 1 for key, t in state.items()})
    model.load_state_dict(state)
    x = torch.randn(1, 24)
    with pool.rows(["b"]), torch.inference_mode():
        near(model(x), row_by_row(tuned, "b", x))
    pool.close()
    assert model.down is base
    assert model.state_dict().keys() == state.keys()


def test_a_weight_that_is_read_instead_of_called_is_refused_within_rows(tmp_path):
    model = Net()
    folders, _ = saved(model, tmp_path, "ab")
    pool = c3a.AdapterPool(model, max_bytes=SIZE, folders=folders)
    x = torch.randn(2, 24)
    with pool.rows(["a", "b"]):
        assert model.down.weight.dtype == torch.float32
        assert model.down.weight.shape == (12, 24)
        with pytest.raises(RuntimeError, match="weight is read, where each row has another"):
            nn.functional.linear(x, model.down.weight)
    nn.functional.linear(x, model.down.weight, model.down.bias)


def test_rows_are_a_contexts_own_also_among_tasks(tmp_path):
    model = Net()
    folders, tuned = saved(model, tmp_path, "ab")
    pool = c3a.AdapterPool(model, max_bytes=SIZE, folders=folders)
    x = torch.randn(1, 24)

    @torch.no_grad()
    def call():
        return model(x)

    async def serve(name):
        with pool.rows([name]):
            await asyncio.sleep(0.01)
            y = await asyncio.to_thread(call)
            await asyncio.sleep(0.01)
            return torch.equal(call(), y), y

    async def all_of_them():
        return await asyncio.gather(*(serve(name) for name in "abab"))

    for name, (same, y) in zip("abab", asyncio.run(all_of_them()), strict=True):
        assert same
        near(y, row_by_row(tuned, name, x))

    escaped = []

    async def late():
        await asyncio.sleep(0.05)
        with pytest.raises(RuntimeError, match="after the end of its rows"):
            call()
        escaped.append(True)

    async def outlived():
        with pool.rows(["a"]):
            task = asyncio.create_task(late())
        await task

    asyncio.run(outlived())
    assert escaped


@pytest.mark.parametrize("block", [nullcontext, torch.inference_mode])
def test_what_is_prepared_in_one_mode_serves_in_the_other(tmp_path, block):
    model = Net()
    folders, tuned = saved(model, tmp_path, "abc")
    pool = c3a.AdapterPool(model.requires_grad_(False), max_bytes=SIZE, folders=folders)
    x = torch.randn(1, 24)
    with block(), pool.rows(["a"]):
        model(x)
    for name, mode in zip("bca", (torch.no_grad, torch.inference_mode, nullcontext), strict=True):
        with mode(), pool.rows([name]):
            near(model(x).detach(), row_by_row(tuned, name, x))


def test_a_compiled_model_is_right_or_refused(tmp_path):
    model = Net()
    folders, tuned = saved(model, tmp_path, "ab")
    compiled = torch.compile(model, backend="eager")
    pool = c3a.AdapterPool(compiled, max_bytes=SIZE, folders=folders)
    x = torch.randn(2, 24)
    with torch.no_grad():
        compiled(x)
        for names in ("ab", "ba"):
            with pool.rows(list(names)):
                near(compiled(x), row_by_row(tuned, names, x))
        # Not by fullgraph=True: a compilation that fails leaves the compiler's hook on every frame.
        with pool.rows(["a", "b"]), pytest.raises(RuntimeError, match="AdapterPool: expected eage"):
            torch.export.export(model, (x,), strict=False)
