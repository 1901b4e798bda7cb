"""Interleaved timing: every round times every contender once, in an order drawn anew."""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

Contenders = dict[str, Callable[[], object]]

# A contender's share of a round on the CPU: shorter calls are repeated to fill it.
SHARE = 0.01
MOST_CALLS = 1000
# The first calls of a graph and of a layer do what later ones do not.
WARM_UPS = 3


class Ratio(NamedTuple):
    """A ratio, and what the middle 80 % of resampled rounds give. NaN: lost in the noise."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "noise"
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


class Times:
    """The seconds of one call, by contender and round."""

    def __init__(self, rounds: dict[str, list[float]]):
        self.rounds = rounds

    def __getitem__(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def medians(self) -> dict[str, float]:
        return {name: self[name] for name in self.rounds}

    def ratio(self, above: str, below: str) -> Ratio:
        """The median of the rounds' ratios."""
        pairs = zip(self.rounds[above], self.rounds[below], strict=True)
        return _with_spread([a / b for a, b in pairs], statistics.median)

    def ratio_over(self, base: str, above: str, below: str) -> Ratio:
        """What one contender takes over the base's time, relative to another.

        The base's time of the same round is taken off each. Medians of those differences are
        divided: a single round's may be next to nothing where the base takes long.
        """
        triples = zip(*(self.rounds[name] for name in (above, below, base)), strict=True)
        over = [(a - b, c - b) for a, c, b in triples]

        def of_medians(rounds: list[tuple[float, float]]) -> float:
            above, below = (statistics.median(values) for values in zip(*rounds, strict=True))
            return above / below if above > 0 and below > 0 else math.nan

        return _with_spread(over, of_medians)


def _with_spread(rounds: list, statistic: Callable[[list], float], samples: int = 200) -> Ratio:
    value = statistic(rounds)
    draw = random.Random(0)
    values = [statistic(draw.choices(rounds, k=len(rounds))) for _ in range(samples)]
    values = sorted(v for v in values if not math.isnan(v)) or [math.nan]
    low, high = (values[round(share * (len(values) - 1))] for share in (0.1, 0.9))
    return Ratio(value, low, high)


def geometric_mean(values: Iterable[float]) -> float:
    """NaN where one of the values was lost in the noise."""
    values = list(values)
    if any(math.isnan(value) for value in values):
        return math.nan
    return statistics.geometric_mean(values)


Clock = Callable[[], float]


def elapsed(function: Callable[[], object], device: str, calls: int, clock: Clock) -> float:
    """Return the seconds of one of so many calls; on a GPU many hide their launches."""
    if device == "cpu":
        start = clock()
        for _ in range(calls):
            function()
        return (clock() - start) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def measure(
    contenders: Contenders, rounds: int, device: str = "cpu", clock: Clock = time.perf_counter
) -> Times:
    """Time every contender once in each round, after warm-ups that also choose how many calls."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    calls = {name: 10 for name in contenders}
    for name, function in contenders.items():
        least = min(elapsed(function, device, 1, clock) for _ in range(WARM_UPS))
        if device == "cpu":
            calls[name] = min(MOST_CALLS, max(1, round(SHARE / least)))
    order = list(contenders)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            seconds[name].append(elapsed(contenders[name], device, calls[name], clock))
    return Times(seconds)


@dataclass(frozen=True)
class Run:
    """How parts measure: quick ones have tiny shapes, for a try."""

    rounds: int = 9
    quick: bool = False
    threads: tuple[int, ...] = (1, 2)
    own_time: bool = False  # the thread's, in which other programs do not count

    def measure(self, contenders: Contenders, times: int = 1) -> Times:
        clock = time.thread_time if self.own_time else time.perf_counter
        return measure(contenders, times * self.rounds, clock=clock)

    @property
    def backend(self) -> str:
        """torch.compile's: for a try, the one that generates no code."""
        return "aot_eager" if self.quick else "inductor"


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
