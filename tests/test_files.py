"""Files written aside: whole or not at all, whoever fails or writes at the same time."""

import ast
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from wherefrom.pipeline.files import write_aside

pytestmark = pytest.mark.core

ROOT = Path(__file__).resolve().parents[1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("concurrent", [False, True])
def test_a_file_is_replaced_when_the_block_ends_and_not_before(tmp_path: Path, concurrent: bool) -> None:
    path = tmp_path / "file.json"
    for text in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with write_aside(path, concurrent=concurrent) as aside:
            aside.write_text(text)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
        assert names(tmp_path) == ["file.json"]


@pytest.mark.parametrize("problem", [OSError(28, "no space"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path: Path, problem: BaseException) -> None:
    path = tmp_path / "file.json"
    path.write_text("before")
    with pytest.raises(type(problem)) as raised, write_aside(path, fsync=True) as aside:  # noqa: PT012
        aside.write_text("half")
        raise problem
    assert raised.value is problem
    assert (path.read_text(), names(tmp_path)) == ("before", ["file.json"])
    with pytest.raises(FileNotFoundError), write_aside(path):
        pass  # nothing was written
    assert (path.read_text(), names(tmp_path)) == ("before", ["file.json"])


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    killed = write_aside(path)
    killed.__enter__().write_text("much longer than what follows")  # and its end never comes
    assert len(names(tmp_path)) == 1 and not path.exists()
    with write_aside(path) as aside:
        aside.write_text("short")
    assert (path.read_text(), names(tmp_path)) == ("short", ["file.json"])


def test_writers_at_the_same_time_leave_one_of_their_files_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.json"

    def write(number: int) -> None:
        with write_aside(path, concurrent=True) as aside, aside.open("w") as file:
            for _ in range(50):
                file.write(f"{number:03d}" * 100)
                file.flush()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(64)))
    text = path.read_text()
    assert (len(text), len(set(zip(*[iter(text)] * 3, strict=True))), names(tmp_path)) == (15_000, 1, ["file.json"])


@pytest.mark.parametrize("fsync", [False, True])
@pytest.mark.parametrize("text", ["before", None])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path, text: str | None, fsync: bool) -> None:
    (tmp_path / "there").mkdir()
    link, file = tmp_path / "link.json", tmp_path / "there" / "file.json"
    link.symlink_to(file)
    if text is not None:
        file.write_text(text)
    with write_aside(link, fsync=fsync) as aside:
        aside.write_text("after")
        assert aside.parent == file.parent.resolve()
    assert (os.readlink(link), file.read_text(), names(file.parent)) == (str(file), "after", ["file.json"])
    with write_aside(link, follow_symlinks=False) as aside:  # as in a folder where another may have laid the link
        aside.write_text("itself")
    assert (link.is_symlink(), link.read_text(), file.read_text()) == (False, "itself", "after")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_written_into_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with write_aside(pipe, fsync=True, concurrent=True) as aside, aside.open("w") as file:
            file.write("through")
        assert (os.read(reader, 100), pipe.is_fifo(), names(tmp_path)) == (b"through", True, ["pipe"])
    finally:
        os.close(reader)
    with write_aside(pipe, follow_symlinks=False) as aside:
        aside.write_text("instead")
    assert (pipe.read_text(), names(tmp_path)) == ("instead", ["pipe"])


def test_errors_name_the_path_that_was_asked_for(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "file.json", tmp_path):
        with pytest.raises(OSError, match=re.escape(f": {str(path)!r}") + "$") as raised, write_aside(path, concurrent=True) as aside:
            aside.write_text("text")
        assert raised.value.filename2 is None
    with pytest.raises(FileNotFoundError) as raised, write_aside(tmp_path / "file.json") as aside:  # noqa: PT012
        aside.write_text("text")
        aside.unlink()  # as another process that writes the same would
    assert raised.value.filename == str(aside)


def test_a_synced_file_is_on_the_disk_before_its_name_and_the_name_before_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def counted_fsync(handle: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def counted_replace(old: Path, new: Path) -> None:
        steps.append("name")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", counted_fsync)
    monkeypatch.setattr(os, "replace", counted_replace)
    for fsynced, expected in ((True, ["file", "name", "folder"]), (False, ["name"])):
        steps.clear()
        with write_aside(tmp_path / "file.json", fsync=fsynced) as aside:
            aside.write_text("text")
        assert steps == expected


def test_one_function_puts_files_in_the_place_of_others() -> None:
    calls = {
        path.relative_to(ROOT).as_posix()
        for folder in ("kernels", "pipeline", "train", "tools")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "os.replace"
    }
    assert calls == {"pipeline/files.py"}
