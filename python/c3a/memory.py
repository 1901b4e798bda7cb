"""Bytes: what autograd saves for the backward pass, and the peak of what is allocated."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


class SavedBytes:
    """Bytes saved so far: parameters left out, shared memory counted once."""

    def __init__(self, model: nn.Module | None) -> None:
        tensors = [] if model is None else [*model.parameters(), *model.buffers()]
        self._known = {t.untyped_storage().data_ptr() for t in tensors}
        self._saved: dict[int, int] = {}
        self._kept: list[Tensor] = []  # a freed address could be given out again and counted once

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._saved[storage.data_ptr()] = storage.nbytes()
            self._kept.append(tensor.detach())
        return tensor

    @property
    def total(self) -> int:
        return sum(self._saved.values())


@contextmanager
def saved_for_backward(model: nn.Module | None = None) -> Iterator[SavedBytes]:
    """Count the bytes that the forward pass within the block saves for the backward.

    >>> x = torch.randn(3, 4, requires_grad=True)
    >>> with saved_for_backward() as saved:
    ...     y = x.sin()
    >>> saved.total
    48
    """
    saved = SavedBytes(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
        yield saved


@dataclass
class AllocatedBytes:
    """Bytes that a block of code allocated on the CPU and has not freed; set at the block's end."""

    current: int = 0  # below zero if more was freed that was there before
    peak: int = 0


@contextmanager
def allocated() -> Iterator[AllocatedBytes]:
    """Measure what the block within allocates: ``torch.cuda``'s figures, for the CPU.

    What torch's allocator gives out within the block, by the profiler's events, in all threads; not
    what was there before. torch has one profiler at a time, so blocks do not nest.

    >>> with allocated() as held:
    ...     x = torch.ones(1000) + torch.ones(1000)
    >>> held.peak, held.current
    (12000, 4000)
    """
    held = AllocatedBytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        yield held
    events = [
        (event.start_ns(), event.nbytes())
        for event in run.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    for _, size in sorted(events, key=lambda event: event[0]):
        held.current += size
        held.peak = max(held.peak, held.current)


def peak_allocated(function: Callable[[], object]) -> int:
    """Return the most bytes that ``function()`` holds at a time on the CPU, as ``allocated`` does.

    >>> peak_allocated(lambda: torch.ones(1000) + torch.ones(1000))
    12000
    """
    with allocated() as held:
        function()
    return held.peak
