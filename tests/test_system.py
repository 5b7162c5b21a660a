"""The user's cache folder against each system's own custom, and what is said where it cannot be."""

import threading
from pathlib import Path

import pytest
import torch

from wherefrom.pipeline import system
from wherefrom.pipeline.system import available_cores, cores_of_rank, local_world_size, single_threaded_pool, user_cache_folder

pytestmark = pytest.mark.core

HOME = Path.home()


@pytest.mark.parametrize(
    ("environment", "platform", "expected"),
    [
        ({}, "linux", HOME / ".cache" / "wherefrom"),
        ({"XDG_CACHE_HOME": "/big/disk"}, "linux", Path("/big/disk/wherefrom")),
        ({"XDG_CACHE_HOME": "relative/is/ignored"}, "linux", HOME / ".cache" / "wherefrom"),
        ({"XDG_CACHE_HOME": ""}, "linux", HOME / ".cache" / "wherefrom"),
        ({"XDG_CACHE_HOME": "/big/disk"}, "darwin", HOME / "Library" / "Caches" / "wherefrom"),
        ({"LOCALAPPDATA": "/local"}, "win32", Path("/local/wherefrom")),
        ({}, "win32", HOME / "AppData" / "Local" / "wherefrom"),
        ({"XDG_CACHE_HOME": "/big/disk", "WHEREFROM_CACHE": "/mine"}, "linux", Path("/mine")),
        ({"WHEREFROM_CACHE": "~/mine"}, "darwin", HOME / "mine"),
    ],
)
def test_cache_lies_where_the_system_keeps_caches(environment: dict[str, str], platform: str, expected: Path) -> None:
    assert system._customary_folder(environment, platform) == expected


def test_cache_folder_is_made_and_left_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHEREFROM_CACHE", str(tmp_path / "deep" / "cache"))
    folder = user_cache_folder()
    assert folder == tmp_path / "deep" / "cache"
    assert not list(folder.iterdir())


@pytest.mark.parametrize("beneath", [".", "cache"])
def test_unusable_cache_is_one_line_with_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beneath: str) -> None:
    file = tmp_path / "file"
    file.write_text("a file, not a folder")
    monkeypatch.setenv("WHEREFROM_CACHE", str(file / beneath))
    with pytest.raises(
        OSError, match=r"^cache folder .*file.* cannot be written \(.+\); set WHEREFROM_CACHE to a folder that can$"
    ) as caught:
        user_cache_folder()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (16.0, 8), (3.5, 4), (0.2, 1)])
def test_no_more_cores_are_used_than_a_container_gives(quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "allowed_cores", lambda: 8)
    monkeypatch.setattr(system, "cpu_quota", lambda: quota)
    assert available_cores() == cores


@pytest.mark.parametrize(("ranks", "share"), [(None, 8), ("1", 8), ("3", 2), ("8", 1), ("20", 1)])
def test_ranks_of_one_machine_share_its_cores(ranks: str | None, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "allowed_cores", lambda: 8)
    monkeypatch.setattr(system, "cpu_quota", lambda: None)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert (cores_of_rank(), local_world_size(), available_cores()) == (share, int(ranks or 1), 8)


@pytest.mark.parametrize("text", ["", "0", "-2", "two", "1.5"])
def test_a_count_of_ranks_that_is_none_is_one_line(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    with pytest.raises(ValueError, match=f"^LOCAL_WORLD_SIZE={text!r}: needs a whole number of at least 1.*$"):
        cores_of_rank()


def test_a_pool_of_ours_leaves_the_threads_of_others_as_they_were() -> None:
    counted: list[int] = []
    theirs = threading.Thread(target=lambda: counted.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with single_threaded_pool(2, "ours") as pool:
            assert list(pool.map(lambda _: torch.get_num_threads(), range(8))) == [1] * 8
        theirs.start()  # after ours: it begins with what PyTorch noted last
        theirs.join()
        assert (counted, torch.get_num_threads()) == ([3], 3)
    finally:
        torch.set_num_threads(before)


def test_a_pool_that_the_system_does_not_start_whole_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    barriers: list[threading.Barrier] = []
    made, start, started = threading.Barrier, threading.Thread.start, []

    def noted(parties: int) -> threading.Barrier:
        barriers.append(made(parties))
        return barriers[-1]

    def starts_two(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading, "Barrier", noted)
    monkeypatch.setattr(threading.Thread, "start", starts_two)
    try:
        with pytest.raises(OSError, match=r"^ours: the system starts 2 of 4 threads \(can't start new thread\); set threads= to fewer.*$"):
            single_threaded_pool(4, "ours")
        for thread in started:
            thread.join(20)
        assert not any(thread.is_alive() for thread in started)
    finally:
        for barrier in barriers:
            barrier.abort()  # else the threads of a pool that waits would keep this process
