"""The PEFT library's C3A layers, with this package's operators: right gradients, and fast.

PEFT makes, names, switches and saves its adapters as ever; what changes is the class of its layers
and of its model, each to a subclass.
"""

import re
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import peft
import torch
from torch import Tensor, nn

from . import adapted, merging
from .linear import checked_dropout
from .prepared import PreparedKernel, PreparedStack
from .sizes import features, linear_features

_OLDEST, _NEWEST = (0, 16), (0, 21)  # releases that were tried


def _release() -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", peft.__version__)[:2])


if _release() < _OLDEST:
    raise ImportError(
        f"c3a.peft: expected peft 0.16 or newer, which has C3A, got {peft.__version__}; pip "
        "install -U peft"
    )

from peft.tuners.c3a import layer as _layer  # noqa: E402  (which older ones lack)
from peft.tuners.c3a import model as _model  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge  # noqa: E402
from peft.utils.other import AuxiliaryTrainingWrapper  # noqa: E402

if TYPE_CHECKING:
    from typing_extensions import Self


class AcceleratedC3ALinear(_layer.C3ALinear):
    """PEFT's layer, computed by ``c3a.block_circ_conv``.

    Active adapters add up. Any layer with in and out features may be its base, and rows may each
    have an adapter of their own.
    """

    # What PEFT's class does not have; in the instance where it differs.
    _c3a_dropout = 0.0
    _c3a_exchanged: tuple[nn.Parameter, nn.Parameter] | None = None  # original and merged weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if names is not None:
            return self._forward_by_row(x, names, args, kwargs)
        if self.disable_adapters or self.merged:
            unadapted: Tensor = self.base_layer(x, *args, **kwargs)
            return unadapted
        shares = [self._share(name) for name in self.active_adapters if name in self.c3a_kernel]
        dropout = self._c3a_dropout if self.training else 0.0
        return adapted.forward(self.base_layer, x, shares, dropout, args, kwargs)

    def _forward_by_row(
        self, x: Tensor, names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Tensor:
        if self.merged:
            raise ValueError(
                "c3a.peft: adapter_names for the rows of a batch need unmerged adapters, and "
                f"{self.merged_adapters} are merged: call unmerge_adapter() first"
            )
        if len(names) != len(x):
            raise ValueError(
                f"c3a.peft: expected an adapter name for each of {len(x)} rows, got {len(names)}"
            )
        known = [] if self.disable_adapters else [n for n in self.c3a_kernel if n in set(names)]
        scale = 1 / self.in_features
        shares = {name: adapted.Share(self.c3a_kernel[name], scale, None) for name in known}
        stacks: dict[Hashable, PreparedStack] = self.__dict__.setdefault("_c3a_stacks", {})
        return adapted.forward_by_row(self.base_layer, x, shares, names, stacks, args, kwargs)

    def _share(self, name: str) -> adapted.Share:
        prepared = None
        if not torch.compiler.is_compiling():  # compiled code prepares nothing
            held = self.__dict__.setdefault("_c3a_prepared", {})
            prepared = held.get(name) or held.setdefault(name, PreparedKernel())
        return adapted.Share(self.c3a_kernel[name], 1 / self.in_features, prepared)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        with _seen_as_linear(self):
            super().update_layer(*args, **kwargs)

    # Merging

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what an adapter adds to the base weight, in its dtype and layout."""
        if adapter not in self.c3a_kernel:
            raise ValueError(f"Adapter {adapter} not found.")
        base, delta = self.get_base_layer(), self._delta([adapter])
        weight = getattr(base, "weight", None)
        is_dense = isinstance(weight, Tensor) and merging.is_dense(base, weight)
        return merging.laid_out(base, delta).to(weight if is_dense else delta.dtype)

    @torch.no_grad()
    def _delta(self, names: Iterable[str]) -> Tensor:
        """Return ``(out, in)``, in float32 at least."""
        deltas = [merging.delta(self.c3a_kernel[name], 1 / self.in_features) for name in names]
        return sum(deltas[1:], deltas[0])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, all rounded once; quantised weights too.

        The original weight is kept for ``unmerge``. TypeError where the base has no weight that
        can be added to; ValueError where ``safe_merge`` and the sum is not finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.c3a_kernel]
        if not names:
            return
        base = self.get_base_layer()
        merging.check(base, *(self.c3a_kernel[name] for name in names))

        def complaint(total: Tensor, _original: Tensor) -> str | None:
            if not safe_merge or total.isfinite().all():
                return None
            broken = ", ".join(names)
            return f"NaNs detected in the merged weights. The adapter {broken} seems to be broken"

        original = self._original()
        every = names if original is None else [*self.merged_adapters, *names]
        merged = merging.merged(base, self._delta(every), complaint, original)
        former = merging.exchange(base, merged)
        self._c3a_exchanged = (former if original is None else original, merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base, original = self.get_base_layer(), self._original()
        if original is None:  # PEFT's own layer merged it, or somebody has replaced the weight
            names = [name for name in self.merged_adapters if name in self.c3a_kernel]
            merging.check(base)
            original = merging.merged(base, -self._delta(names), lambda *_: None)
        merging.exchange(base, original)
        self._c3a_exchanged = None
        self.merged_adapters.clear()

    def _original(self) -> nn.Parameter | None:
        """Return the base weight as it was before merging, where it is known."""
        if not self.merged or self._c3a_exchanged is None:
            return None
        original, merged = self._c3a_exchanged
        return original if self.get_base_layer().weight is merged else None

    # What was prepared goes with the kernels.

    def _drop_prepared(self) -> None:
        for name in ("_c3a_prepared", "_c3a_stacks"):
            self.__dict__.pop(name, None)

    def train(self, mode: bool = True) -> "Self":
        if mode:
            self._drop_prepared()
        return super().train(mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._drop_prepared()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Self":
        self._drop_prepared()
        original = self._original()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if original is not None:
            base: Any = self.get_base_layer()
            self._c3a_exchanged = adapted.moved(original, fn), base.weight
        return self

    def extra_repr(self) -> str:
        return f"dropout={self._c3a_dropout:.3g}" if self._c3a_dropout else ""


class AcceleratedC3AModel(_model.C3AModel):
    """PEFT's model of such layers."""

    _c3a_dropout = 0.0

    def _create_new_module(  # type: ignore[override]  # static there, and called by an instance
        self, c3a_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        create: Callable[..., nn.Module] = super()._create_new_module
        if isinstance(base, nn.Linear):
            layer = create(c3a_config, adapter_name, target, **kwargs)
        elif features(base) is None:
            raise TypeError(
                f"c3a.peft: expected a target with in and out features, got a "
                f"{type(base).__name__}; leave it out of target_modules"
            )
        else:
            layer = create(c3a_config, adapter_name, _StandIn(base), **kwargs)
            layer.base_layer = target
        _accelerate(layer, self._c3a_dropout)
        return layer

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        base = child.get_base_layer() if isinstance(child, BaseTunerLayer) else child
        if hasattr(base, "weight"):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # of which PEFT asks the device, where the kernels are already
            setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names`` of a model's call to its layers, as PEFT's LoRA does."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [m for m in self.modules() if isinstance(m, AcceleratedC3ALinear)]
        known = {name for layer in layers for name in layer.c3a_kernel}
        if unknown := sorted(set(names) - known - {"__base__"}):
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; there are "
                f"{', '.join(sorted(known))}"
            )
        beams = kwargs.get("num_beams")
        beams = beams if isinstance(beams, int) else 1
        # An encoder sees every row once, a decoder as often as there are beams.
        get_encoder = getattr(self.model, "get_encoder", None)
        encoder = get_encoder() if beams > 1 and callable(get_encoder) else None
        encoding = set() if encoder is None else {id(m) for m in encoder.modules()}
        encoding = set() if id(self.model) in encoding else encoding
        handles = []
        try:
            for module in self.modules():
                if isinstance(module, AcceleratedC3ALinear | AuxiliaryTrainingWrapper):
                    times = 1 if id(module) in encoding else beams
                    rows = [name for name in names for _ in range(times)]
                    hook = partial(_name_the_rows, rows)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _name_the_rows(
    names: list[str], _module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


class _StandIn(nn.Linear):
    """Answers what PEFT asks a base layer while it makes an adapter: sizes, device and dtype."""

    def __init__(self, base: nn.Module) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear_features(base)
        dtype = getattr(getattr(base, "weight", None), "dtype", torch.float32)
        dtype = dtype if dtype in (torch.float16, torch.bfloat16, torch.float64) else torch.float32
        device = adapted.kernel_device(base)
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        self.register_parameter("bias", None)


@contextmanager
def _seen_as_linear(layer: AcceleratedC3ALinear) -> Iterator[None]:
    """Within the block, PEFT sees an ``nn.Linear`` as the base of a layer."""
    base = layer.base_layer
    if isinstance(layer.get_base_layer(), nn.Linear):
        yield
        return
    layer.base_layer = _StandIn(layer.get_base_layer())
    try:
        yield
    finally:
        layer.base_layer = base


# Which class stands for which

_PAIRS: tuple[tuple[type[Any], type[Any]], ...] = (
    (_layer.C3ALinear, AcceleratedC3ALinear),
    (_model.C3AModel, AcceleratedC3AModel),
)
_ACCELERATED = {theirs: ours for theirs, ours in _PAIRS}
_THEIRS = {ours: theirs for theirs, ours in _PAIRS}


def _accelerate(module: Any, dropout: float | None) -> None:
    module.__class__ = _ACCELERATED.get(type(module), type(module))
    if dropout is not None:
        module._c3a_dropout = dropout


def _restore(module: Any) -> None:
    for name in [name for name in vars(module) if name.startswith("_c3a_")]:
        del module.__dict__[name]
    module.__class__ = _THEIRS[type(module)]


def _pefts(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module) in (*_ACCELERATED, *_THEIRS)]


_LOCK = threading.Lock()
_EVERYWHERE: list[float | None] = []  # the dropouts of accelerate() without a model, outer first
_TUNER: Any = _model.C3AModel
_INIT = vars(_TUNER).get("__init__")  # some releases inherit it


@wraps(_model.C3AModel.__init__)
def _init(self: Any, *args: Any, **kwargs: Any) -> None:
    everywhere = _EVERYWHERE[:]
    if everywhere:
        _accelerate(self, next((d for d in reversed(everywhere) if d is not None), None))
    (_INIT or super(_model.C3AModel, self).__init__)(*((self,) if _INIT else ()), *args, **kwargs)


def _watch(everywhere: list[float | None]) -> None:
    """Have PEFT's new models accelerated, or with an empty list no longer."""
    _EVERYWHERE[:] = everywhere
    if everywhere:
        _TUNER.__init__ = _init
    elif _INIT:
        _TUNER.__init__ = _INIT
    elif "__init__" in vars(_TUNER):
        del _TUNER.__init__


class Acceleration:
    """What ``accelerate`` has done; as a context manager it undoes that at the end."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo = undo

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(self, *_: object) -> None:
        self._undo()


def accelerate(model: nn.Module | None = None, *, dropout: float | None = None) -> Acceleration:
    """Have PEFT's C3A layers computed by this package: right, and faster.

    The layers stay PEFT's: instances of subclasses of its classes, with the same parameters, names
    and files, switched, saved and loaded by PEFT. What differs: the input's gradient is the right
    one; active adapters add up (PEFT feeds the second the first's output); a call's
    ``adapter_names=[...]`` gives each row its own adapter; ``Conv1D`` and any other layer with in
    and out features can be a target, quantised or not; merging rounds once, also into weights
    quantised by torchao and bitsandbytes, and unmerging restores every bit; results have the base
    layer's dtype, under autocast too.

    Args:
        model: one with PEFT's C3A layers. By default, every C3A model that PEFT makes from now on.
        dropout: of the adapters' input in training (``peft.C3AConfig`` has none; adapters' files do
            not hold it). By default as it was, 0 at first.

    Returns:
        A context manager that undoes the call at its end, if it is used as one. Models that were
        made within ``with accelerate():`` stay accelerated.

    Raises:
        ValueError: the model has no C3A layers of PEFT's, or ``dropout`` is out of range.

    PEFT 0.16 to 0.21; a newer one gets a warning and is left alone. May be called again.

    >>> import c3a.peft, peft, torch
    >>> config = peft.C3AConfig(target_modules=["0"], block_size=4, init_weights="gaussian")
    >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), config).double()
    >>> x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    >>> with c3a.peft.accelerate(model):
    ...     torch.autograd.gradcheck(model, x)
    True
    """
    dropout = None if dropout is None else checked_dropout("c3a.peft.accelerate", dropout)
    if _release() > _NEWEST:
        _warn_of_release(peft.__version__)
        return Acceleration(lambda: None)
    if model is None:
        with _LOCK:
            before = _EVERYWHERE[:]
            _watch([*before, dropout])
        return Acceleration(lambda: _leave(len(before)))
    found = _pefts(model)
    if not any(isinstance(module, _layer.C3ALinear) for module in found):
        raise ValueError(
            f"c3a.peft.accelerate: expected a model with C3A layers of PEFT's, got a "
            f"{type(model).__name__} without; make it by peft.get_peft_model(model, "
            "peft.C3AConfig(...)) first"
        )
    were = {id(module): module._c3a_dropout for module in found if type(module) in _THEIRS}
    for module in found:
        _accelerate(module, dropout)

    def undo() -> None:
        now = _pefts(model)
        _restore_all([module for module in now if id(module) not in were])
        for module in now:
            if id(module) in were:
                module._c3a_dropout = were[id(module)]

    return Acceleration(undo)


def restore(model: nn.Module | None = None) -> None:
    """Undo ``accelerate``: of a model, or by default for models that PEFT makes from now on.

    A layer whose base is not ``nn.Linear``, which PEFT itself does not take, stays accelerated, and
    a warning says so. A merged layer stays merged; PEFT subtracts the adapter when it unmerges.
    """
    if model is None:
        with _LOCK:
            _watch([])
    else:
        _restore_all(_pefts(model))


def _leave(depth: int) -> None:
    with _LOCK:
        _watch(_EVERYWHERE[:depth])


def _restore_all(modules: Iterable[Any]) -> None:
    kept: set[str] = set()
    for module in modules:
        if isinstance(module, AcceleratedC3ALinear) and not isinstance(
            module.get_base_layer(), nn.Linear
        ):
            kept.add(type(module.get_base_layer()).__name__)
        elif type(module) in _THEIRS:
            _restore(module)
    if kept:
        warnings.warn(
            f"c3a.peft.restore: layers on {', '.join(sorted(kept))} stay accelerated: PEFT's own "
            "take nn.Linear only",
            stacklevel=3,
        )


_WARNED: set[str] = set()


def _warn_of_release(version: str) -> None:
    if version not in _WARNED:
        _WARNED.add(version)
        warnings.warn(
            f"c3a.peft: peft {version} is newer than what was tried "
            f"({_NEWEST[0]}.{_NEWEST[1]}): its layers are left as they are; update c3a, or "
            "c3a.patch_model the model instead",
            stacklevel=3,
        )
