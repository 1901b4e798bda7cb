"""Experts whose matrices are one parameter of three dimensions: a kernel for each expert.

The parameter stays where it is, under its name. Its module's class gets a property of that name, by
which the experts' own code, whichever way it computes, reads ``ExpertsWeight``: the products that
are usual of experts add ``block_circ_conv`` onto their results, with an expert for each token, and
only what else is done with the weight needs the sum of the matrices.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from . import _private, adapted
from ._library import OPS as _OPS
from .linear import check_kernel, checked_scale, initialise, keeping_wide, why_not_finite
from .ops import block_circ_conv_linear
from .reference import circulant
from .sizes import kernel_shape
from .weight import AdaptedWeight, read

if TYPE_CHECKING:
    from typing_extensions import Self

# The attribute of a module that holds the adapters of its parameters. transformers renames what it
# takes for experts' weights when it saves a model, and is not to take this for one.
ADAPTERS = "c3a_adapters"


class Stack(NamedTuple):
    """A parameter that holds a matrix for each expert."""

    owner: nn.Module
    key: str
    weight: nn.Parameter

    @property
    def is_turned(self) -> bool:
        """Whether a matrix is ``(in, out)``, as transformers marks it on the module."""
        return bool(getattr(self.owner, "is_transposed", False))

    @property
    def features(self) -> tuple[int, int]:
        rows, columns = self.weight.shape[1:]
        return (rows, columns) if self.is_turned else (columns, rows)


def stacks(model: nn.Module) -> dict[str, Stack]:
    """Return the parameters of a model that hold a matrix for each expert, by name.

    A parameter of three dimensions is one, ``(experts, out, in)`` or ``(experts, in, out)``, unless
    it is a convolution's or the first of its dimensions is 1.
    """
    found: dict[str, Stack] = {}
    for name, module in model.named_modules():
        is_convolution = hasattr(module, "kernel_size") or isinstance(module, ParametrizationList)
        for key, parameter in _private.parameters(module).items():
            if parameter is None or is_lazy(parameter) or is_convolution or key == "c3a_kernel":
                continue
            if parameter.ndim == 3 and min(parameter.shape) > 1:
                found[f"{name}.{key}".strip(".")] = Stack(module, key, parameter)
    return found


def adapted_experts(model: nn.Module) -> dict[str, "C3AExperts"]:
    """Return the experts' adapters of a model, by the names of the parameters that they adapt."""
    return {
        f"{name}.{key}".strip("."): adapter
        for name, module in model.named_modules()
        for key, adapter in _adapters(module).items()
    }


def _adapters(module: nn.Module) -> Mapping[str, "C3AExperts"]:
    held: Any = module._modules.get(ADAPTERS)
    return {} if held is None else dict(held.items())


class C3AExperts(nn.Module):
    """The adapters of experts whose matrices are one parameter of a module.

    Attributes:
        c3a_kernel: parameter of shape ``(experts, m, n, block_size)``.
        enabled: assign False to have the experts compute with the parameter alone, merged or not.
        merged: whether they compute with a copy of the parameter that holds the adapters.
    """

    in_features: int
    out_features: int
    block_size: int
    init: str
    c3a_kernel: nn.Parameter

    def __init__(
        self,
        stack: Stack,
        block_size: int,
        *,
        scale: float | None = None,
        init: str = "zeros",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_kernel("c3a.patch_model", dtype, init)
        self.in_features, self.out_features = stack.features
        self.block_size, self.init = int(block_size), init
        scale = 1 / self.in_features if scale is None else scale
        self._scale = checked_scale("c3a.patch_model", scale)
        self._owner, self._key = [stack.owner], stack.key  # a list, lest nn.Module registers it
        self._is_turned = stack.is_turned
        shape = (len(stack.weight), *kernel_shape(*stack.features, self.block_size))
        device = adapted.kernel_device(stack.owner)
        self.c3a_kernel = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.enabled: bool = True
        self._merged: list[nn.Parameter] = []
        self.train(stack.owner.training)
        self.reset_parameters()
        self.register_load_state_dict_post_hook(_merge_anew)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the kernels with the initial values that ``init`` names."""
        initialise(self.c3a_kernel, self.init, self.in_features, self.out_features)

    @property
    def base(self) -> nn.Parameter:
        """The parameter, as it is without the adapters."""
        found = _private.parameters(self._owner[0])[self._key]
        assert found is not None
        return found

    @property
    def weight(self) -> Tensor:
        """What the experts' code gets for the parameter."""
        base = self.base
        if not self.enabled:
            return base
        for merged in self._merged:  # which another thread may empty meanwhile
            return merged
        kernel = self.c3a_kernel
        if kernel.is_meta and not base.is_meta:
            raise RuntimeError(
                f"c3a: the kernels of experts ({self._key}) are on the meta device: accelerate "
                "offloads a model right that is patched after it was offloaded"
            )
        matrices = _Matrices(base, kernel, self.scale, self._is_turned)
        return matrices.read() if _private.is_plain(base, kernel) else matrices.sum()

    def delta_weight(self) -> Tensor:
        """Return ``scale * circulant`` of each kernel, ``(experts, out, in)``, >= float32."""
        return _delta(self.c3a_kernel, self.scale)

    @property
    def scale(self) -> float:
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = checked_scale("C3AExperts", value)
        _merge_anew(self)

    @property
    def merged(self) -> bool:
        return bool(self._merged)

    @property
    def merged_weight(self) -> nn.Parameter:
        """While merged, the copy of the parameter that holds the adapters."""
        return self._merged[0]

    @torch.no_grad()
    def merge(self, *, safe: bool = True) -> None:
        """Compute with a copy of the parameter that holds the adapters. Idempotent.

        Raises ValueError where something is on the meta device, or, if ``safe``, where the sum
        would not be finite.
        """
        if self._merged:
            return
        base, kernel = self.base, self.c3a_kernel
        if base.is_meta or kernel.is_meta:
            raise ValueError(
                "c3a: cannot merge: the experts are on the meta device, without values"
            )
        total = _Matrices(base, kernel, self.scale, self._is_turned).sum()
        if safe and (problem := why_not_finite(total, base, kernel)):
            raise ValueError(problem)
        self._merged = [nn.Parameter(total, requires_grad=base.requires_grad)]

    def unmerge(self) -> None:
        """Compute with the parameter, which never changed, and the adapters. Idempotent."""
        self._merged = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Self":
        super()._apply(keeping_wide(fn), recurse)  # type: ignore[no-untyped-call]
        self._merged = [adapted.moved(weight, fn) for weight in self._merged]
        return self

    def extra_repr(self) -> str:
        state = ", merged" if self.merged else ""
        state += "" if self.enabled else ", disabled"
        return (
            f"experts={len(self.c3a_kernel)}, in_features={self.in_features}, "
            f"out_features={self.out_features}, block_size={self.block_size}, "
            f"scale={self.scale:.3g}, parameters={self.c3a_kernel.numel()}{state}"
        )


def _merge_anew(adapter: C3AExperts, _incompatible_keys: object = None) -> None:
    if adapter.merged:
        adapter.unmerge()
        adapter.merge()


# A module's class, for as long as some of its parameters are adapted


def put_in(adapters: Iterable[C3AExperts]) -> None:
    """Have modules read their parameters through these adapters."""
    for adapter in adapters:
        owner, key = adapter._owner[0], adapter._key
        if ADAPTERS not in owner._modules:
            owner.add_module(ADAPTERS, nn.ModuleDict())
        owner.get_submodule(ADAPTERS).add_module(key, adapter)
        keys = frozenset(_adapters(owner))
        owner.__class__ = _reading(plain_class(owner), keys)


def take_out(adapters: Iterable[C3AExperts], merge: bool = False) -> None:
    """Undo ``put_in``; with ``merge`` the parameters become the merged ones."""
    for adapter in adapters:
        owner, key = adapter._owner[0], adapter._key
        if merge:
            _private.parameters(owner)[key] = adapter.merged_weight
        if ADAPTERS in owner._modules:
            owner.__class__ = plain_class(owner)
            del owner._modules[ADAPTERS]


def plain_class(owner: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before ``put_in``."""
    kind = type(owner)
    return kind.__base__ if "_c3a_reads" in vars(kind) else kind  # type: ignore[return-value]


def _reading(kind: type[nn.Module], keys: frozenset[str]) -> type[nn.Module]:
    members: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__reduce_ex__": _reduced,
        "_c3a_reads": keys,
    }
    members |= {key: property(partial(_read_of, key=key)) for key in keys}
    made: type[nn.Module] = type(kind.__name__, (kind,), members)
    return made


def _read_of(owner: nn.Module, key: str) -> Tensor:
    adapters: Any = owner._modules[ADAPTERS]
    weight: Tensor = adapters._modules[key].weight
    return weight


def _reduced(owner: nn.Module, _protocol: object) -> tuple[Any, ...]:
    """Copies and pickles: the class is made anew, for no module has it by name."""
    return _made_anew, (plain_class(owner), vars(type(owner))["_c3a_reads"]), owner.__dict__.copy()


def _made_anew(kind: type[nn.Module], keys: frozenset[str]) -> nn.Module:
    made = _reading(kind, keys)
    return made.__new__(made)


# What the experts' code gets


def _delta(kernels: Tensor, scale: float) -> Tensor:
    """Return ``scale * circulant`` of ``(..., m, n, b)``, in float32 at least."""
    m, n, b = kernels.shape[-3:]
    wide = kernels.to(torch.promote_types(kernels.dtype, torch.float32))
    return circulant(wide.reshape(-1, n, b)).reshape(*kernels.shape[:-3], m * b, n * b) * scale


def _transposed(kernels: Tensor) -> Tensor:
    """Return the kernels of the transposed matrices: ``w'[j, i, t] = w[i, j, -t % b]``."""
    return kernels.transpose(-3, -2).flip(-1).roll(1, -1)


class _Base(NamedTuple):
    weight: Tensor


class _Matrices:
    """Matrices and the kernels of what is added to them, in the words of ``c3a.weight``.

    Args:
        weight: ``(rows, columns)``, or a stack of such.
        c3a_kernel: of one matrix, or of all experts.
        is_turned: the weight's matrices are ``(in, out)``.
        index: the expert of each matrix of ``weight``, where not every expert has one.
    """

    def __init__(
        self,
        weight: Tensor,
        kernel: Tensor,
        scale: float,
        is_turned: bool,
        index: Tensor | None = None,
    ) -> None:
        self.plain = weight
        self.c3a_kernel, self.scale = kernel, scale
        self.is_turned, self.index = is_turned, index

    @property
    def base_layer(self) -> "_Base":
        return _Base(self.plain)

    def add_delta(self, weight: Tensor, kernel: Tensor) -> Tensor:
        delta = _delta(kernel if self.index is None else kernel[self.index], self.scale)
        return (weight + (delta.mT if self.is_turned else delta)).to(weight.dtype)

    def sum(self) -> Tensor:
        return self.add_delta(self.plain, self.c3a_kernel)

    def read(self) -> "ExpertsWeight":
        found = read(self, ExpertsWeight)
        found._matrices = self
        return found

    def kernel(self, as_rows: bool) -> Tensor:
        """Return the kernels by which tokens are multiplied.

        ``as_rows``: a token is multiplied by the weight's columns, ``x @ weight``.
        """
        return self.c3a_kernel if self.is_turned == as_rows else _transposed(self.c3a_kernel)


class ExpertsWeight(AdaptedWeight):
    """The experts' matrices, each with its adapter's: a value, added up where it must be.

    Picking experts, transposing, and the products of ``_RULES`` need no sum.
    """

    _matrices: _Matrices
    _kept: Tensor | None = None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        found = None if rule is None else rule(*args, **kwargs)
        return _private.no_torch_function(func, types, args, kwargs) if found is None else found

    def data_ptr(self) -> int:
        # transformers looks at its alignment. The sum is kept for those who read from there.
        if self._kept is None:
            self._kept = self._sum()
        return self._kept.data_ptr()


def _pick(weight: Any, index: object) -> Tensor | None:
    m = weight._matrices
    if m.plain.ndim != 3 or m.index is not None or isinstance(index, bool):
        return None
    if isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64):
        if index.ndim == 1:
            some = m.plain[index]
            index = index.long() % len(m.plain)  # -1 is no expert to block_circ_conv_many
            return _Matrices(some, m.c3a_kernel, m.scale, m.is_turned, index).read()
        index = int(index) if index.ndim == 0 else index
    if isinstance(index, int):
        return _Matrices(m.plain[index], m.c3a_kernel[index], m.scale, m.is_turned).read()
    return None


def _turn(weight: Any, *dims: int) -> Tensor | None:
    m = weight._matrices
    if {dim % m.plain.ndim for dim in dims} != {m.plain.ndim - 2, m.plain.ndim - 1}:
        return None
    return _Matrices(m.plain.mT, m.c3a_kernel, m.scale, not m.is_turned, m.index).read()


def _turn_last(weight: Any) -> Tensor | None:
    return _turn(weight, -2, -1)


def _turn_one(weight: Any) -> Tensor | None:
    return _turn_last(weight) if weight.ndim == 2 else None


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    if not _is_of(weight, 2, input, bias):
        return None
    m = weight._matrices
    return block_circ_conv_linear(input, m.plain, bias, m.kernel(as_rows=False), m.scale)


def _matmul(input: Tensor, other: Any) -> Tensor | None:
    if isinstance(other, ExpertsWeight) and other.ndim == 3 and input.ndim == 3:
        return _bmm(input, other)
    return _linear(input, other.mT) if _is_of(other, 2, input) else None


def _bmm(input: Any, mat2: Any) -> Tensor | None:
    if _is_of(mat2, 3, input):
        m = mat2._matrices
        y = torch.bmm(input, m.plain)
        _add_each(m, y, input, as_rows=True)
        return y
    if _is_of(input, 3, mat2):
        m = input._matrices
        y = torch.bmm(m.plain, mat2)
        _add_each(m, y.mT, mat2.mT, as_rows=False)
        return y
    return None


def _add_each(m: _Matrices, onto: Tensor, x: Tensor, as_rows: bool) -> None:
    index = torch.arange(len(x), device=x.device) if m.index is None else m.index
    _OPS.block_circ_conv_many_add_(onto, x, m.kernel(as_rows), index, m.scale)


def _grouped_mm(
    input: Tensor, mat2: Any, offs: Tensor | None = None, **options: Any
) -> Tensor | None:
    if offs is None or not _is_of(mat2, 3, input) or input.ndim != 2:
        return None
    m = mat2._matrices
    y = F.grouped_mm(input, m.plain, offs=offs, **options)
    index = torch.searchsorted(offs, torch.arange(len(input), device=offs.device), right=True)
    index = index.where(index < len(m.plain), -1)  # rows behind the last group
    _OPS.block_circ_conv_many_add_(y, input, m.kernel(as_rows=True), index, m.scale)
    return y


def _is_of(weight: object, ndim: int, *others: object) -> bool:
    return (
        isinstance(weight, ExpertsWeight)
        and weight.ndim == ndim
        and not any(isinstance(other, ExpertsWeight) for other in others)
    )


_RULES: dict[Any, Callable[..., Tensor | None]] = {
    Tensor.__getitem__: _pick,
    Tensor.transpose: _turn,
    torch.transpose: _turn,
    Tensor.mT.__get__: _turn_last,  # type: ignore[attr-defined]
    Tensor.T.__get__: _turn_one,  # type: ignore[attr-defined]
    Tensor.t: _turn_one,
    F.linear: _linear,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.bmm: _bmm,
    Tensor.bmm: _bmm,
    _private.grouped_mm: _grouped_mm,
}
