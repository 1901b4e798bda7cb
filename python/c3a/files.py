"""Files that are written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
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
