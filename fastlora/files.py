"""Writing files whole or not at all: one file, or several that belong together."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_STAGE, _LOCK = ".replacing", ".replacing.lock"


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary path beside ``path``, sync it to disk, and rename it into place.

    Whatever goes wrong before the rename leaves an existing file as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        _sync(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are private; these are results to share
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_together(folder: Path, writers: dict[str, Callable[[Path], object]]) -> None:
    """Write several files of a folder, each by its function of a path, so that all change in one instant.

    Whoever opens the files at any moment, also after the process was killed or the power failed, finds all of the old
    ones or all of the new ones. Savers of one folder wait for each other. Other files of the folder are not touched,
    and what a killed save left there (a folder ``.replacing``, a lock, links in the places of the files) works and is
    cleared away by the next one.

    How: the new files are written to ``.replacing/new`` and the old ones linked into ``.replacing/old``; each file is
    replaced by a symbolic link through ``.replacing/current``, which leads to ``old``, so nothing has changed yet. Then
    one rename makes ``current`` lead to ``new``, and plain files replace the links.

    Two limits. A reader that opens one file before that rename and another after it has one of each: it has to look
    whether the first was replaced meanwhile. And where the file system has no symbolic links, a save that is killed
    between its renames leaves the files without the last of ``writers``, never a mixture.

    Raises OSError if the new files cannot be written; the old ones are then left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _settle(folder)
        new, old = folder / _STAGE / "new", folder / _STAGE / "old"
        try:
            new.mkdir(parents=True)
            old.mkdir()
            for name, write in writers.items():
                write(new / name)
                _sync(new / name)
            replace = _switch if _has_links(folder / _STAGE) else _replace_in_turn
            replace(folder, list(writers))
        finally:
            _settle(folder)


def _switch(folder: Path, names: list[str]) -> None:
    stage = folder / _STAGE
    for name in names:
        if (folder / name).exists():
            _link(folder / name, stage / "old" / name)
    _put_link("old", stage / "current", stage)
    for made in (stage / "new", stage / "old", stage, folder):
        _sync(made)
    for name in names:
        _put_link(_through_current(name), folder / name, stage)
    _sync(folder)
    _put_link("new", stage / "current", stage)
    _sync(stage)


def _put_link(target: str, path: Path, stage: Path) -> None:
    (stage / "link").symlink_to(target)
    (stage / "link").replace(path)


def _has_links(stage: Path) -> bool:
    try:
        _put_link("new", stage / "try", stage)
    except (OSError, NotImplementedError):
        return False
    return True


def _through_current(name: str) -> str:
    return f"{_STAGE}/current/{name}"


def _replace_in_turn(folder: Path, names: list[str]) -> None:
    """Without links: the last file goes first and comes back last, so that the folder is incomplete in between."""
    (folder / names[-1]).unlink(missing_ok=True)
    _sync(folder)
    for name in names:
        (folder / _STAGE / "new" / name).replace(folder / name)
    _sync(folder)


def _settle(folder: Path) -> None:
    """Put plain files in the places of links into ``.replacing``, whichever files those lead to, and remove it."""
    stage = folder / _STAGE
    if not stage.exists():
        return
    links = [
        path for path in folder.iterdir() if path.is_symlink() and os.readlink(path) == _through_current(path.name)
    ]
    for path in links:
        if path.exists():
            plain = stage / "plain"
            plain.unlink(missing_ok=True)
            _link(path, plain)
            plain.replace(path)
        else:  # there was no old file
            path.unlink()
    if links:
        _sync(folder)
    shutil.rmtree(stage)


def _link(file: Path, to: Path) -> None:
    """Another name for a file, or a copy where the file system has no hard links."""
    file = file.resolve()  # os.link would link a symbolic link itself
    try:
        os.link(file, to)
    except OSError:
        shutil.copy2(file, to)
        _sync(to)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until nobody else is in here for this folder; who is killed leaves. No lock where the system has none."""
    path = folder / _LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _lock(handle) or is_still_at(handle, path):
            break
        os.close(handle)  # of a file that its owner has removed meanwhile
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _lock(handle: int) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def is_still_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
