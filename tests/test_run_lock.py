"""One process at a time writes into a run's folder: locks are taken for real, by this process, by threads, and by one that is killed."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from wherefrom.train.run_folder import refuse_if_taken
from wherefrom.train.run_lock import LOCK, locked


@pytest.mark.core
def test_a_held_folder_is_refused_by_host_and_process_and_free_again_afterwards(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path):
            complaint = rf"process {os.getpid()} on {socket.gethostname()} is writing this run; wait"
            with pytest.raises(ValueError, match=complaint) as refused, locked(tmp_path):
                raise AssertionError("two hold it")
            assert "\n" not in str(refused.value)
        assert list(tmp_path.iterdir()) == []


def test_what_a_kill_leaves_of_a_first_write_does_not_take_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".settings.yaml.writing").write_text("rec")
    refuse_if_taken(tmp_path)
    (tmp_path / ".notes").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        refuse_if_taken(tmp_path)


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path: Path) -> None:
    imports = "import sys\nfrom pathlib import Path\nfrom wherefrom.train.run_lock import locked\n"
    holds = imports + "with locked(Path(sys.argv[1])): print('held'), input()"
    other = subprocess.Popen([sys.executable, "-uc", holds, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=f"process {other.pid} on "), locked(tmp_path):
        pass
    other.kill()
    other.communicate()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"{socket.gethostname()} {os.getpid()}\n"


def test_of_threads_that_take_and_give_back_at_once_never_two_hold_the_lock(tmp_path: Path) -> None:
    inside, most, taken = [0], [0], [0]

    def work() -> None:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            try:
                with locked(tmp_path):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    taken[0] += 1
                    time.sleep(0.0002)
                    inside[0] -= 1
            except ValueError:
                time.sleep(0.0001)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, taken > [10]) == ([1], True)


def test_where_the_file_system_knows_no_locks_the_words_in_the_file_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuses)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = socket.gethostname()
    for no_owner in ("", f"{here} {gone.pid}\n", "torn"):
        (tmp_path / LOCK).write_text(no_owner)
        with locked(tmp_path):
            pass
    for live_owner in (f"{here} {os.getpid()}", f"{here} 1", f"another-{here} {gone.pid}"):
        (tmp_path / LOCK).write_text(live_owner)
        with pytest.raises(ValueError, match=r"is writing this run; .*delete .*\.lock if that run has ended"), locked(tmp_path):
            pass
        assert (tmp_path / LOCK).read_text() == live_owner
