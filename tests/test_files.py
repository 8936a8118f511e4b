"""Files that belong together are replaced together, whenever a save is killed, fails, or meets another."""

import errno
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from fastlora.files import replace_together

NAMES = ("weights", "config")
CHANGES = {"open", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.chmod"}


def save(folder: Path, text: str) -> None:
    replace_together(folder, {name: lambda path: path.write_text(text) for name in NAMES})


def read(folder: Path) -> list[str | None]:
    return [(folder / name).read_text() if (folder / name).exists() else None for name in NAMES]


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_symlink() or path.name not in NAMES}


def in_child(run) -> int:
    """The status of a process that calls ``run``: 0 if it came to its end, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(step: int, run) -> bool:
    """Call ``run`` in a process that is killed before it changes or opens a file for the step-th time."""

    def until_killed():
        steps = iter(range(step))

        def count(event, arguments):
            if event in CHANGES and next(steps, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        run()

    status = in_child(until_killed)
    assert status in (0, -signal.SIGKILL)
    return status != 0


def no_links(*_, **__):
    raise OSError(errno.EPERM, "no symbolic links here")


@pytest.mark.parametrize(
    "before",
    [
        ["old", "old"],
        *(pytest.param(before, marks=pytest.mark.slow) for before in ([None, None], [None, "old"], ["old", None])),
    ],
    ids=str,
)
def test_killed_at_any_step(before, tmp_path):
    """The old files or the new ones; other files stay; the next save clears everything away."""
    for step in range(200):
        folder = tmp_path / str(step)
        (folder / "checkpoint-1").mkdir(parents=True)
        (folder / "README.md").write_text("kept")
        for name, text in zip(NAMES, before, strict=True):
            if text is not None:
                (folder / name).write_text(text)
        killed = killed_at(step, lambda folder=folder: save(folder, "new"))
        assert read(folder) in ([before, ["new", "new"]] if killed else [["new", "new"]])
        save(folder, "next")
        assert read(folder) == ["next", "next"]
        assert leftovers(folder) == {"README.md", "checkpoint-1"} and (folder / "README.md").read_text() == "kept"
        if not killed:
            assert step > 20
            return
    raise AssertionError("a save that never ends")


@pytest.mark.parametrize("rounds", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_killed_again_and_again(rounds, tmp_path):
    """Savers that find what several killed ones left."""
    draw = random.Random(0)
    save(tmp_path, "0")
    now = "0"
    for i in range(1, rounds):
        text = str(i)
        killed = killed_at(draw.randrange(60), lambda text=text: save(tmp_path, text))
        one, other = read(tmp_path)
        assert one == other and one in ((now, text) if killed else (text,))
        now = one
    save(tmp_path, "last")
    assert read(tmp_path) == ["last", "last"] and not leftovers(tmp_path)


def test_killed_without_symbolic_links(tmp_path, monkeypatch):
    """Then a killed save may leave an incomplete folder, but never a mixture."""
    monkeypatch.setattr(os, "symlink", no_links)
    states = set()
    for step in range(200):
        folder = tmp_path / str(step)
        save(folder, "old")
        killed = killed_at(step, lambda folder=folder: save(folder, "new"))
        states.add(tuple(read(folder)))
        save(folder, "next")
        assert read(folder) == ["next", "next"] and not leftovers(folder)
        if not killed:
            break
    assert states == {("old", "old"), ("old", None), ("new", None), ("new", "new")}


def test_copied_where_there_are_no_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    save(tmp_path, "old")
    save(tmp_path, "new")
    assert read(tmp_path) == ["new", "new"] and not leftovers(tmp_path)


@pytest.mark.parametrize("function", ["fsync", "replace", "symlink", "mkdir"])
@pytest.mark.parametrize("after", range(9))
def test_what_fails_leaves_the_old_files_or_the_new_ones(function, after, tmp_path, monkeypatch):
    save(tmp_path, "old")
    calls, original = iter(range(after)), getattr(os, function)

    def fail_once(*arguments, **keywords):
        if next(calls, None) is None:
            monkeypatch.setattr(os, function, original)
            raise OSError(errno.ENOSPC, "disk full")
        return original(*arguments, **keywords)

    monkeypatch.setattr(os, function, fail_once)
    try:
        save(tmp_path, "new")
    except OSError as error:
        assert error.errno == errno.ENOSPC
    if leftovers(tmp_path):  # the files had been replaced, and then they could not be cleared away
        assert read(tmp_path) == ["new", "new"]
        save(tmp_path, "new")
    assert read(tmp_path) in (["old", "old"], ["new", "new"]) and not leftovers(tmp_path)


def test_a_link_of_the_user_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "elsewhere").write_text("theirs")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in NAMES:
        (folder / name).symlink_to("../elsewhere")
    save(folder, "new")
    assert read(folder) == ["new", "new"] and not leftovers(folder)
    assert (tmp_path / "elsewhere").read_text() == "theirs"


def test_a_folder_in_the_place_of_a_file_is_not_replaced(tmp_path):
    save(tmp_path, "old")
    (tmp_path / "config").unlink()
    (tmp_path / "config").mkdir()
    with pytest.raises(OSError):
        save(tmp_path, "new")
    assert (tmp_path / "weights").read_text() == "old" and (tmp_path / "config").is_dir()
    assert not leftovers(tmp_path)


def test_several_savers_take_turns(tmp_path):
    """At any moment after all of them ended, or were killed, the files are of one save."""
    draw = random.Random(0)
    for _ in range(5):
        savers = []
        for i in range(3):
            savers.append(os.fork())
            if savers[-1] == 0:
                try:
                    while True:
                        save(tmp_path, f"saver {i}")
                finally:
                    os._exit(1)
        time.sleep(0.05 + 0.1 * draw.random())
        for pid in savers:
            os.kill(pid, signal.SIGKILL)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in savers]
        assert statuses == [-signal.SIGKILL] * 3, "a saver failed because of another"
        one, other = read(tmp_path)
        assert one == other
    save(tmp_path, "last")
    assert read(tmp_path) == ["last", "last"] and not leftovers(tmp_path)
