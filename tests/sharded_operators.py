"""What test_sharding.py runs in two processes: the operators on DTensors."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import c3a

R, P = Replicate(), Partial()
OPS = torch.ops.c3a
B, M, N = 8, 4, 2  # of the kernel; both processes get blocks of either kind
TOKENS = (4, 6)


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def placed(t: torch.Tensor, placement: object) -> DTensor:
    where = mesh()
    if placement == P:  # this process's summand, the others' make up for what it is too much
        share = t * (1 + where.get_local_rank()) / sum(range(1, where.size() + 1))
        return DTensor.from_local(share, where, [P], run_check=False)
    return distribute_tensor(t, where, [placement])


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def assert_same(found: object, expected: object) -> None:
    torch.testing.assert_close(whole(found), expected, rtol=1e-10, atol=1e-10)


def activations(blocks: int) -> torch.Tensor:
    return numbers(*TOKENS, blocks * B)


OF_ACTIVATIONS = (R, P, Shard(0), Shard(1), Shard(2))
OF_KERNEL = (R, Shard(0), Shard(1), Shard(2))


def gradients_are_those_of_one_process(_: Path) -> None:
    x, w, g = activations(N).requires_grad_(), numbers(M, N, B).requires_grad_(), activations(M)
    y = OPS.block_circ_conv(x, w, 0.5)
    expected = torch.autograd.grad(y, (x, w), g)
    for of_x, of_w, of_g in product(OF_ACTIVATIONS, OF_KERNEL, (R, Shard(1), Shard(2))):
        xs, ws = (placed(t.detach(), where).requires_grad_() for t, where in ((x, of_x), (w, of_w)))
        ys = OPS.block_circ_conv(xs, ws, 0.5)
        assert_same(ys, y)
        found = torch.autograd.grad(ys.redistribute(placements=[of_g]), (xs, ws), placed(g, of_g))
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)


def second_gradients_are_those_of_one_process(_: Path) -> None:
    x, w, g = activations(N).requires_grad_(), numbers(M, N, B).requires_grad_(), activations(M)

    def second(x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
        dx, dw = torch.autograd.grad(OPS.block_circ_conv(x, w), (x, w), g, create_graph=True)
        return torch.autograd.grad((whole(dx) ** 2).sum() + (whole(dw) ** 2).sum(), (x, w))

    expected = second(x, w, g)
    for of_x, of_w in ((Shard(0), R), (R, Shard(0)), (Shard(2), Shard(1))):
        xs, ws = (placed(t.detach(), where).requires_grad_() for t, where in ((x, of_x), (w, of_w)))
        for a, b in zip(second(xs, ws, placed(g, R)), expected, strict=True):
            assert_same(a, b)


def stacks_of_kernels_are_those_of_one_process(_: Path) -> None:
    x, w, g = activations(N).requires_grad_(), numbers(3, M, N, B).requires_grad_(), activations(M)
    index = torch.tensor([2, -1, 0, 2])
    y = OPS.block_circ_conv_many(x, w, index, 0.5)
    expected = torch.autograd.grad(y, (x, w), g)
    w_hat = c3a.prepare(w.detach())
    for of_x in OF_ACTIVATIONS:
        for of_w, of_index in product((R, Shard(1), Shard(2)), (R, Shard(0))):
            xs, ws = (
                placed(t.detach(), where).requires_grad_() for t, where in ((x, of_x), (w, of_w))
            )
            indices = placed(index, of_index)
            ys = OPS.block_circ_conv_many(xs, ws, indices, 0.5)
            assert_same(ys, y)
            for a, b in zip(torch.autograd.grad(ys, (xs, ws), placed(g, R)), expected, strict=True):
                assert_same(a, b)
        found = OPS.block_circ_conv_many_prepared(
            placed(x.detach(), of_x), placed(w_hat, R), placed(index, R), B
        )
        assert_same(found, 2 * y.detach())


def sums_are_those_of_one_process(_: Path) -> None:
    base, x, w, g = activations(M), activations(N), numbers(M, N, B), activations(M)
    tensors = [t.requires_grad_() for t in (base, x, w)]
    y = OPS.block_circ_conv_add(*tensors)
    expected = torch.autograd.grad(y, tensors, g)
    for where in product(OF_ACTIVATIONS, (R, Shard(0), Shard(2)), OF_KERNEL):
        parts = [
            placed(t.detach(), of).requires_grad_() for t, of in zip(tensors, where, strict=True)
        ]
        ys = OPS.block_circ_conv_add(*parts)
        assert_same(ys, y)
        found = torch.autograd.grad(ys.redistribute(placements=[R]), parts, placed(g, R))
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)


def sums_in_place_keep_their_placement(_: Path) -> None:
    base, x, w = activations(M), activations(N), numbers(M, N, B)
    expected = base + OPS.block_circ_conv(x, w)
    for where in product(OF_ACTIVATIONS, (R, Shard(0), Shard(2)), OF_KERNEL):
        parts = [placed(t.clone(), of) for t, of in zip((base, x, w), where, strict=True)]
        version = parts[0]._version
        assert OPS.block_circ_conv_add_(*parts) is None
        assert parts[0]._version == version + 1
        assert parts[0].placements == (where[0],)
        assert_same(parts[0], expected)


def linear_layers_are_those_of_one_process(_: Path) -> None:
    x, w, g = activations(N).requires_grad_(), numbers(M, N, B).requires_grad_(), activations(M)
    weight, bias = numbers(M * B, N * B), numbers(M * B)
    for with_bias, trained in product((True, False), (True, False)):
        weight.requires_grad_(trained)
        b = bias if with_bias else None
        wanted = (x, w, weight) if trained else (x, w)
        y = OPS.block_circ_conv_linear(x, weight, b, w)
        expected = torch.autograd.grad(y, wanted, g)
        for of_x, of_weight, of_bias in (
            (R, R, R),
            (Shard(0), R, R),
            (R, Shard(0), Shard(0)),
            (Shard(2), Shard(1), R),
            (Shard(2), Shard(0), R),
        ):
            xs, weights, ws = (
                placed(t.detach(), of).requires_grad_(t.requires_grad)
                for t, of in ((x, of_x), (weight, of_weight), (w, of_weight))
            )
            bs = None if b is None else placed(b, of_bias)
            ys = OPS.block_circ_conv_linear(xs, weights, bs, ws)
            assert_same(ys, y)
            found = torch.autograd.grad(
                ys.redistribute(placements=[R]),
                (xs, ws, weights) if trained else (xs, ws),
                placed(g, R),
            )
            for one, other in zip(found, expected, strict=True):
                assert_same(one, other)
            with torch.inference_mode():  # in which nothing is decomposed before DTensor sees it
                parts = (placed(x, of_x), placed(weight, of_weight), bs, placed(w, of_weight))
                assert_same(OPS.block_circ_conv_linear(*parts), y)


def the_gradients_operators_are_those_of_one_process(_: Path) -> None:
    x, w, g, dx = activations(N), numbers(M, N, B), activations(M), activations(N)
    of_pairs = OPS.block_circ_conv_backward(g, x, w, 2.0)
    added = dx + of_pairs[0]
    for of_g, of_x, of_w in product(OF_ACTIVATIONS, OF_ACTIVATIONS, OF_KERNEL):
        gs, xs, ws = placed(g, of_g), placed(x, of_x), placed(w, of_w)
        found = OPS.block_circ_conv_backward(gs, xs, ws, 2.0)
        single = (
            OPS.block_circ_conv_input_grad(gs, ws, 2.0),
            OPS.block_circ_conv_kernel_grad(gs, xs, B, None, 2.0),
        )
        for pair in (found, single):
            for a, b in zip(pair, of_pairs, strict=True):
                assert_same(a, b)
        written = placed(dx.clone(), of_x)
        dw = OPS.block_circ_conv_backward_add_(written, gs, xs, ws, 2.0)
        assert written.placements == (of_x,)
        assert_same(written, added)
        assert_same(dw, of_pairs[1])
    narrow = OPS.block_circ_conv_kernel_grad(placed(g, R), placed(x, R), B, torch.bfloat16)
    assert narrow.dtype == narrow.to_local().dtype == torch.bfloat16


def prepared_kernels_are_gathered(_: Path) -> None:
    base, x, w, g = (
        activations(M),
        activations(N).requires_grad_(),
        numbers(M, N, B),
        activations(M),
    )
    w_hat, transposed = c3a.prepare(w), c3a.prepare(w, transposed=True)
    y = c3a.block_circ_conv_prepared(x, w_hat, B, transposed)
    (expected,) = torch.autograd.grad(y, x, g)
    for of_x, of_w in product(OF_ACTIVATIONS, OF_KERNEL):
        xs, ws = placed(x.detach(), of_x).requires_grad_(), placed(w, of_w)
        parts = c3a.prepare(ws), c3a.prepare(ws, transposed=True)
        assert_same(parts[0], w_hat)
        assert_same(parts[1], transposed)
        ys = c3a.block_circ_conv_prepared(xs, parts[0], B, parts[1])
        assert_same(ys, y.detach())
        (found,) = torch.autograd.grad(ys.redistribute(placements=[R]), xs, placed(g, R))
        assert_same(found, expected)
        with torch.no_grad():
            bases = placed(base.clone(), of_x)
            ys = c3a.block_circ_conv_prepared_add(bases, xs, parts[0], B)
            assert_same(ys, base + y)
            if of_x in (P, Shard(2)):  # prepared kernels are not divided, and so are results
                with pytest.raises(RuntimeError, match="require placement changes"):
                    OPS.block_circ_conv_prepared_add_(bases, xs, parts[0], B)
            else:
                OPS.block_circ_conv_prepared_add_(bases, xs, parts[0], B)
                assert_same(bases, base + y)
    narrow = c3a.prepare(placed(w.float(), Shard(0)), torch.float64)
    assert narrow.dtype == narrow.to_local().dtype == torch.float64
    assert c3a.prepare(placed(w.float(), Shard(0))).dtype == torch.float32


def parts_are_made_without_communication(_: Path) -> None:
    x, w, g = activations(N), numbers(M, N, B), activations(M)
    ways = {
        "tokens": (Shard(0), R, Shard(0), Shard(0), Shard(0), P),
        "sequence": (Shard(1), R, Shard(1), Shard(1), Shard(1), P),
        "outputs": (R, Shard(0), Shard(2), Shard(2), P, Shard(0)),
        "inputs": (Shard(2), Shard(1), P, R, Shard(2), Shard(1)),
    }
    for way, (of_x, of_w, of_y, of_g, of_dx, of_dw) in ways.items():
        xs, ws = placed(x, of_x).requires_grad_(), placed(w, of_w).requires_grad_()
        gs = placed(g, of_g)
        with CommDebugMode() as communication:
            ys = OPS.block_circ_conv(xs, ws)
            dx, dw = OPS.block_circ_conv_backward(gs, xs.detach(), ws.detach())
        assert ys.placements == (of_y,), way
        assert (dx.placements, dw.placements) == ((of_dx,), (of_dw,)), way
        assert not communication.get_comm_counts(), way


def odd_numbers_of_blocks_are_gathered(_: Path) -> None:
    x, w, g = (
        numbers(3, 3 * B).requires_grad_(),
        numbers(5, 3, B).requires_grad_(),
        numbers(3, 5 * B),
    )
    y = OPS.block_circ_conv(x, w)
    expected = torch.autograd.grad(y, (x, w), g)
    for of_x, of_w in product((R, Shard(0), Shard(1)), OF_KERNEL):
        xs, ws = (placed(t.detach(), where).requires_grad_() for t, where in ((x, of_x), (w, of_w)))
        ys = OPS.block_circ_conv(xs, ws)
        assert_same(ys, y)
        found = torch.autograd.grad(ys.redistribute(placements=[R]), (xs, ws), placed(g, R))
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)


def layers_take_sequences_that_are_sharded(_: Path) -> None:
    """Each token is alone: a process that has a part of a sequence computes that part."""
    layer = c3a.C3ALinear(torch.nn.Linear(N * B, M * B), B, init="gaussian")
    x, g = activations(N).float(), activations(M).float()
    y = layer(x)
    (expected,) = torch.autograd.grad(y, layer.c3a_kernel, g)
    here = mesh().get_local_rank()
    part = [t.chunk(2, dim=1)[here] for t in (x, y, g)]
    torch.testing.assert_close(layer(part[0]), part[1])
    (found,) = torch.autograd.grad(layer(part[0]), layer.c3a_kernel, part[2])
    total = DTensor.from_local(found, mesh(), [P]).full_tensor()
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


def fails_in_the_first_process(_: Path) -> None:
    if torch.distributed.get_rank() == 0:
        raise ValueError("the first one's own error")
    torch.distributed.all_reduce(torch.ones(4))


def reduces_more(_: Path) -> None:
    torch.distributed.all_reduce(torch.ones(64))


CHECKS = [
    gradients_are_those_of_one_process,
    second_gradients_are_those_of_one_process,
    sums_are_those_of_one_process,
    sums_in_place_keep_their_placement,
    linear_layers_are_those_of_one_process,
    the_gradients_operators_are_those_of_one_process,
    prepared_kernels_are_gathered,
    stacks_of_kernels_are_those_of_one_process,
    parts_are_made_without_communication,
    odd_numbers_of_blocks_are_gathered,
    layers_take_sequences_that_are_sharded,
]
