"""Many threads at once with layers that they share and layers of their own; every number compared.

    python tests/stress.py [--seconds 60] [--threads 8] [--seed 0]

A shared layer may be read by many threads or written by one (ReadWriteLock); whoever writes its
kernel notes the dense matrix, and every result after that must be that matrix's. Ends at the first
wrong number, stale result or exception, says what it was, and exits with 1.
"""

import argparse
import copy
import faulthandler
import random
import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import c3a
from cases import TOLERANCE, relative_error, tolerance

PATIENCE = 60  # seconds that a thread may take for its last job
NO_GRAPH = (torch.no_grad, torch.inference_mode)


class ReadWriteLock:
    """Many readers or one writer; who waits to write goes first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._writers = 0  # waiting or at work

    @contextmanager
    def read(self):
        with self._changed:
            self._changed.wait_for(lambda: self._writers == 0)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def write(self):
        with self._changed:
            self._writers += 1
            try:
                self._changed.wait_for(lambda: self._readers == 0)
                yield
            finally:
                self._writers -= 1
                self._changed.notify_all()


class Layer:
    """A layer and the dense matrix that it must compute, in float64."""

    def __init__(self, sizes: tuple[int, int], block_size: int, dtype: torch.dtype) -> None:
        base = nn.Linear(*sizes, dtype=dtype)
        options = {"scale": 0.5, "init": "gaussian", "dtype": dtype, "pad": True}
        self.layer = c3a.C3ALinear(base, block_size, **options).eval()
        self.lock = ReadWriteLock()
        self.note()

    @torch.no_grad()
    def note(self) -> None:
        """Take the dense matrix of the kernel as it is now."""
        layer = self.layer
        delta = layer.scale * c3a.circulant(layer.c3a_kernel.double())
        self.matrix = delta[: layer.out_features, : layer.in_features]
        self.matrix += layer.base_layer.weight.double()
        self.bias = layer.base_layer.bias.double()

    def input(self, draw: random.Random) -> Tensor:
        sizes = draw.choice([(1,), (), (1, 1), (draw.randint(2, 40),), (3, draw.randint(1, 20))])
        return torch.randn(*sizes, self.layer.in_features, dtype=self.layer.base_layer.weight.dtype)

    def check(self, x: Tensor, y: Tensor, what: str) -> None:
        expected = x.detach().double() @ self.matrix.T + self.bias
        check(what, y, expected)


def check(what: str, got: Tensor, expected: Tensor) -> None:
    error, most = relative_error(got.detach(), expected), 4 * tolerance(got.dtype, got.device)
    if not error <= most:
        raise AssertionError(f"{what}: relative error {error:.3g} where {most:.3g} is allowed")


# Ways to write a kernel


def in_place(layer: c3a.C3ALinear, new: Tensor) -> None:
    with torch.no_grad():
        layer.c3a_kernel.copy_(new)


def into_data(layer: c3a.C3ALinear, new: Tensor) -> None:
    layer.c3a_kernel.data[:] = new


def as_data(layer: c3a.C3ALinear, new: Tensor) -> None:
    layer.c3a_kernel.data = new.clone()


def one_number(layer: c3a.C3ALinear, new: Tensor) -> None:
    layer.c3a_kernel.data[0, 0, 0] += 30


def by_numpy(layer: c3a.C3ALinear, new: Tensor) -> None:
    if new.dtype == torch.bfloat16:
        return into_data(layer, new)
    layer.c3a_kernel.detach().numpy()[:] = new.numpy()


def as_parameter(layer: c3a.C3ALinear, new: Tensor) -> None:
    layer.c3a_kernel = nn.Parameter(new.clone(), layer.c3a_kernel.requires_grad)


def loaded(layer: c3a.C3ALinear, new: Tensor) -> None:
    layer.load_state_dict({**layer.state_dict(), "c3a_kernel": new})


def converted(layer: c3a.C3ALinear, new: Tensor) -> None:
    """Leave the layer in its dtype, rounded to float16."""
    dtype = layer.c3a_kernel.dtype
    in_place(layer, new)
    layer.half().to(dtype)


WRITES = (in_place, into_data, as_data, one_number, by_numpy, as_parameter, loaded, converted)


def write(layer: Layer, draw: random.Random) -> str:
    way = draw.choice(WRITES)
    way(layer.layer, torch.randn_like(layer.layer.c3a_kernel.detach()))
    layer.note()
    return way.__name__


# What threads do: with a shared layer, one of their own, and what is random


def infer(shared: Layer, own: Layer, draw: random.Random) -> None:
    mode, times = draw.choice(NO_GRAPH), draw.randint(1, 5)
    with shared.lock.read(), mode():
        for _ in range(times):
            x = shared.input(draw)
            shared.check(x, shared.layer(x), "inference")


def input_gradient(shared: Layer, own: Layer, draw: random.Random) -> None:
    """Go through a shared layer with a graph; its kernel requires no gradient."""
    with shared.lock.read():
        x = shared.input(draw).requires_grad_()
        y = shared.layer(x)
        shared.check(x, y, "forward of a frozen layer")
        g = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, g)
        check("input gradient", dx, g.double() @ shared.matrix)


def prepare(shared: Layer, own: Layer, draw: random.Random) -> None:
    with shared.lock.read():
        shared.layer.prepare()


def drop(shared: Layer, own: Layer, draw: random.Random) -> None:
    with shared.lock.read():
        shared.layer.train()
        shared.layer.eval()


def copied(shared: Layer, own: Layer, draw: random.Random) -> None:
    with shared.lock.read():
        x, twin = shared.input(draw), copy.deepcopy(shared.layer)
        with torch.no_grad():
            shared.check(x, twin(x), "inference of a copy")


def write_shared(shared: Layer, own: Layer, draw: random.Random) -> None:
    with shared.lock.write():
        way = write(shared, draw)
        if draw.random() < 0.5:  # else the next reader is the first to see it
            with draw.choice(NO_GRAPH)():
                x = shared.input(draw)
                shared.check(x, shared.layer(x), f"inference after {way}")


def write_own(shared: Layer, own: Layer, draw: random.Random) -> None:
    def infer(after: str) -> None:
        with draw.choice(NO_GRAPH)():
            x = own.input(draw)
            own.check(x, own.layer(x), f"inference after {after}")

    for _ in range(3):
        infer(write(own, draw))
    dtype = own.layer.c3a_kernel.dtype
    for there in (torch.float16, dtype):
        own.layer.to(there)
        own.note()
        infer(f"conversion to {there}")


def train_own(shared: Layer, own: Layer, draw: random.Random) -> None:
    """Train for some steps, compare the gradient, then infer with the kernel that was trained."""
    layer = own.layer.train().requires_grad_(False)
    kernel = layer.c3a_kernel.requires_grad_()
    optimizer = torch.optim.SGD([kernel], lr=0.1)
    for _ in range(draw.randint(1, 3)):
        x = own.input(draw)
        y = layer(x)
        own.check(x, y, "forward of training")
        optimizer.zero_grad()
        y.square().mean().backward()
        w = kernel.detach().double().requires_grad_()
        delta = layer.scale * c3a.circulant(w)[: layer.out_features, : layer.in_features]
        g = 2 * y.detach() / y.numel()
        (expected,) = torch.autograd.grad(x.double() @ delta.T, w, g.double())
        check("kernel gradient", kernel.grad, expected)
        optimizer.step()
        own.note()
    layer.eval().requires_grad_(False)
    with draw.choice(NO_GRAPH)():
        x = own.input(draw)
        own.check(x, layer(x), "inference after training")


def operators(shared: Layer, own: Layer, draw: random.Random) -> None:
    """Use more block sizes than plans are kept."""
    for b in (draw.randint(1, 120) for _ in range(3)):
        x, w = torch.randn(draw.randint(1, 20), 2 * b), torch.randn(3, 2, b)
        expected = x.double() @ c3a.circulant(w.double()).T
        check(f"block size {b}", c3a.block_circ_conv(x, w), expected)
        prepared = c3a.block_circ_conv_prepared(x, c3a.prepare(w), b)
        check(f"block size {b}, prepared", prepared, expected)


JOBS = {
    infer: 8,
    input_gradient: 2,
    prepare: 1,
    drop: 1,
    copied: 1,
    write_shared: 3,
    write_own: 3,
    train_own: 3,
    operators: 1,
}


def shared_layers() -> list[Layer]:
    """Return layers with kernels and without, padded, of every kind of dtype, frozen."""
    layers = [
        Layer((48, 32), 16, torch.float32),
        Layer((768, 256), 64, torch.float32),
        Layer((47, 33), 8, torch.float64),
        Layer((64, 96), 32, torch.bfloat16),
        Layer((34, 51), 17, torch.float32),
    ]
    for shared in layers:
        shared.layer.requires_grad_(False)
    return layers


class Stress:
    def __init__(self, seconds: float, threads: int, seed: int) -> None:
        self.end = time.monotonic() + seconds
        self.shared = shared_layers()
        self.done = [Counter() for _ in range(threads)]
        self.failures: list[str] = []
        self.threads = [
            threading.Thread(target=self.work, args=(number, seed), daemon=True)
            for number in range(threads)
        ]

    def work(self, number: int, seed: int) -> None:
        draw = random.Random(f"{seed}/{number}")
        own = Layer(draw.choice([(24, 16), (40, 56)]), 8, draw.choice([*TOLERANCE][:2]))
        own.layer.requires_grad_(False)
        job = None
        try:
            while time.monotonic() < self.end and not self.failures:
                (job,) = draw.choices([*JOBS], [*JOBS.values()])
                job(draw.choice(self.shared), own, draw)
                self.done[number][job.__name__] += 1
        except BaseException:
            self.failures.append(f"thread {number}, {job.__name__}:\n{traceback.format_exc()}")

    def run(self) -> Counter:
        """Return how often each job was done."""
        start = time.monotonic()
        for thread in self.threads:
            thread.start()
        while any(thread.is_alive() for thread in self.threads):
            total = sum(done.total() for done in self.done)
            print(f"\r{total} jobs, {time.monotonic() - start:.0f} s", end="", flush=True)
            if time.monotonic() > self.end + PATIENCE:
                faulthandler.dump_traceback()
                self.failures.append("a thread hangs; see above where")
                break
            time.sleep(0.2)
        return sum(self.done, Counter())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    print(f"seed {options.seed}, {options.threads} threads", flush=True)
    stress = Stress(options.seconds, options.threads, options.seed)
    done = stress.run()
    print(f"\r{done.total()} jobs, {len(stress.failures)} failures    ")
    for job, count in sorted(done.items()):
        print(f"{count:8} {job}")
    print(*stress.failures, sep="\n")
    return int(bool(stress.failures))


if __name__ == "__main__":
    torch.set_num_threads(2)
    sys.exit(main())
