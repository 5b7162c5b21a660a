"""The watcher of the interpreter's lock: what holds it is counted, what gives it back, or waits for it, is not.

Compared with: code of which it is known. Where Python has no shared libpython, that is said.
"""

import sysconfig
from pathlib import Path

import pytest

from wherefrom.tools.bench_loader.interpreter_held import interpreter_held_s, run_watched

CALLS = """
import hashlib, threading, time
from wherefrom.tools.bench_loader.interpreter_held import interpreter_held_s

def cost(call):
    cpu_s, held_s = time.process_time(), interpreter_held_s()
    call()
    held_s = interpreter_held_s() - held_s
    return held_s / (time.process_time() - cpu_s)

def count():
    sum(range(4_000_000))
    time.sleep(0)  # what a thread held is counted when it gives the lock back by itself

def count_in_two():
    threads = [threading.Thread(target=count) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()

print(cost(count), cost(count_in_two), cost(lambda: hashlib.sha256(bytes(50_000_000)).digest()))
"""


@pytest.mark.core
@pytest.mark.skipif(not sysconfig.get_config_var("Py_ENABLE_SHARED"), reason="this Python has no shared libpython")
def test_what_holds_the_lock_is_counted_and_what_gives_it_back_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "calls.py").write_text(CALLS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    alone, in_two, hashing = map(float, run_watched("calls").split())
    assert 0.9 < alone < 1.1 and 0.9 < in_two < 1.1
    assert hashing < 0.2


@pytest.mark.core
def test_a_process_that_nobody_watches_says_so() -> None:
    with pytest.raises(OSError, match="nobody watches the interpreter's lock"):
        interpreter_held_s()
