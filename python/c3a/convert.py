"""From LoRA, or from a fine-tuned checkpoint, to the nearest C3A adapter: a start for training."""

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from .adapter import COMMON_SETTINGS, configuration, of_pattern
from .adapter_files import PREFIX, LayerFacts, kernel_key, prepare, read_lora, said_by
from .files import check_free, write_folder
from .names import ends, first_keys, matches, shown
from .reference import nearest_kernel
from .sizes import auto_block_size, check_block_size

__all__ = ["Converted", "ConvertedLayer", "from_checkpoints", "from_lora"]

# Settings of LoRA by which a layer adds something else than scaling * B A, or not to the base.
_OTHER = (
    "alora_invocation_tokens",
    "arrow_config",
    "exclude_modules",  # PEFT's C3A has no such setting
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
_PLAIN_INITS = (None, True, False, "eva", "gaussian", "orthogonal")  # others change the base
_CHECKPOINTS = ("model", "diffusion_pytorch_model")
_MOST_BYTES = 64 * 2**20  # of an index

Track = Callable[[Iterable[str]], Iterable[str]]


class ConvertedLayer(NamedTuple):
    """What became of one layer's matrix."""

    in_features: int
    out_features: int
    block_size: int
    error: float  #: norm of what is lost relative to the matrix's norm


class Converted(NamedTuple):
    """What was written."""

    layers: dict[str, ConvertedLayer]  #: by name
    error: float  #: norm of what is lost of all layers relative to their norm
    left_out: list[str]  #: tensors that differ from the base's and went nowhere


class _Kernels:
    """The nearest kernels of matrices, as they come."""

    def __init__(self, block_size: int | str, rank: int) -> None:
        if isinstance(block_size, str) and block_size != "auto":
            raise ValueError(f"expected block_size to be a number or 'auto', got {block_size!r}")
        if rank < 1:
            raise ValueError(f"expected rank >= 1, got {rank}")
        self._block_size, self._rank = block_size, rank
        self.tensors: dict[str, Tensor] = {}
        self.layers: dict[str, ConvertedLayer] = {}
        self._lost = self._whole = 0.0

    def add(self, name: str, delta: Tensor) -> None:
        """Add the kernel of a layer, given what is to be added to its weight, (out, in)."""
        out_features, in_features = delta.shape
        b = self._block_size
        if isinstance(b, str):
            b = auto_block_size(in_features, out_features, self._rank)
        check_block_size(b, in_features, out_features, pad=False)
        kernel, error = nearest_kernel(delta.double(), b)
        # a layer's scale is 1 / in_features
        stored = (kernel * in_features).float()
        if not (stored.isfinite().all() and error.isfinite()):
            raise ValueError("expected a matrix of finite numbers, of moderate size")
        self.tensors[kernel_key(name)] = stored
        self.layers[name] = ConvertedLayer(in_features, out_features, b, float(error))
        whole = float(delta.double().square().sum())
        self._whole += whole
        self._lost += whole * float(error) ** 2

    def write(
        self,
        folder: Path,
        config: Mapping[str, Any],
        saved: Mapping[str, Tensor],
        left_out: list[str],
        *,
        fan_in_fan_out: bool = False,
    ) -> Converted:
        """Write the adapter, with tensors of ``modules_to_save`` by their keys."""
        sizes = {name: layer.block_size for name, layer in self.layers.items()}
        whole = configuration(sizes, **config)
        facts = {
            name: LayerFacts(layer.in_features, layer.out_features, True)
            for name, layer in self.layers.items()
            if fan_in_fan_out
        }
        if twice := self.tensors.keys() & saved.keys():
            raise ValueError(f"there are two tensors for {shown(min(twice))}")
        tensors = {**self.tensors, **saved}
        write_folder(folder, lambda fresh: prepare(fresh, folder, tensors, whole, facts))
        error = math.sqrt(self._lost / self._whole) if self._whole else 0.0
        return Converted(self.layers, error, left_out)


def from_lora(
    source: str | Path,
    folder: str | Path,
    block_size: int | str,
    *,
    rank: int = 8,
    track: Track = iter,
) -> Converted:
    """Write the C3A adapter that is nearest to an adapter of LoRA.

    A matrix of low rank is far from block-circulant: expect errors near ``sqrt(1 - 1 / b)``, and
    take the result as a start for training. ``modules_to_save`` go along as they are.

    Args:
        source: the folder of a LoRA adapter in PEFT's format, of safetensors.
        folder: new or empty; written whole or not at all.
        block_size: divides all layers' sides, or ``"auto"``, as for ``patch_model``.
        rank: for ``"auto"``.
        track: gets the layers' names and gives them back one by one, for a progress bar.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: what is not a plain LoRA of linear layers (DoRA, embeddings, experts, ...), a
            folder that has files, or a block size that does not fit.
    """
    folder = Path(folder)
    with said_by("c3a.convert.from_lora"):
        check_free(folder)
        kernels = _Kernels(block_size, rank)
        adapter = read_lora(Path(source))
        config, where = adapter.config, adapter.config_source
        for key in _OTHER:
            if config.get(key):
                raise ValueError(
                    f"{where}: expected a plain LoRA, it has {key} = {shown(config[key])}"
                )
        if not any(config.get("init_lora_weights") is plain for plain in _PLAIN_INITS[:3]) and (
            config.get("init_lora_weights") not in _PLAIN_INITS[3:]
        ):
            raise ValueError(
                f"{where}: init_lora_weights {shown(config['init_lora_weights'])} changes the base "
                "model; convert it to a plain LoRA as the PEFT library's documentation says"
            )
        if not config.get("target_modules"):
            raise ValueError(f"{where} names no target_modules")
        pairs, saved = _split(adapter.tensors, config, adapter.weights_path)
        with said_by(where):
            scalings = _scalings(config, {name: a.shape[0] for name, (a, _) in pairs.items()})
        for name in track(list(pairs)):
            with said_by(f"{adapter.weights_path}: {name}"):
                a, b = pairs[name]
                kernels.add(name, scalings[name] * (b.double() @ a.double()))
        taken_over = {key: config.get(key) for key in COMMON_SETTINGS}
        return kernels.write(
            folder, taken_over, saved, [], fan_in_fan_out=config.get("fan_in_fan_out") is True
        )


def _split(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Return A and B by layer, and what ``modules_to_save`` saved, by key."""
    found: dict[str, dict[str, Tensor]] = {}
    saved = {}
    wanted = frozenset(config.get("modules_to_save") or ())
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        layer, which = name.removesuffix(".weight")[:-7], name.removesuffix(".weight")[-7:]
        if name == key:
            raise ValueError(f"{where}: expected keys that begin with {PREFIX}, got {shown(key)}")
        if layer and which in (".lora_A", ".lora_B") and name.endswith(".weight"):
            found.setdefault(layer, {})[which[-1]] = tensor
        elif _is_in(wanted, name):
            saved[key] = tensor
        else:
            raise ValueError(
                f"{where}: {shown(key)} is of no plain LoRA: expected lora_A.weight and "
                "lora_B.weight of layers, and tensors of modules_to_save"
            )
    if not found:
        raise ValueError(f"{where} holds no lora_A and lora_B")
    pairs = {}
    for layer, both in found.items():
        shapes = {which: tuple(tensor.shape) for which, tensor in both.items()}
        a, b = shapes.get("A", ()), shapes.get("B", ())
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b:
            raise ValueError(
                f"{where}: {layer}: expected lora_A of shape (r, in) and lora_B of shape (out, r), "
                f"got {shapes}"
            )
        if not all(tensor.is_floating_point() for tensor in both.values()):
            raise ValueError(f"{where}: {layer}: expected numbers in floating point")
        pairs[layer] = both["A"], both["B"]
    return pairs, saved


def _is_in(wanted: Collection[str], name: str) -> bool:
    """Return whether a tensor's name is within a module that is meant."""
    parts = name.split(".")
    return any(matches(wanted, ".".join(parts[:end])) for end in range(1, len(parts)))


def _scalings(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Return by layer what LoRA multiplies ``B @ A`` with."""
    names = list(ranks)
    # what PEFT takes where a configuration says nothing
    usual = {key: 8 if config.get(key) is None else config[key] for key in ("r", "lora_alpha")}
    patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    keys = [first_keys(list(pattern), names) for pattern in patterns]
    scalings = {}
    for name, rank_key, alpha_key in zip(names, *keys, strict=True):
        rank = of_pattern(patterns[0], name, rank_key) or usual["r"]
        alpha = of_pattern(patterns[1], name, alpha_key)
        alpha = usual["lora_alpha"] if alpha is None else alpha
        if rank != ranks[name]:
            raise ValueError(f"{name} is of rank {rank} here, its tensors are of {ranks[name]}")
        scalings[name] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return scalings


# From two checkpoints


def from_checkpoints(
    base: str | Path,
    tuned: str | Path,
    folder: str | Path,
    block_size: int | str,
    *,
    target_modules: Collection[str],
    modules_to_save: Collection[str] = (),
    fan_in_fan_out: bool = False,
    rank: int = 8,
    track: Track = iter,
) -> Converted:
    """Write the C3A adapter that is nearest to what fine-tuning has added to a model.

    Args:
        base, tuned: the two checkpoints: safetensors files, or folders with ``model.safetensors``
            or its parts and their index. Names that begin with one part more in the tuned one, as
            a classifier's do, are found as well.
        folder: new or empty; written whole or not at all.
        block_size, rank, track: as for ``from_lora``.
        target_modules: names or ends of names of linear layers.
        modules_to_save: names or ends of names of modules that go along whole, such as a head.
        fan_in_fan_out: the weights are ``(in, out)``, as ``Conv1D``'s of transformers.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: checkpoints that do not fit, or hold no such layer; pickles; a folder that has
            files; a block size that does not fit.
    """
    folder = Path(folder)
    with said_by("c3a.convert.from_checkpoints"), ExitStack() as stack:
        check_free(folder)
        kernels = _Kernels(block_size, rank)
        old, new = (_Checkpoint(Path(path), stack) for path in (base, tuned))
        wanted, heads = frozenset(target_modules), frozenset(modules_to_save)
        saved, left_out, layers = [], [], []
        for key in sorted(new.files):
            name = key.removesuffix(".weight")
            if _is_in(heads, key):
                saved.append(key)
            elif name != key and matches(wanted, name):
                layers.append(name)
        for what, names, given in (
            ("target_modules", [*layers], wanted),
            ("modules_to_save", [key.rpartition(".")[0] for key in saved], heads),
        ):
            there = {end for name in names for start in _starts(name) for end in ends(start)}
            if unknown := sorted(given - there):
                raise ValueError(
                    f"{new.path}: nothing matched {what} {shown(unknown)}; it has weights of "
                    f"{', '.join(new.kinds())}"
                )
        if not layers:
            raise ValueError("expected target_modules to name a layer")
        for name in track(layers):
            with said_by(name):
                delta = _difference(old, new, f"{name}.weight")
                kernels.add(name, delta.T if fan_in_fan_out else delta)
        done = {f"{name}.weight" for name in layers} | set(saved)
        for key in sorted(new.files.keys() - done):
            there_too = old.key_of(key)
            if there_too is None or not _same(old.tensor(there_too), new.tensor(key)):
                left_out.append(key)
        config = {
            "base_model_name_or_path": str(base) if old.path.is_dir() else None,
            "modules_to_save": sorted(heads) or None,
            "target_modules": sorted(wanted),
        }
        tensors = {f"{PREFIX}{key}": new.tensor(key) for key in saved}
        return kernels.write(folder, config, tensors, left_out, fan_in_fan_out=fan_in_fan_out)


def _starts(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same bits; not every dtype can be compared."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (one, other)))


class _Checkpoint:
    """The tensors of a checkpoint, read one by one."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        self._stack = stack
        self._open: dict[Path, Any] = {}
        self.files = self._files()  # by key

    def _files(self) -> dict[str, Path]:
        if self.path.is_file():
            if self.path.suffix != ".safetensors":
                raise ValueError(f"expected a safetensors file or a folder, got {self.path}")
            return dict.fromkeys(self._reader(self.path).keys(), self.path)
        for name in _CHECKPOINTS:
            index = self.path / f"{name}.safetensors.index.json"
            if index.is_file():
                return self._indexed(index)
            if (whole := self.path / f"{name}.safetensors").is_file():
                return dict.fromkeys(self._reader(whole).keys(), whole)
        others = [*self.path.glob("*.bin"), *self.path.glob("*.pt"), *self.path.glob("*.pth")]
        hint = f"; {others[0].name} is a pickle, which is never read" if others else ""
        raise FileNotFoundError(f"no model.safetensors in {self.path}, nor its index{hint}")

    def _indexed(self, index: Path) -> dict[str, Path]:
        if index.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{index} is longer than {_MOST_BYTES} bytes")
        try:
            content = json.loads(index.read_bytes().decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{index} is not JSON: {error}") from None
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict):
            raise ValueError(f"{index}: expected a weight_map, got {shown(places)}")
        files = {}
        for key, name in places.items():
            is_name = isinstance(name, str) and Path(name).name == name
            if not is_name or not name.endswith(".safetensors"):
                raise ValueError(
                    f"{index}: expected names of safetensors files beside it, got {shown(name)}"
                )
            files[key] = self.path / name
        for path in dict.fromkeys(files.values()):
            if not path.is_file():
                raise FileNotFoundError(f"no {path}, which {index.name} names")
            there = set(self._reader(path).keys())
            for key, place in files.items():
                if place == path and key not in there:
                    raise ValueError(f"{path} has no {shown(key)}, which {index.name} says it has")
        return files

    def _reader(self, path: Path) -> Any:
        if path not in self._open:
            try:
                opened = safetensors.safe_open(path, "pt")
                self._open[path] = self._stack.enter_context(opened)
            except safetensors.SafetensorError as error:
                raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
        return self._open[path]

    def tensor(self, key: str) -> Tensor:
        path = self.files[key]
        try:
            tensor: Tensor = self._reader(path).get_tensor(key)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: {shown(key)}: {error}") from None
        return tensor

    def key_of(self, key: str) -> str | None:
        """Return the key here of a tensor of a model that may have this one within it."""
        return next((k for k in (key, key.partition(".")[2]) if k in self.files), None)

    def kinds(self) -> list[str]:
        """Return the last parts of the names of modules with a weight, a few of them."""
        names = [key.split(".") for key in self.files if key.endswith(".weight")]
        kinds = sorted({shown(name[-2])[1:-1] for name in names if len(name) > 1})
        return [*kinds[:20], *(["..."] if len(kinds) > 20 else [])]


def _difference(old: _Checkpoint, new: _Checkpoint, key: str) -> Tensor:
    """Return what was added to a weight, in float64."""
    before = old.key_of(key)
    if before is None:
        raise ValueError(f"{old.path} has no such weight")
    tensors = old.tensor(before), new.tensor(key)
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise ValueError(f"expected two matrices of one shape, got {shapes[0]} and {shapes[1]}")
    if not all(tensor.is_floating_point() for tensor in tensors):
        dtypes = " and ".join(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
        raise ValueError(f"expected numbers in floating point, got {dtypes}")
    return tensors[1].double() - tensors[0].double()
