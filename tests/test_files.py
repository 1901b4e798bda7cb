"""Files and folders are written whole or not at all, and leave nothing behind."""

import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from c3a import files
from c3a.files import replacing, write_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(folder: Path, first: str, second: str) -> None:
    with replacing(folder / "a.txt", folder / "b.txt") as temporary:
        for path, text in zip(temporary, (first, second), strict=True):
            path.write_text(text)


def texts(folder: Path) -> list[str]:
    return [(folder / name).read_text() for name in ("a.txt", "b.txt")]


def test_a_folder_loads_old_or_new_whenever_its_saver_is_killed():
    program = Path(__file__).parent / "kill_saves.py"
    done = subprocess.run(
        [sys.executable, program, "--kills", "40"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {what: int(n) for n, what in re.findall(r"^ +(\d+) (.*)$", done.stdout, re.MULTILINE)}
    assert counts["a kill at random"] == 40
    assert counts["a kill before an operation"] > 100
    assert counts["the two files were of two saves"] > 0


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("links", [False, True])
def test_where_the_second_file_cannot_be_put_in_place_the_first_is_as_before(
    existing, links, tmp_path, monkeypatch
):
    if existing:
        write(tmp_path, "old", "old")
    replace = Path.replace

    def fail_at_b(path, target):
        if Path(target) == tmp_path / "b.txt" and path.parent.name == "fresh":
            raise OSError("no more of them")
        return replace(path, target)

    def no_links(*_, **__):
        raise OSError("this file system has no hard links")

    monkeypatch.setattr(Path, "replace", fail_at_b)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(OSError, match="no more of them"):
        write(tmp_path, "new", "new")
    assert names(tmp_path) == (["a.txt", "b.txt"] if existing else [])
    assert not existing or texts(tmp_path) == ["old", "old"]


def test_a_folder_in_a_files_place_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(IsADirectoryError, match="b.txt to be a file or new, it is a folder"):
        write(tmp_path, "new", "new")
    assert names(tmp_path) == ["b.txt"]


def test_files_have_the_mode_of_the_umask_which_is_never_changed(tmp_path, monkeypatch):
    (tmp_path / "plain").touch()
    monkeypatch.setattr(os, "umask", None)
    with replacing(tmp_path / "a.txt") as (temporary,):
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT, 0o600))  # as some writers do
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_is_renamed_is_on_disk_first_and_the_renaming_after_it(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, Path.replace

    def recorded_fsync(handle):
        steps.append(("flush", os.fstat(handle).st_ino))
        return fsync(handle)

    def recorded_replace(path, target):
        steps.append(("rename", path.stat().st_ino))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    write(tmp_path, "new", "new")
    first, second = ((tmp_path / name).stat().st_ino for name in ("a.txt", "b.txt"))
    flushed = {inode for step, inode in steps[: steps.index(("rename", first))]}
    assert {first, second} <= flushed
    folder = tmp_path.stat().st_ino
    renamed = steps[steps.index(("rename", first)) :]
    assert renamed == [
        ("rename", first),
        ("flush", folder),
        ("rename", second),
        ("flush", folder),
    ]
    steps.clear()
    write_folder(tmp_path / "out", lambda fresh: (fresh / "file").write_text("new"))
    assert steps[0] == ("flush", (tmp_path / "out" / "file").stat().st_ino)
    renaming = steps.index(("rename", (tmp_path / "out").stat().st_ino))
    assert steps[renaming + 1] == ("flush", folder)


def dead(folder: Path) -> Path:
    """Leave what a writer does that is killed."""
    private = Path(tempfile.mkdtemp(dir=folder, prefix=files._PREFIX))
    (private / "fresh").mkdir()
    (private / "fresh" / "half").write_text("half")
    return private


def test_what_the_dead_left_goes_with_the_next_write_and_what_the_living_hold_stays(tmp_path):
    gone = [dead(tmp_path) for _ in range(3)]
    mine = tmp_path / f"{files._PREFIX}mine"
    mine.mkdir()
    (mine / "novel.txt").touch()
    with replacing(tmp_path / "slow.txt") as (slow,):
        slow.write_text("slow")
        write(tmp_path, "new", "new")
        assert not any(path.exists() for path in gone)
        assert slow.exists()
    assert (tmp_path / "slow.txt").read_text() == "slow"
    assert names(tmp_path) == [mine.name, "a.txt", "b.txt", "slow.txt"]


def test_writers_at_once_all_get_through(tmp_path):
    errors = []

    def run(number):
        try:
            for _ in range(20):
                write(tmp_path, f"{number}", f"{number}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert names(tmp_path) == ["a.txt", "b.txt"]


def test_a_private_folder_that_is_taken_for_a_dead_ones_is_made_anew(tmp_path, monkeypatch):
    mkdtemp, made = tempfile.mkdtemp, []

    def taken(**options):
        made.append(mkdtemp(**options))
        if len(made) < 3:
            os.rmdir(made[-1])
        if len(made) == 2:  # and another one's stands there
            os.mkdir(made[-1])
            os.rmdir(made[-1])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", taken)
    write(tmp_path, "new", "new")
    assert len(made) == 3
    assert texts(tmp_path) == ["new", "new"]


def test_where_the_file_system_has_no_locks_nothing_is_taken_for_dead(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    left = dead(tmp_path)
    write(tmp_path, "new", "new")
    assert texts(tmp_path) == ["new", "new"]
    assert left.exists()


def test_a_folder_between_two_places_is_put_back_by_the_next_write(tmp_path):
    private = dead(tmp_path)
    for name in ("runs", "other"):
        (private / "old" / name).mkdir(parents=True)
        (private / "old" / name / "result").write_text("old")
    (tmp_path / "other").mkdir()
    write_folder(tmp_path / "out", lambda fresh: None)
    assert names(tmp_path) == ["other", "out", "runs"]
    assert names(tmp_path / "other") == []
    assert (tmp_path / "runs" / "result").read_text() == "old"


@pytest.mark.parametrize(
    ("existing", "step"), [(False, 1), (False, 2), (True, 1), (True, 2), (True, 3)]
)
def test_a_folder_is_as_before_where_a_new_one_cannot_take_its_place(
    existing, step, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "old").touch()
    replace, flush, steps = Path.replace, files._flush, []

    def interrupt_at(path):
        steps.append(path)
        if len(steps) == step:
            raise KeyboardInterrupt

    def interrupted_replace(path, target):
        if path == out or target == out:
            interrupt_at(path)
        return replace(path, target)

    def interrupted_flush(path):
        if path == tmp_path:
            interrupt_at(path)
        flush(path)

    monkeypatch.setattr(Path, "replace", interrupted_replace)
    monkeypatch.setattr(files, "_flush", interrupted_flush)
    with pytest.raises(KeyboardInterrupt):
        write_folder(out, lambda fresh: (fresh / "new").touch())
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == (
        ["out", "out/old"] if existing else []
    )
