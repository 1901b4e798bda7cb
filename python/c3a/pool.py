"""Many adapters of one model, by name: those in use are prepared and stacked, in bounded memory.

A layer's stack has a slot for each adapter that is resident and adapts it. Where a stack grows or
shrinks it becomes another tensor, and a slot is written only while no rows have it: so what running
calls were given stays as it is.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import adapted, adapter_files, autograd, distributed
from ._library import OPS as _OPS
from .adapter_files import said_by
from .experts import adapted_experts
from .linear import C3ALinear
from .names import shown
from .patch import adapted_layers, peft_layer, replace_children, unwrapped
from .prepared import prepared_for
from .shapes import SUPPORTED_DTYPES
from .sizes import check_block_size, features, is_count, kernel_shape, linear_features
from .weight import AdaptedWeight

_WHO = "c3a.AdapterPool"
_MOST_SAID = 5  # names of a message


class _Kind(NamedTuple):
    """Whose kernels share a stack: those of one layer that are alike."""

    layer: "PooledLinear"
    shape: tuple[int, int, int]
    dtype: torch.dtype  # what they are prepared for

    @property
    def pad(self) -> tuple[int, int]:
        m, n, b = self.shape
        return n * b - self.layer.in_features, m * b - self.layer.out_features


class _Stack:
    """Prepared kernels of one kind, in slots."""

    def __init__(self, one: Tensor) -> None:
        self.w_hat = one.new_empty((0, *one.shape))
        self.nbytes_of_slot = one.nbytes
        self.free: list[int] = []
        self.owners: dict[int, _Resident] = {}

    def resize(self, kind: _Kind, slots: int) -> None:
        """Move what there is into a tensor of so many slots."""
        w_hat = self.w_hat.new_empty((slots, *self.w_hat.shape[1:]))
        if self.owners:
            w_hat[: len(self.owners)] = self.w_hat[list(self.owners)]
        self.owners = dict(enumerate(self.owners.values()))
        for slot, owner in self.owners.items():
            owner.slots[kind] = slot
        self.w_hat, self.free = w_hat, list(range(len(self.owners), slots))


class _Resident:
    """An adapter whose prepared kernels are in stacks."""

    def __init__(self) -> None:
        self.slots: dict[_Kind, int] = {}
        self.users = 0  # rows that are being computed with it
        self.is_dropped = False  # as soon as nobody uses it


class _Rows:
    """What the calls within one ``rows`` block compute with."""

    def __init__(self, count: int, beams: int, held: list[_Resident]) -> None:
        self.count, self.beams, self.held = count, beams, held
        self.of_layer: dict[PooledLinear, list[adapted.Rows]] = {}
        self.is_over = False

    def choose(self, layer: "PooledLinear", x: Tensor) -> list[adapted.Rows]:
        """Return the adapters of the rows of a layer's input."""
        if self.is_over:
            raise RuntimeError(f"{_WHO}: a call goes on after the end of its rows block")
        groups = self.of_layer.get(layer, [])
        if not groups:
            return []
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                f"{_WHO}: expected a call without gradients, under torch.inference_mode() or "
                "torch.no_grad(): the pool's kernels are prepared for serving only"
            )
        found = len(x) if x.ndim > 1 else None
        if found == self.count:
            return groups
        if found != self.count * self.beams:
            beams = f" or, with {self.beams} beams, {self.count * self.beams}"
            raise ValueError(
                f"{_WHO}: expected an input of {self.count}{beams if self.beams > 1 else ''} rows, "
                f"as adapters were named, got {tuple(x.shape)}"
            )
        return [
            group._replace(operands=(w_hat, index.repeat_interleave(self.beams), *more))
            for group in groups
            for w_hat, index, *more in [group.operands]
        ]


# Of each pool, by its id.
_ROWS: ContextVar[Mapping[int, _Rows]] = ContextVar("c3a_rows", default=MappingProxyType({}))


class PooledLinear(nn.Module):
    """A linear layer of a pool's model: within ``rows``, plus each row's adapter.

    It has no parameters beside its base layer's, and is not seen in state dicts.
    """

    in_features: int
    out_features: int
    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, pool: "AdapterPool") -> None:
        super().__init__()
        self.in_features, self.out_features = linear_features(base_layer)
        self.base_layer = base_layer
        self.c3a_pool = pool
        self.train(base_layer.training)
        self.register_state_dict_post_hook(_to_base_names)
        self.register_load_state_dict_pre_hook(_from_base_names)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{_WHO}: expected eager calls, got torch.compile's or torch.export's"
            )
        rows = self._rows
        if rows is None:
            plain: Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        return adapted.forward_rows(
            self.unadapted, x, lambda x, _: rows.choose(self, x), args, kwargs
        )

    @property
    def _rows(self) -> _Rows | None:
        return _ROWS.get().get(id(self.c3a_pool))

    @property
    def unadapted(self) -> nn.Module:
        """The layer without the adapter that the model itself may have."""
        base = self.base_layer
        while isinstance(base, C3ALinear):
            if base.merged and base.enabled:
                raise ValueError(
                    f"{_WHO}: rows need the base layer's weight, and the model's own adapter is "
                    "merged into it: close the pool, unmerge, and make a new one"
                )
            base = base.base_layer
        return base

    @property
    def weight(self) -> Tensor:
        """The base layer's, which within ``rows`` tells dtype, device and shape only."""
        rows = self._rows
        base: Any = self.base_layer if rows is None else self.unadapted
        weight: Tensor = base.weight
        if rows is None or self not in rows.of_layer or not isinstance(weight, Tensor):
            return weight

        def refuse() -> Tensor:
            raise RuntimeError(
                f"{_WHO}: a layer's weight is read, where each row has another: call the layer"
            )

        return AdaptedWeight(weight.detach(), weight.device, refuse)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)

    def _apply(self, fn: Any, recurse: bool = True) -> "PooledLinear":
        self.c3a_pool.clear()  # what was prepared is for other devices or dtypes
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _to_base_names(_layer: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    inner = f"{prefix}base_layer."
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key.removeprefix(inner)] = state.pop(key)


def _from_base_names(_layer: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}base_layer.{key.removeprefix(prefix)}"] = state.pop(key)


class AdapterPool:
    """Serves one model with many adapters, one for each row of a batch.

    Adapters are registered by name and folder, which costs nothing. ``rows`` reads those that it
    needs, prepares their kernels and keeps them within ``max_bytes``; those that were used longest
    ago make room. A layer computes all rows by one call for each block size. Safe to use from many
    threads, each with rows of its own.

    Args:
        model: any model with linear layers, of transformers or not. A layer is wrapped in place
            when the first adapter that has it is loaded. Where the model has adapters of its own
            (``C3ALinear``), rows take their place; its ``modules_to_save`` stay.
        max_bytes: of prepared kernels, a little more than the bytes of the kernels in float32.
            While a stack grows or shrinks, that layer's old and new one are there together.
        folders: names and folders to ``register``.

    Raises:
        ValueError: ``max_bytes`` is no whole number >= 1; the model is sharded, merged, in a pool,
            or holds the PEFT library's adapters (whose calls take ``adapter_names`` instead) or
            adapted experts.

    >>> import c3a, copy, torch
    >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> for name in ("anna", "ben"):
    ...     tuned = c3a.patch_model(copy.deepcopy(base), ["0"], 4, init="gaussian")
    ...     _ = c3a.save_adapter(tuned, f"adapters/{name}")
    >>> pool = c3a.AdapterPool(base, max_bytes=2**20, folders={"anna": "adapters/anna"})
    >>> pool.register("ben", "adapters/ben")
    >>> x = torch.randn(3, 8)
    >>> with pool.rows(["ben", None, "ben"]), torch.inference_mode():
    ...     y = base(x)
    >>> torch.allclose(y[[0, 2]], tuned(x)[[0, 2]], atol=1e-6)
    True
    >>> pool.resident
    ('ben',)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_bytes: int,
        folders: Mapping[str, str | Path] | None = None,
    ) -> None:
        if not is_count(max_bytes):
            raise ValueError(
                f"{_WHO}: expected max_bytes to be a whole number >= 1, got {shown(max_bytes)}"
            )
        self._model = unwrapped(model)
        with said_by(_WHO):
            if name := peft_layer(self._model):
                raise ValueError(
                    f"the model holds the PEFT library's adapters ({name} is one of its layers): "
                    "give its calls adapter_names, or take them out with PEFT's model.unload()"
                )
            if distributed.is_sharded(self._model):
                raise ValueError("the model is sharded over processes")
            own = adapted_layers(self._model)
            if any(layer.merged for layer in own.values()):
                raise ValueError("the model is merged; call c3a.unmerge first")
            if experts := adapted_experts(self._model):
                raise ValueError(
                    f"the model's own adapter is in experts ({next(iter(experts))}), where rows "
                    "cannot take its place; call c3a.unpatch_model first"
                )
        self._max_bytes = max_bytes
        self._folders: dict[str, Path] = {}
        # Guards all that follows, and tells of rows that end.
        self._changed = threading.Condition()
        # Held by the one thread that loads: no two wait for each other's rows to end.
        self._loading = threading.Lock()
        self._layers: dict[str, PooledLinear] = {}
        self._stacks: dict[_Kind, _Stack] = {}
        self._resident: dict[str, _Resident] = {}  # the one used longest ago first
        self._running = 0
        self._is_closed = False
        for name, folder in (folders or {}).items():
            self.register(name, folder)
        self._wrap(own)

    def __reduce__(self) -> Any:
        raise TypeError(f"{_WHO}: a pool and its model cannot be copied or pickled; close it first")

    @property
    def registered(self) -> tuple[str, ...]:
        """The names that rows may have."""
        with self._changed:
            return tuple(self._folders)

    @property
    def resident(self) -> tuple[str, ...]:
        """The names of the adapters in memory, the one that was used longest ago first."""
        with self._changed:
            return tuple(self._resident)

    @property
    def nbytes(self) -> int:
        """The bytes that stacks take now."""
        with self._changed:
            return self._allocated()

    def register(self, name: str, folder: str | Path) -> None:
        """Name an adapter's folder, ours or PEFT's, which is read when rows first need it.

        A name that was there means the new folder from the next ``rows`` on, also if it is the same
        folder with new files.
        """
        if not isinstance(name, str):
            raise TypeError(f"{_WHO}.register: expected a name, got {shown(name)}")
        with self._changed:
            self._check_open("register")
            self._folders[name] = Path(folder)
            self._drop(name)

    def remove(self, name: str) -> None:
        """Forget a name. ValueError if it is not registered."""
        with self._changed:
            self._check_known("remove", [name])
            del self._folders[name]
            self._drop(name)

    def clear(self) -> None:
        """Free the memory of all adapters but those that are in use; names stay registered."""
        with self._changed:
            for name in list(self._resident):
                self._drop(name)
            self._shrink({})

    def close(self) -> None:
        """Put the layers back as they were, and free the memory. Idempotent."""
        with self._changed:
            self._is_closed = True
            wrapped = {id(layer): layer.base_layer for layer in self._layers.values()}
            replace_children(self._model, wrapped)
            self._layers.clear()
            self.clear()

    @contextmanager
    def rows(
        self, names: Sequence[str | None], *, beams: int = 1, timeout: float = 60.0
    ) -> Iterator[None]:
        """Within the block, calls of the model by this thread give each row its adapter.

        Args:
            names: for each row of the batch, its adapter, or None for the base model alone. Every
                layer with an adapter must see rows as the first dimension of its input.
            beams: as ``generate``'s ``num_beams`` or ``num_return_sequences``: layers may see so
                many neighbours for each row, too.
            timeout: seconds to wait for memory that the rows of other threads have.

        Raises:
            ValueError: a name is not registered, its adapter does not fit the model, or together
                they do not fit ``max_bytes``.
            FileNotFoundError: an adapter's folder or a file of it is missing.
            TimeoutError: other threads kept the memory that it needs.
            RuntimeError: the thread is within ``rows`` of this pool already.

        A ``contextvars`` context is what has rows: threads that are started within the block have
        none, ``asyncio`` tasks and ``asyncio.to_thread`` have the block's.
        """
        if isinstance(names, str) or not all(n is None or isinstance(n, str) for n in names):
            raise TypeError(
                f"{_WHO}.rows: expected a name or None for each row, got {shown(names)}"
            )
        if not is_count(beams):
            raise ValueError(f"{_WHO}.rows: expected beams >= 1, got {shown(beams)}")
        outer = _ROWS.get()
        if id(self) in outer and not outer[id(self)].is_over:
            raise RuntimeError(f"{_WHO}.rows: expected one rows block at a time, got another in it")
        rows = self._rows_of(tuple(names), beams, time.monotonic() + timeout)
        token = _ROWS.set({**outer, id(self): rows})
        try:
            yield
        finally:
            _ROWS.reset(token)
            with self._changed:
                rows.is_over = True
                self._running -= 1
                self._release(rows.held)

    # Taking rows and giving them back

    def _rows_of(self, names: tuple[str | None, ...], beams: int, deadline: float) -> _Rows:
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        with self._changed:
            self._check_known("rows", wanted)
            if all(name in self._resident for name in wanted):
                return self._run(names, beams, {name: self._use(name) for name in wanted})
        if not self._loading.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"{_WHO}.rows: waited too long for other threads to load adapters")
        held: dict[str, _Resident] = {}
        try:
            with self._changed:
                held = {name: self._use(name) for name in wanted if name in self._resident}
            for name in wanted:
                if name not in held:
                    held[name] = self._load(name, deadline)
            with self._changed:
                return self._run(names, beams, held)
        except BaseException:
            with self._changed:
                self._release(list(held.values()))
            raise
        finally:
            self._loading.release()

    def _run(
        self, names: tuple[str | None, ...], beams: int, held: Mapping[str, _Resident]
    ) -> _Rows:
        rows = _Rows(len(names), beams, list(held.values()))
        slots: dict[_Kind, list[int]] = {}
        for row, name in enumerate(names):
            for kind, slot in held[name].slots.items() if name is not None else ():
                slots.setdefault(kind, [-1] * len(names))[row] = slot
        indices: dict[tuple[int, ...], Tensor] = {}  # most layers' are alike
        for kind, of_rows in slots.items():
            key = tuple(of_rows)
            if key not in indices:
                indices[key] = torch.tensor(of_rows)
            operands = (self._stacks[kind].w_hat, indices[key], kind.shape[-1], None)
            group = adapted.Rows(autograd.MANY_PREPARED, operands, kind.pad)
            rows.of_layer.setdefault(kind.layer, []).append(group)
        self._running += 1
        return rows

    def _use(self, name: str) -> _Resident:
        resident = self._resident[name] = self._resident.pop(name)
        resident.users += 1
        return resident

    def _release(self, held: Sequence[_Resident]) -> None:
        for resident in held:
            resident.users -= 1
            self._free_if_dropped(resident)
        self._changed.notify_all()

    def _drop(self, name: str) -> None:
        if resident := self._resident.pop(name, None):
            resident.is_dropped = True
            self._free_if_dropped(resident)

    def _free_if_dropped(self, resident: _Resident) -> None:
        if resident.is_dropped and not resident.users:
            for kind, slot in resident.slots.items():
                stack = self._stacks[kind]
                del stack.owners[slot]
                stack.free.append(slot)
            resident.slots = {}

    def _check_open(self, method: str) -> None:
        if self._is_closed:
            raise ValueError(f"{_WHO}.{method}: the pool is closed")

    def _check_known(self, method: str, names: Sequence[str]) -> None:
        self._check_open(method)
        if unknown := [name for name in names if name not in self._folders]:
            raise ValueError(
                f"{_WHO}.{method}: expected registered names, got {_some(unknown)}; registered: "
                f"{_some(list(self._folders)) or 'none'}"
            )

    # Loading. Nothing changes before an adapter has been read and checked.

    def _load(self, name: str, deadline: float) -> _Resident:
        """Return a new resident, in use already."""
        with self._changed:
            self._check_known("rows", [name])
            folder = self._folders[name]
        with said_by(f"{_WHO}: {name!r}"):
            kernels = self._read(folder)
        layers = self._wrap(kernels)
        prepared = {}
        for of_layer, kernel in kernels.items():
            kind, w_hat = _prepare(layers[of_layer], kernel)
            prepared[kind] = w_hat
        with self._changed:
            self._wait_for_room(name, prepared, deadline)
            resident = _Resident()
            for kind, w_hat in prepared.items():
                stack = self._stacks[kind]
                slot = resident.slots[kind] = stack.free.pop()
                stack.owners[slot] = resident
                stack.w_hat[slot] = w_hat
            resident.users = 1
            if self._folders.get(name) == folder:
                self._resident[name] = resident
            else:  # it was registered anew meanwhile
                resident.is_dropped = True
            return resident

    def _read(self, folder: Path) -> dict[str, Tensor]:
        """Return an adapter's kernels by layer, all of which the model has."""
        adapter = adapter_files.read(folder)
        kernels = adapter.kernels
        problems = []
        if others := sorted(set(adapter.tensors) - set(map(adapter_files.kernel_key, kernels))):
            said = _some([key.removeprefix(adapter_files.PREFIX) for key in others])
            problems.append(
                f"it has tensors beside kernels ({said}), which rows cannot have of their own"
            )
        elif not kernels:
            problems.append("it has no kernels")
        modules = dict(self._model.named_modules(remove_duplicate=False))
        for name, kernel in kernels.items():
            sizes = features(modules[name]) if name in modules else None
            if sizes is None:
                what = f"a {type(modules[name]).__name__}" if name in modules else "none"
                what = "a parameter of experts" if kernel.ndim == 4 else what
                problems.append(f"expected a linear layer of the model's at {name}, got {what}")
                continue
            expected = kernel_shape(*sizes, kernel.shape[-1])
            if tuple(kernel.shape) != expected:
                problems.append(
                    f"{name}: expected shape {expected} at block size {kernel.shape[-1]} for "
                    f"{sizes[0]} features in and {sizes[1]} out, got {tuple(kernel.shape)}"
                )
            else:
                with said_by(name):
                    check_block_size(kernel.shape[-1], *sizes, pad=True)
        if problems:
            more = [f"and {len(problems) - _MOST_SAID} more"] if len(problems) > _MOST_SAID else []
            raise ValueError(
                f"{adapter.weights_path} does not fit the model: "
                f"{'; '.join(problems[:_MOST_SAID] + more)}"
            )
        return kernels

    def _wrap(self, names: Mapping[str, object]) -> dict[str, PooledLinear]:
        with self._changed:
            self._check_open("rows")
            new: dict[int, nn.Module] = {}
            for name in names:
                if name not in self._layers:
                    base = self._model.get_submodule(name)
                    if isinstance(base, PooledLinear):  # by another name
                        self._layers[name] = base
                        continue
                    layer = new.setdefault(id(base), PooledLinear(base, self))
                    assert isinstance(layer, PooledLinear)
                    self._layers[name] = layer
            replace_children(self._model, new)
            return {name: self._layers[name] for name in names}

    # Memory

    def _allocated(self) -> int:
        return sum(s.nbytes_of_slot * len(s.w_hat) for s in self._stacks.values())

    def _wait_for_room(self, name: str, prepared: Mapping[_Kind, Tensor], deadline: float) -> None:
        """Wait until every stack of an adapter has a free slot."""
        while not self._make_room(prepared):
            if not self._running:
                size = sum(w_hat.nbytes for w_hat in prepared.values())
                raise ValueError(
                    f"{_WHO}.rows: expected the adapters of a call to fit max_bytes = "
                    f"{self._max_bytes} together, got {name!r} of {size} bytes too much"
                )
            left = deadline - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                raise TimeoutError(
                    f"{_WHO}.rows: {name!r} waited too long for memory that other rows use; give "
                    f"more than max_bytes = {self._max_bytes}, or more time"
                )

    @torch.no_grad()
    def _make_room(self, prepared: Mapping[_Kind, Tensor]) -> bool:
        while True:
            lacking = {
                kind: w_hat
                for kind, w_hat in prepared.items()
                if kind not in self._stacks or not self._stacks[kind].free
            }
            if not lacking:
                return True
            needed = sum(w_hat.nbytes for w_hat in lacking.values())
            fit = (self._max_bytes - self._allocated()) // needed
            if fit > 0:
                break
            if not self._shrink(prepared) and not self._evict():
                return False
        with torch.inference_mode(False):  # its tensors could be written within it only
            for kind, w_hat in lacking.items():
                stack = self._stacks.setdefault(kind, _Stack(w_hat))
                have = len(stack.w_hat)
                stack.resize(kind, have + min(max(1, have), fit))
        return True

    @torch.no_grad()
    def _shrink(self, prepared: Mapping[_Kind, Tensor]) -> bool:
        """Give up free slots but one for each of these, and say whether there were any."""
        found = False
        for kind, stack in list(self._stacks.items()):
            spare = len(stack.free) - (kind in prepared)
            if spare > 0:
                found = True
                with torch.inference_mode(False):
                    stack.resize(kind, len(stack.w_hat) - spare)
            if not len(stack.w_hat):
                del self._stacks[kind]
        return found

    def _evict(self) -> bool:
        unused = next((n for n, resident in self._resident.items() if not resident.users), None)
        if unused is None:
            return False
        self._drop(unused)
        return True


@torch.no_grad()
def _prepare(layer: PooledLinear, kernel: Tensor) -> tuple[_Kind, Tensor]:
    base = layer.unadapted
    weight = getattr(base, "weight", None)
    dtype = weight.dtype if isinstance(weight, Tensor) else kernel.dtype
    if dtype not in SUPPORTED_DTYPES:  # quantised
        dtype = kernel.dtype
    with torch.inference_mode(False):
        kernel = kernel.to(adapted.kernel_device(base))
        dtype = prepared_for(kernel, dtype)
        w_hat = _OPS.prepare(kernel, dtype, False, 1 / layer.in_features)
    m, n, b = kernel.shape
    return _Kind(layer, (m, n, b), dtype), w_hat


def _some(names: Sequence[str]) -> str:
    more = f", ... ({len(names)})" if len(names) > _MOST_SAID else ""
    return ", ".join(map(repr, names[:_MOST_SAID])) + more
