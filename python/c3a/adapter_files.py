"""An adapter's folder in the PEFT library's format: two files that are read and written as one.

``adapter_model.safetensors`` holds the tensors and, as metadata that PEFT does not look at, the
configuration and the digest of the ``adapter_config.json`` that it took the place of. Its renaming
is thus what makes a save happen: a reader that finds it beside the old configuration, as after a
kill, knows so and takes the one within. Otherwise ``adapter_config.json`` counts, also edited. More
metadata says what kernels do not tell of their layers: padding, and weights that are (in, out).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from .files import replacing_in
from .names import shown
from .shapes import SUPPORTED_DTYPES
from .sizes import is_count, kernel_shape

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FILES = (WEIGHTS, CONFIG)  # in the order in which they take their places
PREFIX = "base_model.model."
_WITHIN = "c3a_config"
_REPLACED = "c3a_replaced"
_ABOUT = "c3a_layers"
_KERNEL = ".c3a_kernel"
_MOST_BYTES = 16 * 2**20  # of a configuration
_MOST_SAID = 2000  # characters of a message


class LayerFacts(NamedTuple):
    """What a kernel's shape does not tell of its layer."""

    in_features: int
    out_features: int
    fan_in_fan_out: bool  # the weight is (in, out), as Conv1D's of transformers


class Adapter(NamedTuple):
    """What a folder holds: its configuration, checked, its tensors, and where each came from."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    config_source: str
    weights_path: Path
    about_layers: str = "{}"

    @property
    def layers(self) -> dict[str, LayerFacts]:
        """What the kernels do not tell of their layers, by layer; most have nothing to add.

        Raises ValueError where it is not what ``write`` writes for these kernels.
        """
        source = f"{self.weights_path}, {_ABOUT}"
        found = _mapping(self.about_layers.encode(), source)
        kernels = self.kernels
        return {
            name: _checked_facts(source, name, facts, kernels.get(name))
            for name, facts in found.items()
        }

    @property
    def kernels(self) -> dict[str, Tensor]:
        """The kernels by layer, as stored (scale ``1 / in_features``)."""
        return {
            key.removeprefix(PREFIX).removesuffix(_KERNEL): tensor
            for key, tensor in self.tensors.items()
            if key.endswith(_KERNEL)
        }


def _is_number(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_scalar(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_list_of(test: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(test, value))


_Keys = Mapping[str, tuple[str, Callable[[object], bool]]]
# What is read of a configuration; null stands for what is missing.
_GENERAL: _Keys = {
    "base_model_name_or_path": ("a name or a path", _is_text),
    "bias": ("'none' (a base model's trained biases cannot be loaded)", lambda v: v == "none"),
    "layers_pattern": (
        "a name or a list of names",
        lambda value: _is_text(value) or _is_list_of(_is_text)(value),
    ),
    "layers_to_transform": (
        "a whole number or a list of whole numbers",
        lambda value: _is_number(value) or _is_list_of(_is_number)(value),
    ),
    "modules_to_save": ("a list of names", _is_list_of(_is_text)),
    "revision": ("a name", _is_text),
    "target_modules": (
        "a list of names or a regular expression",
        lambda value: _is_text(value) or _is_list_of(_is_text)(value),
    ),
    "task_type": ("a name", _is_text),
}
_KEYS: _Keys = {
    **_GENERAL,
    "block_size": ("a whole number >= 1", is_count),
    "block_size_pattern": (
        "a mapping from names to whole numbers >= 1",
        lambda value: isinstance(value, dict) and all(map(is_count, value.values())),
    ),
    "target_parameters": ("a list of names", _is_list_of(_is_text)),
}
_LORA_KEYS: _Keys = {
    **_GENERAL,
    "alpha_pattern": (
        "a mapping from names to numbers",
        lambda value: isinstance(value, dict) and all(map(_is_scalar, value.values())),
    ),
    "exclude_modules": (
        "a list of names or a regular expression",
        lambda value: _is_text(value) or _is_list_of(_is_text)(value),
    ),
    "fan_in_fan_out": ("true or false", lambda value: isinstance(value, bool)),
    "lora_alpha": ("a number", _is_scalar),
    "r": ("a whole number >= 1", is_count),
    "rank_pattern": (
        "a mapping from names to whole numbers >= 1",
        lambda value: isinstance(value, dict) and all(map(is_count, value.values())),
    ),
    "use_rslora": ("true or false", lambda value: isinstance(value, bool)),
}


@contextmanager
def said_by(who: str) -> Iterator[None]:
    """Put who it is, or what it is about, before the messages of errors, and keep each a line.

    They may quote what a file holds.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(_line(f"{who}: {error}")) from None
    except ValueError as error:
        raise ValueError(_line(f"{who}: {error}")) from None


def _line(text: str) -> str:
    characters = (c if c.isprintable() else repr(c)[1:-1] for c in text[:_MOST_SAID])
    return "".join(characters) + ("..." if len(text) > _MOST_SAID else "")


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter's folder: configuration and tensors of one save, checked without a model.

    Raises FileNotFoundError or ValueError, in one line that names the file and what is wrong.
    """
    with said_by("c3a"):
        return read(Path(folder))


def kernel_key(layer: str) -> str:
    """Return the key of a layer's kernel."""
    return f"{PREFIX}{layer}{_KERNEL}"


def write(
    folder: Path,
    tensors: dict[str, Tensor],
    config: Mapping[str, object],
    layers: Mapping[str, LayerFacts],
) -> None:
    """Write both files: as one step for ``read_adapter``, each as one step for others."""
    with replacing_in(folder, last=FILES) as fresh:
        prepare(fresh, folder, tensors, config, layers)


def prepare(
    fresh: Path,
    folder: Path,
    tensors: dict[str, Tensor],
    config: Mapping[str, object],
    layers: Mapping[str, LayerFacts],
) -> None:
    """Write both files into a folder from which they will take their places in ``folder``.

    ``layers`` says of some layers what their kernels do not.
    """
    text = _text_of(config)
    replaced = _bytes_of(folder / CONFIG)
    metadata = {_WITHIN: text, _REPLACED: _digest(replaced)}
    if layers:
        metadata[_ABOUT] = json.dumps({name: facts._asdict() for name, facts in layers.items()})
    _store(fresh, folder, tensors, text, metadata)


def prepare_lora(
    fresh: Path, folder: Path, tensors: dict[str, Tensor], config: Mapping[str, object]
) -> None:
    """``prepare`` for an adapter of LoRA, which is only PEFT's and others' to read."""
    _store(fresh, folder, tensors, _text_of(config), {})


def _text_of(config: Mapping[str, object]) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _store(
    fresh: Path, folder: Path, tensors: dict[str, Tensor], text: str, metadata: Mapping[str, str]
) -> None:
    (fresh / CONFIG).write_text(text, encoding="utf-8")
    try:
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt", **metadata})
    except safetensors.SafetensorError as error:
        raise OSError(f"{folder / WEIGHTS} cannot be written: {error}") from None


def read(folder: Path) -> Adapter:
    """``read_adapter``, with messages that do not say whose they are."""
    config_path, weights_path = folder / CONFIG, folder / WEIGHTS
    on_disk = _bytes_of(config_path)
    for _ in range(100):  # another process may save meanwhile
        if on_disk is None and not weights_path.is_file():
            raise FileNotFoundError(
                f"no {CONFIG} in {folder} (adapters are read from local folders; nothing is "
                "fetched)"
            )
        metadata, tensors = _read_weights(folder)
        _check_kernels(weights_path, tensors)
        before, on_disk = on_disk, _bytes_of(config_path)
        if on_disk == before:
            break
    if _WITHIN in metadata and (on_disk is None or _digest(on_disk) == metadata.get(_REPLACED)):
        text, source = metadata[_WITHIN].encode(), f"{weights_path}, {_WITHIN}"
    elif on_disk is not None:
        text, source = on_disk, str(config_path)
    else:
        raise FileNotFoundError(f"no {CONFIG} in {folder}")
    config = _parsed(text, source, "C3A", _KEYS)
    return Adapter(config, tensors, source, weights_path, metadata.get(_ABOUT, "{}"))


def read_lora(folder: Path) -> Adapter:
    """``read``, for an adapter of LoRA as PEFT writes it."""
    config_path = folder / CONFIG
    text = _bytes_of(config_path)
    if text is None:
        raise FileNotFoundError(f"no {CONFIG} in {folder} (nothing is fetched)")
    config = _parsed(text, str(config_path), "LORA", _LORA_KEYS)
    return Adapter(config, _read_weights(folder)[1], str(config_path), folder / WEIGHTS)


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter of some kind, or part of one."""
    return any((folder / name).is_file() for name in FILES)


def _bytes_of(path: Path) -> bytes | None:
    """Return a configuration's file, a byte more than is allowed at most, or None."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return None


def _digest(text: bytes | None) -> str:
    return "" if text is None else hashlib.sha256(text).hexdigest()


def _parsed(text: bytes, source: str, peft_type: str, keys: _Keys) -> dict[str, Any]:
    config = _mapping(text, source)
    if config.get("peft_type") != peft_type:
        raise ValueError(
            f'{source}: expected "peft_type": "{peft_type}", got {shown(config.get("peft_type"))}'
        )
    for key, (expected, test) in keys.items():
        value = config.get(key)
        if value is not None and not test(value):
            raise ValueError(f"{source}: expected {key} to be {expected}, got {shown(value)}")
    return config


def _mapping(text: bytes, source: str) -> dict[str, Any]:
    if len(text) > _MOST_BYTES:
        raise ValueError(f"{source} is longer than {_MOST_BYTES} bytes")
    try:
        config = json.loads(text.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{source} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{source} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{source}: expected a mapping, got {shown(config)}")
    return config


def _checked_facts(source: str, name: str, facts: object, kernel: Tensor | None) -> LayerFacts:
    if isinstance(facts, dict) and facts.keys() == set(LayerFacts._fields) and kernel is not None:
        sizes, turned = (facts["in_features"], facts["out_features"]), facts["fan_in_fan_out"]
        if all(map(is_count, sizes)) and isinstance(turned, bool):
            block_size = kernel.shape[-1]
            if kernel_shape(*sizes, block_size) == tuple(kernel.shape):
                return LayerFacts(*sizes, turned)
    shape = None if kernel is None else tuple(kernel.shape)
    raise ValueError(f"{source}: {name}: {shown(facts)} is not of a kernel of shape {shape}")


def _read_weights(folder: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        hint = "; adapter_model.bin is a pickle, which is never read" if pickled else ""
        raise FileNotFoundError(f"no {WEIGHTS} in {folder}{hint}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    return metadata, tensors


def _check_kernels(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not key.endswith(_KERNEL):
            continue
        if tensor.dtype not in SUPPORTED_DTYPES:
            dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
            got = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{path}: {key}: expected one of {dtypes}, got {got}")
        if tensor.ndim not in (3, 4) or tensor.numel() == 0:
            raise ValueError(
                f"{path}: {key}: expected a shape (m, n, b), or (experts, m, n, b), got "
                f"{tuple(tensor.shape)}"
            )
