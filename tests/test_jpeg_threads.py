"""The native renderer's own threads: the views of the caller's thread alone, whoever shares them, in a fork too; and how they end.

What goes on among them, without Python, and that none of it is a race: test_native_safety.py.
"""

import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from jpeg_files import SAMPLINGS, Bytes, by_pillow, jpeg_of, picture_of
from torch import Tensor

from wherefrom.kernels.render_views import JpegThreads
from wherefrom.pipeline.laws import Independent
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.render.jpeg_parts import part_decoder
from wherefrom.pipeline.render.native_cutter import NativeCutter
from wherefrom.pipeline.render.renderer import view_shapes
from wherefrom.pipeline.render.threads import ThreadedRenderer
from wherefrom.pipeline.view_recipe import ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Record

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(part_decoder() is None, reason="no parts of JPEGs are decoded here, so that there is nothing to share"),
]

LAW = Independent(area_frac=(0.02, 0.3))
RECIPE = ViewRecipe(
    families=(ViewFamily(name="views", views=3, size_px=(40, 31), law=LAW, mirror="view", snap="none", min_side_px=1),), pixels="float32"
)
SIZE = (90, 120)
COUNT = 20


def files_of(seed: int = 0, *, with_wholes: bool = False) -> list[Bytes]:
    """JPEGs that are decoded in part; with_wholes: but for one that is progressive."""
    rng = np.random.default_rng(seed)
    files = [jpeg_of(picture_of(rng, *SIZE), SAMPLINGS[number % len(SAMPLINGS)]) for number in range(COUNT)]
    if with_wholes:
        files[7] = by_pillow(picture_of(rng, *SIZE), progressive=True)
    return [np.frombuffer(file, np.uint8) for file in files]


def records_of(count: int, seed: int = 0) -> Sequence[Record]:
    sizes, upright = np.full((count, 2), SIZE, np.int32), np.ones(count, np.uint8)
    return draw_records(RECIPE, seed=seed, epoch=0, drawn_for=np.arange(count), source_size=sizes, stored_orientation=upright)


def render(renderer: ThreadedRenderer, files: Sequence[Bytes], seed: int = 0) -> Tensor:
    """Render all but every ninth picture as one that is known to decode; return a copy of the views."""
    rendered = renderer.render(files, records_of(len(files), seed), np.arange(len(files)) % 9 > 0)
    assert rendered.failed == {}
    return rendered.pixels[0].clone()


def by_the_caller(files: Sequence[Bytes], seed: int = 0) -> Tensor:
    return render(ThreadedRenderer(NativeCutter(RECIPE), threads=0), files, seed)


def own_threads() -> int:
    """Count the threads of this process that are not Python's."""
    return [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")].count("wherefrom-views")


linux = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_makers_that_share_the_threads_get_the_views_of_the_callers_thread_alone(threads: int) -> None:
    batches = [files_of(seed, with_wholes=seed % 2 > 0) for seed in range(6)]
    expected = [by_the_caller(files, seed) for seed, files in enumerate(batches)]
    renderer = ThreadedRenderer(NativeCutter(RECIPE), threads=threads)
    with ThreadPoolExecutor(4) as makers:
        for _ in range(5):
            views = list(makers.map(lambda seed: render(renderer, batches[seed], seed), range(6)))
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(views, expected, strict=True))
    renderer.close()


def test_no_thread_of_python_wakes_where_no_picture_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer, files = ThreadedRenderer(NativeCutter(RECIPE), threads=2), files_of()
    woken: list[Callable[..., object]] = []
    pool = renderer._pool.get()  # type: ignore[union-attr]
    submit = pool.submit
    monkeypatch.setattr(pool, "submit", lambda work: (woken.append(work), submit(work))[1])
    rendered = renderer.render(files, records_of(COUNT), np.ones(COUNT, bool))
    assert not woken and rendered.decode_s > 0 and rendered.render_s > 0
    renderer.render(files, records_of(COUNT), np.arange(COUNT) > 0)
    assert len(woken) == 1  # for the one picture that nobody decoded before
    renderer.close()


@linux
def test_threads_are_made_for_the_first_batch_and_gone_when_closed_or_dropped() -> None:
    for end in ("closed", "dropped"):
        renderer = ThreadedRenderer(NativeCutter(RECIPE), threads=3)
        assert own_threads() == 0
        for _ in range(3):
            render(renderer, files_of())
            assert own_threads() == 3
        if end == "closed":
            renderer.close()
        else:
            del renderer
            gc.collect()
        assert own_threads() == 0


@linux
def test_signals_are_left_to_the_threads_of_the_program() -> None:
    renderer = ThreadedRenderer(NativeCutter(RECIPE), threads=2)
    render(renderer, files_of())
    blocked = []
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == "wherefrom-views":
            status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
            blocked.append(int(status["SigBlk"], 16))
    mine = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    renderer.close()
    assert len(blocked) == 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD):
        assert number not in mine and all(mask >> (number - 1) & 1 for mask in blocked)


FORK = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from test_jpeg_threads import NativeCutter, RECIPE, ThreadedRenderer, by_the_caller, files_of, own_threads, render
signal.alarm(100)
torch.set_num_threads(1)
files = files_of(with_wholes=True)
expected = by_the_caller(files)
renderer = ThreadedRenderer(NativeCutter(RECIPE), threads=2)
for used_before in (False, True):
    child = os.fork()
    if not child:
        signal.alarm(60)
        right = all(torch.equal(render(renderer, files), expected) for _ in range(3))
        grandchild = os.fork()
        if not grandchild:
            signal.alarm(30)
            right = torch.equal(render(renderer, files), expected)
            del renderer  # not closed
            os._exit(0 if right and own_threads() == 0 else 1)
        right &= os.waitpid(grandchild, 0)[1] == 0 and torch.equal(render(renderer, files), expected)
        renderer.close()
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(render(renderer, files), expected)
renderer.close()
child = os.fork()
if not child:
    signal.alarm(30)
    renderer.close()
    try:
        render(renderer, files)
    except ValueError as error:
        os._exit(0 if "closed" in str(error) else 1)
    os._exit(1)
assert os.waitpid(child, 0)[1] == 0
"""


@linux
def test_a_forked_process_makes_threads_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", FORK, str(Path(__file__).parent)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_who_waits_while_the_renderer_is_closed_gets_the_views_or_an_error() -> None:
    files, expected = files_of(), by_the_caller(files_of())
    for _ in range(5):
        renderer, rendered, ends = ThreadedRenderer(NativeCutter(RECIPE), threads=2), threading.Semaphore(0), []

        def make(renderer: ThreadedRenderer = renderer, rendered: threading.Semaphore = rendered, ends: list[str] = ends) -> None:
            try:
                while True:
                    views = renderer.render(files, records_of(COUNT), np.ones(COUNT, bool)).pixels[0]
                    assert torch.equal(views, expected)
                    rendered.release()
            except ValueError as error:
                ends.append(str(error))

        makers = [threading.Thread(target=make, daemon=True) for _ in range(3)]
        for maker in makers:
            maker.start()
        for _ in range(4):
            assert rendered.acquire(timeout=60)
        closers = [threading.Thread(target=renderer.close) for _ in range(2)]
        for closer in closers:
            closer.start()
        for thread in (*closers, *makers):
            thread.join(timeout=60)
            assert not thread.is_alive()
        assert ends == ["the threads are closed; make others"] * 3


def test_closed_threads_are_an_error_of_one_line_and_close_again() -> None:
    cutter, files = NativeCutter(RECIPE), files_of()
    threads = JpegThreads(2)
    plan = cutter.plan(records_of(COUNT), [torch.empty(shape) for shape in view_shapes(RECIPE, COUNT)])
    for _ in range(2):
        threads.close()
    held = [sys.getrefcount(file) for file in files]
    with pytest.raises(ValueError, match=r"^the threads are closed; make others$"):
        cutter.cut_jpegs(plan, files, np.full((COUNT, 2), SIZE, np.int32), np.ones(COUNT, bool), threads)
    assert [sys.getrefcount(file) for file in files] == held


@pytest.mark.parametrize("count", [0, -1, 2**20])
def test_a_number_of_threads_that_cannot_be_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"^threads={count}: needs 1 to 4096$"):
        JpegThreads(count)


def test_a_batch_of_no_pictures_or_of_none_asked_for_is_rendered() -> None:
    cutter, threads = NativeCutter(RECIPE), JpegThreads(2)
    for count in (0, 3):
        plan = cutter.plan(records_of(count), [torch.empty(shape) for shape in view_shapes(RECIPE, count)])
        files = files_of()[:count]
        assert cutter.cut_jpegs(plan, files, np.full((count, 2), SIZE, np.int32), np.zeros(count, bool), threads) == ([], 0.0, 0.0)
    threads.close()


def test_files_are_let_go_of_when_the_batch_is_done_or_refused() -> None:
    cutter, files, threads = NativeCutter(RECIPE), files_of(with_wholes=True), JpegThreads(2)
    plan = cutter.plan(records_of(COUNT), [torch.empty(shape) for shape in view_shapes(RECIPE, COUNT)])
    sizes, asked = np.full((COUNT, 2), SIZE, np.int32), np.ones(COUNT, bool)
    kept = [*files, sizes, asked]
    held = [sys.getrefcount(one) for one in kept]
    for _ in range(3):
        assert cutter.cut_jpegs(plan, files, sizes, asked, threads)[0] == [7]
        with pytest.raises(ValueError, match="19 files for the records of 20"):
            cutter.cut_jpegs(plan, files[:-1], sizes, asked, threads)
        with pytest.raises(TypeError):
            cutter.cut_jpegs(plan, [*files[:-1], None], sizes, asked, threads)  # type: ignore[list-item]
    threads.close()
    assert [sys.getrefcount(one) for one in kept] == held
