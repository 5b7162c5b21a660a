"""Packing that is killed by SIGKILL, at random and wherever it touches a file, and started again: as if it had run through, byte for byte.

The processes are forks of one that has imported everything, so that they die in their work and not before it. After each death no shard is
half under its own name, and what says that all are there is not there too early.
"""

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def source(tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shard of 60 pictures."""
    monkeypatch.setenv("WHEREFROM_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    pictures = [jpeg_bytes(rng.integers(0, 256, (24 + n % 20, 30, 3), np.uint8)) for n in range(60)]
    return make_shard(tmp_path / "source.tar", [(str(n), {"jpg": picture, "cls": b"%d" % (n % 5)}) for n, picture in enumerate(pictures)])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


DRIVER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from wherefrom.pipeline import PackSettings, pack

source, through, out, mode, *rest = sys.argv[1:]
settings = PackSettings(samples=int(rest[-1]), short_side_px=20, shuffle=4)

def run(folder):
    pack(source, folder, settings=settings, workers=2)

def child(prepare, folder):
    process = os.fork()
    if process:
        return process
    try:
        prepare()
        run(folder)
        os._exit(0)
    except BaseException as problem:
        print("child:", repr(problem), file=sys.stderr)
        os._exit(1)

def ended(process):
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL or os.waitstatus_to_exitcode(status) == 0, status
    shown = {path.name: path.read_bytes() for path in Path(out).glob("*.*") if path.name[0] != "."}
    whole = {path.name: path.read_bytes() for path in Path(through).glob("*.*") if path.name[0] != "."}
    assert all(content == whole[name] for name, content in shown.items()), "half a file"
    assert "_info.json" not in shown or shown == whole, "complete too early"
    return not os.WIFSIGNALED(status)

begun = time.monotonic()
assert ended(child(lambda: None, through))
whole = time.monotonic() - begun
kills = 0
if mode == "random":
    chance = random.Random(int(rest[0]))
    while kills < int(rest[1]):
        process = child(lambda: None, out)
        time.sleep(chance.uniform(0, whole))
        os.kill(process, signal.SIGKILL)
        if ended(process):  # it was through before
            shutil.rmtree(out, ignore_errors=True)
        else:
            kills += 1
else:  # at every n-th touch of a file, n = 1, 2, ...
    def die_at(number):
        left = [number]
        def hook(event, arguments):
            if event in ("open", "os.rename", "os.remove", "os.mkdir") and out in str(arguments[0]):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
    while not ended(child(lambda: die_at(kills + 1), out)):
        kills += 1
        assert kills < 1000
ended(child(lambda: None, out))
print(kills)
"""


def kill_and_go_on(source: Path, tmp_path: Path, *mode: str) -> int:
    """Pack in processes that are killed by SIGKILL and started again; compare with one that ran through; return how many were killed."""
    through, out = tmp_path / "through" / "out", tmp_path / "killed" / "out"
    command = [sys.executable, "-c", DRIVER, str(source), str(through), str(out), *mode]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert files_of(out) == files_of(through)
    assert len([path for path in files_of(out) if path.endswith(".tar")]) == 60 // int(mode[-1])
    assert not [path for path in out.rglob("*.writing") if ".wherefrom" not in path.parts]
    return int(done.stdout.split()[-1])


@pytest.mark.core
def test_killed_at_random_moments_and_started_again_it_is_as_if_it_ran_through(source: Path, tmp_path: Path) -> None:
    assert kill_and_go_on(source, tmp_path, "random", "0", "6", "5") == 6


@pytest.mark.slow
def test_killed_at_thirty_random_moments_and_started_again_it_is_as_if_it_ran_through(source: Path, tmp_path: Path) -> None:
    assert kill_and_go_on(source, tmp_path, "random", str(random.SystemRandom().randrange(2**32)), "30", "5") == 30


def test_killed_wherever_it_touches_a_file_and_started_again_it_is_as_if_it_ran_through(source: Path, tmp_path: Path) -> None:
    assert kill_and_go_on(source, tmp_path, "touches", "20") > 20
