"""A C3A adapter as one of LoRA, for what understands only that.

``circulant(w) = sum over bins k of M_k (x) f_k f_k^H``, with ``M_k`` the conjugate of the kernel's
spectrum, a matrix of m by n, and ``f_k`` the unitary DFT's vectors. Singular vectors of the whole
are thus those of one ``M_k`` times ``f_k``, and its best approximation of a rank falls out of the
bins. Bins k and b - k are conjugate: one complex pair of vectors makes two real ones of a value.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .adapter import COMMON_SETTINGS, as_pattern
from .adapter_files import PREFIX, Adapter, prepare_lora, read, said_by
from .files import check_free, write_folder
from .names import shown
from .reference import circulant

__all__ = ["Exported", "ExportedLayer", "export", "factors"]


class ExportedLayer(NamedTuple):
    """What became of one layer's matrix."""

    in_features: int
    out_features: int
    rank: int
    energy: float  #: the share of its squared Frobenius norm that is kept


class Exported(NamedTuple):
    """What ``export`` has written."""

    layers: dict[str, ExportedLayer]  #: by name
    energy: float  #: the share that is kept of all layers' squared Frobenius norms


class _Decomposition(NamedTuple):
    """A matrix's singular values, descending, in float64, and its factors of any rank."""

    values: Tensor
    take: Callable[[int], tuple[Tensor, Tensor]]


def factors(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of ``circulant(w)`` of a rank, as LoRA's two matrices.

    Best in the Frobenius norm and in the spectral norm, as the dense matrix's singular value
    decomposition gives it (Eckart and Young), at the cost of ``b // 2 + 1`` ones of m by n.

    Args:
        w: kernel of shape ``(m, n, b)``, any floating-point dtype.
        rank: 1 to ``min(m, n) * b``.

    Returns:
        ``(A, B)`` in float64, ``A`` of shape ``(rank, n*b)`` and ``B`` of shape ``(m*b, rank)``,
        the approximation being ``B @ A``. Both have the singular values' square roots.

    Raises:
        ValueError: another shape, rank, or numbers that are not finite.

    >>> import c3a, c3a.lora, torch
    >>> w = torch.randn(2, 3, 5, dtype=torch.float64)
    >>> A, B = c3a.lora.factors(w, 4)
    >>> u, s, vh = torch.linalg.svd(c3a.circulant(w))
    >>> torch.allclose((c3a.circulant(w) - B @ A).norm(), s[4:].norm())
    True
    """
    who = "c3a.lora.factors"
    if w.dim() != 3 or w.numel() == 0:
        raise ValueError(f"{who}: expected w of shape (m, n, b), got {tuple(w.shape)}")
    most = min(w.shape[:2]) * w.shape[2]
    if not 1 <= rank <= most:
        raise ValueError(f"{who}: expected 1 <= rank <= min(m, n) * b = {most}, got {rank}")
    with said_by(who):
        return _of_bins(w).take(rank)


def _of_bins(w: Tensor) -> _Decomposition:
    b = w.shape[-1]
    spectra = torch.fft.rfft(w.double()).conj().permute(2, 0, 1)
    if not spectra.isfinite().all():
        raise ValueError("expected a kernel of finite numbers, of moderate size")
    alone = [0, b // 2] if b % 2 == 0 else [0]  # the bins that have no conjugate, and are real
    real = torch.linalg.svd(spectra[alone].real, full_matrices=False)
    pairs = torch.linalg.svd(spectra[1 : (b + 1) // 2], full_matrices=False)
    left, values, right = (torch.cat(both) for both in zip(real, pairs, strict=True))
    bins = torch.tensor([*alone, *range(1, (b + 1) // 2)], device=w.device)
    times = torch.full_like(bins, 2)  # how often a bin's values are the matrix's
    times[: len(alone)] = 1
    each = times.repeat_interleave(values.shape[1])
    place = torch.arange(len(each), device=w.device).repeat_interleave(each)
    is_second = place.diff(prepend=place.new_tensor([-1])) == 0
    ordered, order = values.flatten()[place].sort(descending=True, stable=True)

    def take(rank: int) -> tuple[Tensor, Tensor]:
        chosen = order[:rank]
        which, number = place[chosen] // values.shape[1], place[chosen] % values.shape[1]
        turns = bins[which, None] * torch.arange(b, device=w.device) % b
        angle = 2 * math.pi / b * turns.double()
        turn = torch.polar(torch.ones_like(angle), angle)
        size = (ordered[:rank] * times[which] / b).sqrt()[:, None]
        u, v = left[which, :, number], right[which, number].conj()

        def as_real(vectors: Tensor) -> Tensor:
            whole = (vectors[:, :, None] * turn[:, None, :]).flatten(1)
            return torch.where(is_second[chosen, None], whole.imag, whole.real)

        return as_real(v) * size, (as_real(u) * size).T

    return _Decomposition(ordered, take)


def _of_matrix(matrix: Tensor) -> _Decomposition:
    if not matrix.isfinite().all():
        raise ValueError("expected a kernel of finite numbers, of moderate size")
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)

    def take(rank: int) -> tuple[Tensor, Tensor]:
        size = values[:rank].sqrt()
        return vh[:rank] * size[:, None], u[:, :rank] * size

    return _Decomposition(values, take)


def export(
    adapter: str | Path,
    folder: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    at_least: float = 0.9,
    track: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Exported:
    """Write a C3A adapter's nearest LoRA adapter, which PEFT and servers load as any other.

    Its scaling is 1 at every layer, so that readers agree that know one scaling only. A rank beyond
    a layer's sides is filled up with zeros: with ``rank`` all layers have the same. Kernels of
    layers that they were padded for are cut, and take a dense decomposition: seconds, not
    milliseconds. ``modules_to_save`` go along as they are.

    Args:
        adapter: a folder that ``save_adapter`` or PEFT wrote.
        folder: new or empty; written whole or not at all.
        rank: of every layer.
        energy: instead of ``rank``, the share of its matrix's squared norm that each layer is to
            keep at least: each gets the smallest rank that does, which the configuration says by
            ``rank_pattern``. 1 keeps everything.
        at_least: refuse a ``rank`` that keeps less than this share of all layers' squared norms.
        track: gets the layers' names and gives them back one by one, for a progress bar.

    Returns:
        The rank of each layer and the share that it keeps, and the share in all.

    Raises:
        FileNotFoundError: as ``load_adapter``.
        ValueError: as ``load_adapter``; a folder that has files; a rank that is too large, or keeps
            too little; numbers that float32 has no room for.

    >>> import c3a, c3a.lora, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> c3a.patch_model(model, ["0"], 4, init="gaussian")  # doctest: +ELLIPSIS
    Sequential(...)
    >>> c3a.lora.export(c3a.save_adapter(model, "my_adapter"), "my_lora", energy=1.0).energy
    1.0
    """
    folder = Path(folder)
    with said_by("c3a.lora.export"):
        if (rank is None) == (energy is None):
            raise ValueError(f"expected either rank or energy, got {rank} and {energy}")
        if rank is not None and rank < 1:
            raise ValueError(f"expected rank >= 1, got {rank}")
        for name, share in (("energy", energy), ("at_least", at_least)):
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"expected 0 <= {name} <= 1, got {share}")
        check_free(folder)
        source = read(Path(adapter))
        tensors, config, exported = _converted(source, rank, energy or 0.0, at_least, track)
    write_folder(folder, lambda fresh: prepare_lora(fresh, folder, tensors, config))
    return exported


def _converted(
    source: Adapter,
    rank: int | None,
    energy: float,
    at_least: float,
    track: Callable[[Iterable[str]], Iterable[str]],
) -> tuple[dict[str, Tensor], dict[str, Any], Exported]:
    """Return the tensors and the configuration to write, and what ``export`` returns."""
    where, kernels = source.weights_path, source.kernels
    if not kernels:
        raise ValueError(f"{where} holds no c3a_kernel")
    if experts := [name for name, kernel in kernels.items() if kernel.ndim == 4]:
        raise ValueError(
            f"{where} has kernels of experts, which are not converted: {shown(experts[0])}"
        )
    if not source.config.get("target_modules"):
        raise ValueError(f"{source.config_source} names no target_modules")
    sizes = _sizes(source, kernels)
    most = max(map(min, sizes.values()))
    if rank is not None and rank > most:
        raise ValueError(f"expected rank <= {most}, the largest of a layer here, got {rank}")
    tensors = {
        key: tensor for key, tensor in source.tensors.items() if not key.endswith(".c3a_kernel")
    }
    energies: dict[str, list[float]] = {}
    ranks: dict[str, int] = {}
    for name in track(kernels):
        with said_by(f"{where}: {name}"):
            found = _decomposed(kernels[name], *sizes[name])
            energies[name] = [0.0, *found.values.square().cumsum(0).tolist()]
            ranks[name] = rank or max(1, bisect_left(energies[name], energy * energies[name][-1]))
            down, up = _filled(found, ranks[name])
        for which, tensor in (("A", down), ("B", up)):
            key = f"{PREFIX}{name}.lora_{which}.weight"
            if key in tensors:
                raise ValueError(f"{where} holds two tensors for {shown(key)}")
            tensors[key] = tensor

    kept = {name: _at(held, ranks[name]) for name, held in energies.items()}
    whole = sum(held[-1] for held in energies.values())
    share = _share(sum(kept.values()), whole)
    if rank is not None and share < at_least:
        enough = bisect_left(
            range(most),
            at_least * whole,
            key=lambda rank: sum(_at(held, rank) for held in energies.values()),
        )
        raise ValueError(
            f"rank {rank} keeps {share:.1%} of the energy, at_least is {at_least:.1%}; rank "
            f"{enough} keeps that, and a smaller at_least lets rank {rank} pass"
        )
    layers = {
        name: ExportedLayer(*sizes[name], ranks[name], _share(kept[name], held[-1]))
        for name, held in energies.items()
    }
    return tensors, _config(source, ranks), Exported(layers, share)


def _sizes(source: Adapter, kernels: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Return in and out features of each layer, without padding."""
    known = source.layers
    sizes = {}
    for name, kernel in kernels.items():
        m, n, b = kernel.shape
        facts = known.get(name)
        sizes[name] = (facts.in_features, facts.out_features) if facts else (n * b, m * b)
    return sizes


def _decomposed(kernel: Tensor, in_features: int, out_features: int) -> _Decomposition:
    """Return the decomposition of what a layer adds to its weight."""
    m, n, b = kernel.shape
    delta = kernel.double() / in_features
    if (out_features, in_features) == (m * b, n * b):
        found = _of_bins(delta)
    else:  # what is best for a padded matrix is not best for the part that counts
        found = _of_matrix(circulant(delta)[:out_features, :in_features])
    if not found.values[0] < torch.finfo(torch.float32).max:
        raise ValueError("expected a kernel of moderate size: float32 has no room for its factors")
    return found


def _filled(found: _Decomposition, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors as they are stored, zeros where a matrix has no more ranks."""
    down, up = found.take(rank)
    more = rank - len(down)
    down, up = pad(down, (0, 0, 0, more)), pad(up, (0, more))
    return down.float().contiguous(), up.float().contiguous()


def _at(energies: list[float], rank: int) -> float:
    return energies[min(rank, len(energies) - 1)]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _config(source: Adapter, ranks: Mapping[str, int]) -> dict[str, Any]:
    # the largest as r, since servers make room for no more
    usual, pattern = as_pattern(ranks, "ranks", max(ranks.values()))
    turned = {name for name, facts in source.layers.items() if facts.fan_in_fan_out}
    return {
        **{key: source.config.get(key) for key in COMMON_SETTINGS},
        "alpha_pattern": pattern,
        "auto_mapping": None,
        "bias": "none",
        "fan_in_fan_out": turned == set(ranks),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": usual,
        "rank_pattern": pattern,
        "use_dora": False,
        "use_rslora": False,
    }
