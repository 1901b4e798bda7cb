"""Files and folders that are written whole or not at all."""

import os
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


def check_free(folder: Path, marker: str | None = None) -> None:
    """Raise ValueError unless a folder is new, empty, or an earlier output with ``marker``."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise ValueError(f"expected the output to be a folder, {folder} is a file")
    if marker is None or not (folder / marker).is_file():
        raise ValueError(f"expected the output to be a new or empty folder, {folder} has files")


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a new folder beside ``folder``, then put it in ``folder``'s place.

    What was there before is removed last. A failure or Ctrl-C leaves it as it was.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        fresh, old = Path(name) / "fresh", Path(name) / "old"
        fresh.mkdir()
        write(fresh)
        if folder.exists():
            folder.replace(old)
        try:
            fresh.replace(folder)
        except BaseException:
            if old.exists():
                old.replace(folder)
            raise
