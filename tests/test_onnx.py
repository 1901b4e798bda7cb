"""Exported to ONNX and run by onnxruntime, an adapted model gives what torch gives."""

import re
import sys

import pytest
import torch
from torch import nn

import c3a
import c3a.onnx
from cases import relative_error

pytestmark = pytest.mark.filterwarnings(
    "ignore:.isinstance.treespec, LeafSpec:FutureWarning",  # torch's own copies
    "ignore:.*:DeprecationWarning:(onnx|onnxscript|onnx_ir)",
)


@pytest.fixture
def runtime():
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    return pytest.importorskip("onnxruntime", reason="onnxruntime runs what was exported")


class Product(nn.Module):
    """A kernel, and what is to be done with it."""

    def __init__(self, function, *shape, dtype=torch.float32):
        super().__init__()
        self.function, self.w = function, nn.Parameter(torch.randn(shape, dtype=dtype))

    def forward(self, *tensors):
        return self.function(*tensors, self.w)


def exported(module, example, path, sizes=None):
    """Export with all sizes but the last dynamic."""
    sizes = sizes or tuple({i: f"d{i}" for i in range(x.dim() - 1)} for x in example)
    if isinstance(module, Product):
        sizes = (sizes,)  # of its one variadic argument
    torch.onnx.export(
        module.eval(),
        example,
        path,
        dynamo=True,
        dynamic_shapes=sizes,
        custom_translation_table=c3a.onnx.translations(),
        verbose=False,
    )
    return path


def run(runtime, path, *tensors):
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    arrays = {name: x.numpy() for name, x in zip(names, tensors, strict=True)}
    return torch.from_numpy(session.run(None, arrays)[0])


# A few large blocks are multiplied as a dense matrix, many small ones by bins.
KERNELS = [(2, 3, 1), (3, 5, 2), (5, 6, 7), (3, 4, 8), (1, 1, 60), (3, 1, 30), (4, 3, 127)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in KERNELS), *((s, torch.float64) for s in KERNELS[-2:])],
    ids=str,
)
def test_the_operator_is_translated_for_any_block_size(shape, dtype, runtime, tmp_path):
    module = Product(lambda x, w: c3a.block_circ_conv(x, w, 0.3), *shape, dtype=dtype)
    features = shape[1] * shape[2]
    path = exported(module, (torch.randn(4, features, dtype=dtype),), tmp_path / "model.onnx")
    for tokens in (1, 4, 33, 0):
        x = torch.randn(tokens, features, dtype=dtype)
        got, y = run(runtime, path, x), module(x).detach()
        assert (got.shape, got.dtype) == (y.shape, y.dtype)
        if tokens:
            assert relative_error(got, y.double()) < (1e-14 if dtype == torch.float64 else 1e-6)


def test_the_sum_is_translated(runtime, tmp_path):
    module = Product(lambda base, x, w: c3a.block_circ_conv_add(base, x, w, 0.3), 3, 4, 8)
    path = exported(module, (torch.randn(5, 24), torch.randn(5, 32)), tmp_path / "model.onnx")
    tensors = torch.randn(9, 24), torch.randn(9, 32)
    got, y = run(runtime, path, *tensors), module(*tensors).detach()
    assert relative_error(got, y.double()) < 1e-6


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_linear_layer_and_the_sum_are_translated_as_one_operator(bias, runtime, tmp_path):
    layer = nn.Linear(24, 32, bias)

    def function(x, w):
        return c3a.block_circ_conv_linear(x, layer.weight, layer.bias, w, 0.3)

    module = Product(function, 4, 3, 8)
    module.layer = layer
    path = exported(module, (torch.randn(5, 2, 24),), tmp_path / "model.onnx")
    x = torch.randn(3, 7, 24)
    assert relative_error(run(runtime, path, x), module(x).detach().double()) < 1e-6


@pytest.mark.parametrize("shape", [(5, *kernel) for kernel in KERNELS], ids=str)
@pytest.mark.parametrize("leading", [(4,), (3, 2)], ids=str)
def test_many_kernels_are_translated_row_by_row(shape, leading, runtime, tmp_path):
    def function(x, index, w):
        return c3a.block_circ_conv_many(x, w, index, 0.3)

    module, features = Product(function, *shape), shape[2] * shape[3]
    example = torch.randn(*leading, features), torch.zeros(leading[0], dtype=torch.int64)
    sizes = ({i: f"d{i}" for i in range(len(leading))}, {0: "d0"})
    path = exported(module, example, tmp_path / "model.onnx", sizes)
    for rows in (1, 6, 0):
        x = torch.randn(rows, *(7 for _ in leading[1:]), features)
        index = torch.tensor([3, -1, 0, 3, 4, 2][:rows], dtype=torch.int64)
        x[index < 0] = torch.inf
        got, y = run(runtime, path, x, index), module(x, index).detach()
        assert got.shape == y.shape
        if rows:
            assert relative_error(got, y.double()) < 1e-6
            assert not got[index < 0].any()


def test_operators_that_are_not_translated_are_refused_by_name(runtime, tmp_path):
    w_hat = c3a.prepare(torch.randn(4, 3, 8))
    module = Product(lambda x, _: c3a.block_circ_conv_prepared(x, w_hat, 8), 1)
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="block_circ_conv_prepared"):
        exported(module, (torch.randn(5, 24),), tmp_path / "model.onnx")


def test_a_layer_that_has_prepared_its_kernel_is_exported_with_batch_and_length(runtime, tmp_path):
    layer = c3a.C3ALinear(nn.Linear(60, 35), 8, pad=True, init="gaussian").eval()
    with torch.no_grad():
        layer(torch.randn(2, 60))
    path = exported(layer, (torch.randn(2, 3, 60),), tmp_path / "model.onnx")
    x = torch.randn(5, 7, 60)
    assert relative_error(run(runtime, path, x), layer(x).detach().double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_float32(dtype, runtime, tmp_path):
    """The inputs are halves within the graph: NumPy, by which they come, has no bfloat16."""

    def function(base, x, w):
        return c3a.block_circ_conv_add(base.to(dtype), x.to(dtype), w, 0.3).float()

    module = Product(function, 3, 4, 8)
    path = exported(module, (torch.randn(5, 24), torch.randn(5, 32)), tmp_path / "model.onnx")
    tensors = torch.randn(9, 24), torch.randn(9, 32)
    got, y = run(runtime, path, *tensors), module(*tensors).detach()
    eps = torch.finfo(dtype).eps
    assert relative_error(got, y.double()) < eps


def test_a_patched_language_model_gives_the_same_logits(runtime, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=50, num_attention_heads=2, num_labels=3, **sizes)
    model = BertForSequenceClassification(config)
    c3a.patch_model(model, ["query", "value", "dense"], block_size=16, init="gaussian")

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids).logits

    module, path = Logits().eval(), tmp_path / "model.onnx"
    exported(module, (torch.randint(50, (2, 9)),), path, sizes=({0: "batch", 1: "length"},))
    ids = torch.randint(50, (3, 17))
    assert relative_error(run(runtime, path, ids), module(ids).detach().double()) < 1e-5


def test_the_kernel_stays_as_small_in_the_file_as_it_is(runtime, tmp_path):
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(3)))
    c3a.patch_model(model, "all-linear", block_size=64)
    path = exported(model, (torch.randn(2, 512),), tmp_path / "model.onnx")
    held = sum(file.stat().st_size for file in tmp_path.iterdir())
    parameters = sum(p.nbytes for p in model.parameters())
    assert path.exists()
    assert held < 1.1 * parameters  # a dense matrix for each kernel would double it


def test_without_onnxscript_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'c3a[onnx]'")):
        c3a.onnx.translations()


def test_a_kernel_of_dynamic_shape_is_refused(runtime, tmp_path):
    module = Product(lambda x, w, _: c3a.block_circ_conv(x, w), 1).eval()
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="kernel of static shape"):
        torch.onnx.export(
            module,
            (torch.randn(2, 12), torch.randn(3, 2, 6)),
            dynamo=True,
            dynamic_shapes=((None, {0: "m"}),),
            custom_translation_table=c3a.onnx.translations(),
            verbose=False,
        )
