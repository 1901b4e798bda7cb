"""Files and folders that are written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Give temporary names beside the paths; on success they take the paths' place, else they go.

    Each file is replaced in one step of the file system, in the order given.
    """
    temporary = []
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            # The suffix stays: writers choose a format by it.
            handle, name = tempfile.mkstemp(
                dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix
            )
            os.close(handle)
            temporary.append(Path(name))
        yield tuple(temporary)
        umask = os.umask(0)
        os.umask(umask)
        for name in temporary:
            name.chmod(0o666 & ~umask)  # mkstemp's files are private
            with name.open("rb") as file:
                os.fsync(file.fileno())
        for path, name in zip(paths, temporary, strict=True):
            name.replace(path)
    finally:
        for name in temporary:
            name.unlink(missing_ok=True)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a new folder beside ``folder``, then move what it wrote into place.

    Files of the same names that ``folder`` holds already are replaced, others stay.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        fresh = Path(name) / "whole"
        fresh.mkdir()
        write(fresh)
        if not folder.exists():
            fresh.replace(folder)
            return
        for path in sorted(fresh.iterdir()):
            if path.is_dir() and (folder / path.name).is_dir():
                shutil.rmtree(folder / path.name)
            path.replace(folder / path.name)
