"""Files and folders that are written whole or not at all, also where a writer is killed."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = ".c3a-writing-"
# What there is in a private folder: what is written, and what stood in its place.
_FRESH, _OLD = "fresh", "old"


@contextmanager
def replacing(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Give temporary names for paths of one folder; on success they take the paths' places.

    Each file is replaced in one step of the file system, in the order given, and is on disk before
    the next. An error or Ctrl-C leaves all of them as they were; a writer that is killed may have
    replaced the first ones only, and leaves a private folder, which the next one removes.
    """
    (folder,) = {path.parent for path in paths}
    with replacing_in(folder, last=[path.name for path in paths]) as fresh:
        temporary = tuple(fresh / path.name for path in paths)
        for file in temporary:
            file.touch()
        yield temporary


@contextmanager
def replacing_in(folder: Path, last: Sequence[str] = ()) -> Iterator[Path]:
    """Give a new folder; on success what is in it takes the places of the same names in ``folder``.

    As ``replacing``, for names that are not known before. Those of ``last`` come last, in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / name for name in last):
        if path.is_dir():
            raise IsADirectoryError(f"expected {path} to be a file or new, it is a folder")
    order = {name: place for place, name in enumerate(last)}
    with _private_folder(folder) as private:
        fresh = private / _FRESH
        fresh.mkdir()
        probe = fresh / _FRESH
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        yield fresh
        written = sorted(fresh.iterdir(), key=lambda path: (order.get(path.name, -1), path.name))
        for path in written:
            if path.is_file():
                path.chmod(mode)  # that of the umask, which some writers leave aside
        _flush_all(fresh)
        _replace_all([(path, folder / path.name) for path in written], private / _OLD)


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

    What was there before is removed last. A failure or Ctrl-C leaves it as it was; where a writer
    was killed between the two steps, the next one beside it puts it back.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _private_folder(folder.parent) as private:
        fresh = private / _FRESH
        fresh.mkdir()
        write(fresh)
        _flush_all(fresh)
        old = private / _OLD / folder.name
        old.parent.mkdir()
        try:
            if folder.exists():
                folder.replace(old)
            fresh.replace(folder)
            _flush(folder.parent)
        except BaseException:
            if not fresh.exists():
                folder.replace(fresh)
            if old.exists():
                old.replace(folder)
            raise
        old.parent.replace(fresh)  # it is not to be put back any more


@contextmanager
def _private_folder(parent: Path) -> Iterator[Path]:
    """Make a folder that only this user can enter, and remove it at the end.

    It is locked meanwhile: what can be locked was left by a process that was killed.
    """
    for path in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError), _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
            _remove_dead(path)
    while True:
        path = Path(tempfile.mkdtemp(dir=parent, prefix=_PREFIX))
        # Until it is locked, somebody may take it for a dead one's and remove it.
        with suppress(_Gone), _locked(path, fcntl.LOCK_EX):
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)
            return


class _Gone(FileNotFoundError):
    pass


@contextmanager
def _locked(path: Path, operation: int) -> Iterator[None]:
    """Hold a folder's lock; _Gone if the folder went before that.

    Where the file system has no locks, waiting for one is as good as holding it, and what does not
    wait gets none: there nothing is ever taken for dead.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise _Gone(str(path)) from error
    try:
        try:
            fcntl.flock(handle, operation)
        except OSError:
            if operation & fcntl.LOCK_NB:
                raise
        try:
            there = os.stat(path, follow_symlinks=False)
        except FileNotFoundError as error:
            raise _Gone(str(path)) from error
        if not os.path.samestat(os.fstat(handle), there):
            raise _Gone(str(path))
        yield
    finally:
        os.close(handle)


def _remove_dead(path: Path) -> None:
    """Remove a private folder; a folder that it was about to replace goes back if none is there."""
    names = {entry.name for entry in path.iterdir()}
    if path.stat().st_uid != os.geteuid() or not names <= {_FRESH, _OLD}:
        return
    if _OLD in names:
        for old in (path / _OLD).iterdir():
            place = path.parent / old.name
            if old.is_dir() and not os.path.lexists(place):
                old.replace(place)
    shutil.rmtree(path)


def _replace_all(pairs: list[tuple[Path, Path]], aside: Path) -> None:
    """Rename each first path to its second one: all, or after an error none."""
    aside.mkdir()
    old = {path: aside / path.name for _, path in pairs if os.path.lexists(path)}
    for path, kept in old.items():
        try:
            os.link(path, kept, follow_symlinks=False)
        except OSError:  # no hard links here, or not to this file
            shutil.copy2(path, kept, follow_symlinks=False)
    try:
        for temporary, path in pairs:
            temporary.replace(path)
            _flush(path.parent)
    except BaseException:
        for temporary, path in pairs:
            if not temporary.exists():
                if path in old:
                    old[path].replace(path)
                else:
                    path.unlink(missing_ok=True)
        raise


def _flush_all(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _flush(Path(root, name))
        _flush(Path(root))


def _flush(path: Path) -> None:
    """Wait until a file or a folder's names are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems know it of files only
            raise
    finally:
        os.close(handle)
