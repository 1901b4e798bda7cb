"""The modules that stay trainable: trained in a patched model, and the base's own without it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import c3a

pytestmark = pytest.mark.usefixtures("default_device")
X = torch.linspace(-1, 1, 48).view(8, 6)


class Head(nn.Module):
    """A head with a buffer that training changes, and one that cannot be written to."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 3)
        self.register_buffer("ones", torch.ones(1).expand(3), persistent=False)

    def forward(self, x):
        return self.out(self.norm(x)) * self.ones


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.head = Head()

    def forward(self, x):
        return self.head(self.body(x).relu())


def patched(model=None, **options):
    model = Model() if model is None else model
    options = {"init": "gaussian", "modules_to_save": ["head"], **options}
    return c3a.patch_model(model, ["body"], 3, **options)


def trained(model, steps=3):
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    x = X.to(next(model.parameters()))
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model, expected):
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def output(model):
    with torch.no_grad():
        like = next(p for name, p in model.named_parameters() if not name.endswith("c3a_kernel"))
        return model(X.to(like))


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_shows_the_head_as_it_was_and_then_the_trained_one(merged):
    expected = output(base := Model().eval())
    names = [name for name, _ in base.named_parameters()]
    model = trained(patched(base))
    assert model.head.norm.num_batches_tracked == 3
    if merged:
        c3a.merge(model)
    with_adapter, before = output(model), state(model)
    tensors = [*map(id, model.parameters()), *map(id, model.buffers())]
    assert not torch.allclose(with_adapter, expected)
    for _ in range(2):
        with c3a.disabled(model):
            assert torch.equal(output(model), expected)
            assert model.head.norm.num_batches_tracked == 0
            assert list(model.state_dict()) == list(before)
            with c3a.disabled(model):
                assert torch.equal(output(model), expected)
            assert torch.equal(output(model), expected)
        assert torch.equal(output(model), with_adapter)
    with pytest.raises(KeyError), c3a.disabled(model):
        raise KeyError
    assert_state(model, before)
    assert tensors == [*map(id, model.parameters()), *map(id, model.buffers())]
    c3a.unpatch_model(model)
    assert [name for name, _ in model.named_parameters()] == names


def test_unpatching_copies_the_head_back_into_the_same_tensors():
    base = Model().eval()
    expected, tensors = state(base), [*map(id, base.parameters()), *map(id, base.buffers())]
    model = c3a.unpatch_model(trained(patched(base)))
    assert_state(model, expected)
    assert tensors == [*map(id, model.parameters()), *map(id, model.buffers())]
    assert not any("c3a" in name for name in vars(model))


def test_unpatching_with_merge_keeps_the_trained_head():
    model = trained(patched())
    expected, head = output(model), state(model.head)
    c3a.unpatch_model(model, merge=True)
    torch.testing.assert_close(output(model), expected)
    assert_state(model.head, head)


def test_a_forward_in_training_mode_does_not_reach_the_copies():
    model = patched()
    expected = state(c3a.unpatch_model(copy.deepcopy(model)))
    with c3a.disabled(model.train()):
        model(X)
    assert model.head.norm.num_batches_tracked == 0
    assert_state(c3a.unpatch_model(trained(model)), expected)


def test_a_head_that_shares_its_weight_is_shown_in_every_place():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 6), "body": nn.Linear(6, 6)})
    model["out"] = nn.Linear(6, 5, bias=False)
    model["out"].weight = model["embed"].weight
    original = model["out"].weight.detach().clone()
    c3a.patch_model(model, ["body"], 3, modules_to_save=["out"])
    weight = model["out"].weight
    with torch.no_grad():
        weight.normal_()
    after = weight.detach().clone()
    with c3a.disabled(model):
        assert model["out"].weight is model["embed"].weight
        assert torch.equal(model["embed"].weight, original)
        assert next(iter(model.state_dict())) == "embed.weight"
    assert model["out"].weight is model["embed"].weight is weight
    assert torch.equal(weight, after)
    c3a.unpatch_model(model)
    assert model["out"].weight is model["embed"].weight is weight
    assert torch.equal(weight, original)


def test_recurrent_heads_compute_with_what_is_shown():
    model = nn.ModuleDict({"body": nn.Linear(6, 6), "head": nn.LSTM(6, 2)})
    expected = model["head"](X)[0]
    c3a.patch_model(model, ["body"], 3, modules_to_save=["head"])
    with torch.no_grad():
        for parameter in model["head"].parameters():
            parameter.normal_()
    after = model["head"](X)[0]
    with c3a.disabled(model):
        assert torch.equal(model["head"](X)[0], expected)
    assert torch.equal(model["head"](X)[0], after)


@pytest.mark.parametrize("within", [False, True])
def test_the_head_has_the_dtype_of_the_model_now(within):
    base = Model().eval()
    expected = output(copy.deepcopy(base).bfloat16())
    model = trained(patched(base))
    if not within:
        model.bfloat16()
    with c3a.disabled(model):
        if within:
            model.bfloat16()
        assert torch.equal(output(model), expected)
    kernel = model.body.c3a_kernel
    assert {p.dtype for p in model.parameters() if p is not kernel} == {torch.bfloat16}
    assert kernel.dtype == torch.float32
    assert model.head.norm.running_mean.dtype == torch.bfloat16
    assert output(model).dtype == torch.bfloat16
    c3a.unpatch_model(model)
    assert torch.equal(output(model), expected)


def test_a_head_on_the_meta_device_does_no_harm():
    with torch.device("meta"):
        model = patched()
    with c3a.disabled(model):
        assert model(X.to("meta")).is_meta
    assert model._c3a_record.originals == {}
    later = patched().to("meta")
    with c3a.disabled(later):
        assert later(X.to("meta")).is_meta
    for each in (model, later):
        c3a.unpatch_model(each)
        assert all(p.is_meta for p in each.parameters())


def test_a_head_that_accelerate_has_offloaded_is_named_and_nothing_changes():
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    with torch.device("cpu"):
        base = Model().eval()
        expected, x = output(base), X.to("cpu")
        model = trained(patched(base))
        with_adapter = output(model)
        cpu_offload(model)
        for attempt in (lambda: c3a.disabled(model).__enter__(), lambda: c3a.unpatch_model(model)):
            with pytest.raises(ValueError, match=r"head\.norm\.weight .*accelerate has offloaded"):
                attempt()
            assert model.body.enabled
            assert torch.equal(model(x), with_adapter)
        remove_hook_from_submodules(model)
        with c3a.disabled(model):
            assert torch.equal(output(model), expected)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, pickled, through_a_file])
def test_the_copies_come_along_with_the_model_and_are_its_own(again):
    base = Model().eval()
    expected, original = output(base), state(base)
    model = trained(patched(base))
    after = state(model)
    other = again(model)
    assert_state(other, after)
    with c3a.disabled(other):
        assert torch.equal(output(other), expected)
        assert_state(model, after)
    assert_state(c3a.unpatch_model(other), original)
    assert_state(model, after)


def wrapped_in_ddp(model, tmp_path):
    if torch.empty(0).device.type != "cpu":
        pytest.skip("on the CPU")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    model.head.ones = torch.ones(3)  # it writes into every buffer
    return nn.parallel.DistributedDataParallel(model)


WRAPPERS = {
    "compiled": lambda model, tmp_path: torch.compile(model, backend="eager"),
    "DataParallel": lambda model, tmp_path: nn.DataParallel(model),
    "DDP": wrapped_in_ddp,
    "a larger model": lambda model, tmp_path: nn.Sequential(model, nn.Identity()),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_show_both(wrapper, tmp_path):
    base = Model().eval()
    expected, original = output(base), state(base)
    model = WRAPPERS[wrapper](patched(base), tmp_path)
    try:
        trained(model)
        with_adapter = output(model)
        with c3a.disabled(model):
            torch.testing.assert_close(output(model), expected)
        torch.testing.assert_close(output(model), with_adapter)
        assert not torch.allclose(with_adapter, expected)
        c3a.unpatch_model(model)
        assert_state(base, original)
        torch.testing.assert_close(output(model), expected)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("saved", [(), ("head",)], ids=["no head", "head"])
def test_disabled_within_a_compiled_function(saved):
    base = Model().eval()
    expected = output(base)
    model = patched(base, modules_to_save=saved)
    if saved:
        trained(model)
    with_adapter = output(model)

    @torch.compile(backend="eager", fullgraph=not saved)
    def of_the_base(x):
        with c3a.disabled(model):
            return model(x)

    torch.testing.assert_close(of_the_base(X), expected)
    assert torch.equal(output(model), with_adapter)
    assert not torch.allclose(with_adapter, expected)


def test_copies_take_the_memory_of_the_head_alone():
    model = patched()
    copies = model._c3a_record.originals
    assert set(copies) == {f"head.{name}" for name in [*state(model.head), "ones"]}
    tied = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "body": nn.Linear(6, 6)})
    tied["b"].weight = tied["a"].weight
    c3a.patch_model(tied, ["body"], 3, modules_to_save=["a", "b"])
    copies = tied._c3a_record.originals
    assert copies["a.weight"] is copies["b.weight"]
    assert len({t.untyped_storage().data_ptr() for t in copies.values()}) == 3
    with c3a.disabled(tied):
        shown = tied["a"].weight
        assert shown.data_ptr() == copies["a.weight"].data_ptr()
        assert not shown.requires_grad
    assert patched(modules_to_save=())._c3a_record.originals == {}


@pytest.mark.parametrize("how", ["replaced by one of another size", "taken away"])
def test_a_head_of_another_shape_is_named_and_nothing_changes(how):
    model = trained(patched())
    if how == "taken away":
        model.head.out.bias = None
        message = r"head\.out\.bias cannot .*expected a tensor of shape \(3,\), got none"
    else:
        model.head.out = nn.Linear(6, 4)
        message = r"head\.out\.weight .* of shape \(3, 6\), got one of shape \(4, 6\)"
    before = state(model)
    for attempt in (lambda: c3a.disabled(model).__enter__(), lambda: c3a.unpatch_model(model)):
        with pytest.raises(ValueError, match=message):
            attempt()
        assert_state(model, before)
        assert model.body.enabled
    c3a.unpatch_model(model, merge=True)
    assert isinstance(model.body, nn.Linear)


def test_a_patch_that_fails_leaves_no_record_and_no_copies(monkeypatch):
    model = Model()
    before = state(model)

    def fail(*arguments):
        raise torch.OutOfMemoryError("no memory for a copy")

    monkeypatch.setattr("c3a.patch._copies", fail)
    with pytest.raises(torch.OutOfMemoryError):
        patched(model)
    assert "_c3a_record" not in vars(model)
    assert all(p.requires_grad for p in model.parameters())
    assert_state(model, before)


@pytest.mark.parametrize("merge", [False, True])
def test_unpatching_within_disabled(merge):
    base = Model().eval()
    original = state(base)
    model = trained(patched(base))
    head, parameters = state(model.head), [*map(id, model.head.parameters())]
    with c3a.disabled(model):
        c3a.unpatch_model(model, merge=merge)
    assert [*map(id, model.head.parameters())] == parameters
    if merge:
        assert_state(model.head, head)
    else:
        assert_state(model, original)


def test_saving_and_loading_within_disabled_is_about_the_trained_head(tmp_path):
    base = Model().eval()
    expected = output(base)
    model = trained(patched(base))
    with_adapter = output(model)
    with c3a.disabled(model):
        c3a.save_adapter(model, tmp_path)
        assert torch.equal(output(model), expected)
    fresh = c3a.load_adapter(copy.deepcopy(c3a.unpatch_model(copy.deepcopy(model))), tmp_path)
    torch.testing.assert_close(output(fresh), with_adapter)
    trained(model)
    with c3a.disabled(model):
        c3a.load_adapter(model, tmp_path)
        assert torch.equal(output(model), expected)
    torch.testing.assert_close(output(model), with_adapter)


def test_after_loading_an_adapter_the_base_model_has_its_own_head(tmp_path):
    c3a.save_adapter(trained(patched()), tmp_path)
    base = Model().eval()
    expected, original = output(base), state(base)
    model = c3a.load_adapter(base, tmp_path)
    assert not torch.allclose(output(model), expected)
    with c3a.disabled(model):
        assert torch.equal(output(model), expected)
    assert_state(c3a.unpatch_model(model), original)
