"""Acting when a module is imported, without importing it.

Parts of torch that few programs need take longer to import than this package. What they are to be
told is told as they are imported.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_Act = Callable[[ModuleType], None]


def on_import(name: str, act: _Act) -> None:
    """Call ``act`` with a module: now if it is imported, and whenever it will be."""
    sys.meta_path.insert(0, _Finder(name, act))
    if name in sys.modules:
        act(import_module(name))  # waits for another thread that imports it


class _Finder:
    """Finds one module as the finders after this one do, with a loader that acts."""

    def __init__(self, name: str, act: _Act) -> None:
        self._name, self._act = name, act

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._name:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self._act)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Another loader, which the module has afterwards, then the act."""

    def __init__(self, loader: Any, act: _Act) -> None:
        self._loader, self._act = loader, act

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        module.__loader__ = spec.loader = self._loader
        self._loader.exec_module(module)
        self._act(module)
