"""The CPU view kernel's C code as a guest in its process: it reads and writes nothing outside, loses no memory, and lets Python go on.

AddressSanitizer, UBSan and Valgrind watch native/fuzz_render_views.c and native/fuzz_decode_region.c, ThreadSanitizer
native/race_thread_pool.c, which say what else must hold; each does one thing wrong on request, and the very build that passes must see it.
"""

import ctypes
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Thread
from time import perf_counter, sleep
from typing import NoReturn

import numpy as np
import pytest
import torch
from jpeg_files import RESTARTS, SAMPLINGS, jpeg_of, kinds, picture_of

from wherefrom.kernels.render_views import ViewPlan, ViewRequest, native_missing

ROOT = Path(__file__).resolve().parents[1]
COMMON = ["-std=gnu11", "-g1", "-Wno-psabi", "-Werror=incompatible-pointer-types", "-ffp-contract=fast", "-pthread"]
SANITIZED = ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
SCARCE = [f"-D{name}=scarce_{name}" for name in ("malloc", "calloc", "aligned_alloc", "pthread_create")]  # the fuzzer's own, which can fail
LIBRARIES = ["-lm", *(["-ldl"] if sys.platform == "linux" else [])]
PROBE = "typedef float f __attribute__((vector_size(16))); f g(f a) { return __builtin_shufflevector(a, a, 0, 4, 1, 5); } int main(void) {}"


def skip_aloud(reason: str) -> NoReturn:
    warnings.warn(reason, stacklevel=2)
    pytest.skip(reason)


def c_compiler(folder: Path, flags: Sequence[str]) -> str:
    """Return a compiler that builds the likes of the kernel with these flags, or skip."""
    probe = folder / "probe.c"
    probe.write_text(PROBE)
    for name in ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found and subprocess.run([found, *flags, probe, "-o", folder / "probe"], capture_output=True, check=False).returncode == 0:
            return found
    skip_aloud(f"no compiler takes {' '.join(flags)}: memory safety of the CPU view kernel is not tested here")


def build_fuzzer(folder: Path, flags: Sequence[str]) -> Path:
    compiler = c_compiler(folder, flags)
    kernel, fuzzer = folder / "core.o", folder / "fuzz_render_views"
    for arguments in (
        [*SCARCE, "-c", ROOT / "kernels" / "render_views_core.c", "-o", kernel],
        ["-I", ROOT / "kernels", ROOT / "tests" / "native" / "fuzz_render_views.c", kernel, "-o", fuzzer, "-lm"],
    ):
        done = subprocess.run([compiler, *flags, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return fuzzer


@pytest.fixture(scope="module")
def sanitized_fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fuzzer(tmp_path_factory.mktemp("sanitized"), [*COMMON, *SANITIZED])


@pytest.fixture(scope="module")
def watched_fuzzer(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """The fuzzer as a user's compiler makes it, for Valgrind to watch."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        skip_aloud("no valgrind: the CPU view kernel is not watched reading what it never wrote")
    fuzzer = build_fuzzer(tmp_path_factory.mktemp("plain"), [*COMMON, "-O2"])
    return [valgrind, "--quiet", "--error-exitcode=9", "--leak-check=full", fuzzer]


def fuzz(
    command: Sequence[str | Path], *, span: str, seed: int, sets: str = "all", plant: str = "nothing"
) -> subprocess.CompletedProcess[str]:
    """Run the fuzzer for a span: "400cases", whatever else the machine does, or "60s"."""
    return subprocess.run([*command, span, str(seed), sets, "0", plant], capture_output=True, text=True, check=False)


def assert_clean(done: subprocess.CompletedProcess[str]) -> None:
    """The fuzzer ended well, and every kind of case that it counts was there, for every instruction set that it was to use."""
    assert done.returncode == 0 and not done.stderr, f"{done.stdout}{done.stderr}"
    numbers = [int(number) for number in re.findall(r"(\d+) (?:cases|rendered|refused|with|short)", done.stdout)]
    assert len(numbers) >= 5 and all(numbers), done.stdout
    assert "rendered by baseline," in done.stdout


@pytest.mark.parametrize("span", ["4000cases", pytest.param("60s", marks=pytest.mark.slow), pytest.param("600s", marks=pytest.mark.slow)])
def test_hostile_batches_touch_nothing_outside(sanitized_fuzzer: Path, span: str, capsys: pytest.CaptureFixture[str]) -> None:
    seed = int.from_bytes(os.urandom(4)) if span != "4000cases" else 1  # a long run looks for new cases; a failure names its seed
    done = fuzz([sanitized_fuzzer], span=span, seed=seed)
    assert_clean(done)
    with capsys.disabled():
        print(f"\n{done.stdout.strip()}, seed {seed}")


@pytest.mark.parametrize(
    ("plant", "seen"),
    [
        ("overread", r"AddressSanitizer: heap-buffer-overflow[\s\S]*READ of size[\s\S]* in wf_render_picture"),
        ("overrun", r"AddressSanitizer: (heap-buffer-overflow|unknown-crash)[\s\S]*WRITE of size[\s\S]* in wf_render_picture"),
        ("overflow", "runtime error: signed integer overflow"),
        pytest.param(
            "leak", "LeakSanitizer: detected memory leaks", marks=pytest.mark.skipif(sys.platform != "linux", reason="no LeakSanitizer")
        ),
        ("unwritten", "byte 0 of family . is not written"),
        ("unequal", "byte .* of family . is .* and then"),
        ("moved", "family . of a part of picture . is not that of the whole"),
        ("out-of-range", "is -?nan, outside"),
        ("misjudged", "a sane batch is accepted"),
    ],
)
def test_what_is_done_wrong_is_seen(sanitized_fuzzer: Path, plant: str, seen: str) -> None:
    done = fuzz([sanitized_fuzzer], span="200cases", seed=1, plant=plant)
    assert done.returncode != 0
    assert re.search(seen, done.stderr), done.stderr
    assert plant == "overflow" or re.search(r"case \d+ of seed 1\n", done.stderr), "the case can be run again"


def test_no_unwritten_memory_is_read(watched_fuzzer: list[str | Path]) -> None:
    # Valgrind knows no AVX-512, and says so to the kernel
    assert_clean(fuzz(watched_fuzzer, span="120cases", seed=1, sets="baseline,avx2"))


@pytest.mark.parametrize(("plant", "seen"), [("overrun", "Invalid write"), ("unset", "depends on uninitialised value")])
def test_what_is_done_wrong_is_seen_by_valgrind(watched_fuzzer: list[str | Path], plant: str, seen: str) -> None:
    done = fuzz(watched_fuzzer, span="40cases", seed=1, sets="baseline", plant=plant)
    assert done.returncode == 9 and seen in done.stderr, done.stderr


def test_a_fuzzer_that_shows_nothing_fails(sanitized_fuzzer: Path) -> None:
    done = fuzz([sanitized_fuzzer], span="1cases", seed=1, sets="none")
    assert done.returncode == 2 and "this processor has none of these instruction sets" in done.stderr


@pytest.mark.parametrize("span", ["", "60", "cases", "60hours"])
def test_a_span_without_a_unit_is_refused(sanitized_fuzzer: Path, span: str) -> None:
    done = fuzz([sanitized_fuzzer], span=span, seed=1)
    assert done.returncode == 2 and done.stderr.startswith(f"{span}: no span; give seconds")


def build_race(folder: Path, flags: Sequence[str]) -> Path:
    """Build what uses a pool of threads from several callers at once."""
    compiler, flags = c_compiler(folder, flags), [*COMMON, *flags]
    pool, core, race = folder / "pool.o", folder / "core.o", folder / "race_thread_pool"
    for arguments in (
        [*SCARCE, "-c", ROOT / "kernels" / "thread_pool.c", "-o", pool],
        ["-c", ROOT / "kernels" / "render_views_core.c", "-o", core],
        ["-I", ROOT / "kernels", ROOT / "tests" / "native" / "race_thread_pool.c", pool, core, "-o", race, "-lm"],
    ):
        done = subprocess.run([compiler, *flags, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return race


def run_race(race: Path, rounds: int, plant: str = "nothing") -> subprocess.CompletedProcess[str]:
    return subprocess.run([race, str(rounds), "1", plant], capture_output=True, text=True, check=False)


RACE_BUILDS = {"thread": ["-O1", "-fsanitize=thread"], "address": ["-O0", "-fsanitize=address"], "forks": ["-O1", "-DFORKS"]}


@pytest.fixture(scope="module", params=RACE_BUILDS)
def race(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, build_race(tmp_path_factory.mktemp(request.param), RACE_BUILDS[request.param])


@pytest.mark.parametrize("rounds", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_callers_share_a_pool_of_threads_and_each_item_is_done_once(race: tuple[str, Path], rounds: int) -> None:
    done = run_race(race[1], rounds)
    assert done.returncode == 0 and not done.stderr, f"{done.stdout}{done.stderr}"


def test_what_is_done_wrong_with_a_pool_is_seen(race: tuple[str, Path]) -> None:
    build, program = race
    plant, seen = {"thread": ("race", "ThreadSanitizer: data race"), "address": ("leak", "LeakSanitizer: detected memory leaks")}.get(
        build, ("idle", "seed 1: a job is done of which items are not")
    )
    if plant == "leak" and sys.platform != "linux":
        pytest.skip("no LeakSanitizer")
    done = run_race(program, 20, plant)
    assert done.returncode != 0 and seen in done.stderr, done.stderr


SANITIZED_MODULE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("wherefrom.kernels._native", EXTENSION)
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

def pytest_report_header():
    return f"the kernel is {sys.modules[spec.name].__file__}"
"""


@pytest.fixture(scope="module")
def sanitized_python(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A sanitized build of the Python module, and the environment in which pytest with `-p sanitized_module` uses it."""
    folder = tmp_path_factory.mktemp("sanitized-module")
    flags = [*COMMON, *SANITIZED, "-fPIC", "-shared"]
    compiler = c_compiler(folder, flags)
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False).stdout.strip()
    headers = Path(sysconfig.get_path("include"))
    if not Path(runtime).is_absolute() or not (headers / "Python.h").is_file():
        skip_aloud("no libasan.so to load first, or no Python.h: the kernel's tests are not run under AddressSanitizer")
    extension = folder / "_native.abi3.so"
    sources = sorted((ROOT / "kernels").glob("*.c"))
    command = [compiler, *flags, "-I", headers, *sources, "-o", extension, *LIBRARIES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "sanitized_module.py").write_text(SANITIZED_MODULE.replace("EXTENSION", repr(str(extension))))
    # Python itself leaks; the fuzzer is watched for leaks
    return extension, os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(folder)}


@pytest.mark.slow
def test_the_kernels_own_tests_pass_under_the_sanitizers(sanitized_python: tuple[Path, dict[str, str]]) -> None:
    extension, environment = sanitized_python
    command = [sys.executable, "-P", "-m", "pytest", "-n", "0", "-p", "sanitized_module", "-p", "no:cacheprovider"]
    command += ["tests/test_render_views.py", "tests/test_jpeg_parts.py", "tests/test_jpeg_threads.py", "tests/test_read_parts.py"]
    command += ["-k", "not forked"]  # the sanitizer's own memory does not live through that
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert f"the kernel is {extension}" in done.stdout
    assert re.search(r"\d\d passed", done.stdout) and "skipped" not in done.stdout


@pytest.mark.slow
def test_sanitized_python_sees_an_overrun(sanitized_python: tuple[Path, dict[str, str]]) -> None:
    overrun = "import ctypes, torch; x = torch.zeros(8, dtype=torch.uint8); ctypes.memset(x.data_ptr(), 0, 9)"
    done = subprocess.run([sys.executable, "-c", overrun], env=sanitized_python[1], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]


def build_jpeg_fuzzer(folder: Path, flags: Sequence[str]) -> Path:
    program, sources = (
        folder / "fuzz_decode_region",
        [ROOT / "tests" / "native" / "fuzz_decode_region.c", ROOT / "kernels" / "decode_region.c"],
    )
    command = [c_compiler(folder, flags), *flags, "-I", ROOT / "kernels", *sources, "-o", program, *LIBRARIES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def jpeg_fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_jpeg_fuzzer(tmp_path_factory.mktemp("sanitized-jpeg"), [*COMMON, *SANITIZED])


@pytest.fixture(scope="module")
def jpeg_arguments(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str | Path]]:
    """Pillow's libjpeg as a file of its own, which a program without Python can open, and files to decode."""
    maps = Path("/proc/self/maps")
    mapped = sorted(set(re.findall(r"/\S*libjpeg\S*", maps.read_text()))) if maps.exists() else []
    if not mapped:
        skip_aloud("Pillow's libjpeg is not found as a file of its own: decoding of parts is not fuzzed here")
    libjpeg = next((path for path in mapped if Path(path).parent.name == "pillow.libs"), mapped[0])
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(8)
    files = {f"{sampling}-{restart}": (sampling, restart) for sampling in SAMPLINGS for restart in (0, 2)}
    paths = []
    for name, (sampling, restart) in files.items():
        if restart and sampling not in (*RESTARTS, "Gray"):
            continue
        height, width = rng.integers(20, 90, 2).tolist()
        paths.append(folder / f"{height}x{width}-{name}.jpg")
        paths[-1].write_bytes(jpeg_of(picture_of(rng, height, width), sampling, restart=restart))
    for name in ("progressive", "inks"):
        paths.append(folder / f"150x170-{name}.jpg")
        paths[-1].write_bytes(kinds(rng)[name])
    return lambda span, seed=1, plant="nothing": [libjpeg, span, str(seed), plant, *paths]


@pytest.mark.parametrize("span", ["3000cases", pytest.param("60s", marks=pytest.mark.slow), pytest.param("600s", marks=pytest.mark.slow)])
def test_damaged_jpegs_touch_nothing_outside(
    jpeg_fuzzer: Path, jpeg_arguments: Callable[..., list[str | Path]], span: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int.from_bytes(os.urandom(4)) if span != "3000cases" else 1
    done = subprocess.run([jpeg_fuzzer, *jpeg_arguments(span, seed)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, f"{done.stdout}{done.stderr}, seed {seed}"
    with capsys.disabled():
        print(f"\n{done.stdout.strip()}, seed {seed}")


@pytest.mark.parametrize(
    ("plant", "seen"),
    [
        ("unequal", "a part is not that of the whole"),
        ("overrun", "it writes past its memory"),
        pytest.param(
            "leak", "LeakSanitizer: detected memory leaks", marks=pytest.mark.skipif(sys.platform != "linux", reason="no LeakSanitizer")
        ),
    ],
)
def test_what_is_done_wrong_with_a_jpeg_is_seen(
    jpeg_fuzzer: Path, jpeg_arguments: Callable[..., list[str | Path]], plant: str, seen: str
) -> None:
    command = [jpeg_fuzzer, *jpeg_arguments("200cases", plant=plant)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and seen in done.stderr, done.stderr


@pytest.mark.slow
def test_a_decoder_of_parts_reads_and_shows_no_unwritten_memory(tmp_path: Path, jpeg_arguments: Callable[..., list[str | Path]]) -> None:
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        skip_aloud("no valgrind: decoding of parts is not watched reading what was never written")
    program = build_jpeg_fuzzer(tmp_path, [*COMMON, "-O1"])
    command = [valgrind, "--quiet", "--error-exitcode=9", "--leak-check=full", program, *jpeg_arguments("300cases")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_structures_declared_for_libjpeg_are_those_of_its_header(tmp_path: Path) -> None:
    names = "err client_data src image_width image_height jpeg_color_space out_color_space output_width output_components output_scanline"
    types = {  # in libjpeg's header, and in the kernel: what jpeg_decompress_struct is there, and what else it points to
        "#include <jpeglib.h>": ("struct jpeg_decompress_struct", "struct jpeg_error_mgr", "struct jpeg_source_mgr"),
        f'#include "{ROOT / "kernels" / "decode_region.c"}"': ("decompress", "error_manager", "source_manager"),
    }
    shown = []
    for number, (header, (main, *others)) in enumerate(types.items()):
        source, program = tmp_path / f"{number}.c", tmp_path / f"layout{number}"
        sizes = [f"offsetof({main}, {name})" for name in names.split()] + [f"sizeof({other})" for other in others]
        prints = " ".join(f'printf("%zu ", {size});' for size in sizes)
        source.write_text(f"#include <stddef.h>\n#include <stdio.h>\n{header}\nint main(void) {{ {prints} }}\n")
        command = [c_compiler(tmp_path, COMMON), *COMMON, "-I", ROOT / "kernels", source, "-o", program, *LIBRARIES]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if number == 0 and done.returncode != 0:
            pytest.skip("libjpeg's header is not on this machine")
        assert done.returncode == 0, done.stderr
        shown.append(subprocess.run([program], capture_output=True, text=True, check=True).stdout)
    assert shown[0] == shown[1] and len(shown[0].split()) == 12


RECORD = {  # of one upright picture's one view, in the order of the module's argument
    "boxes": struct.pack("4f", 0, 0, 1, 1),
    "flipped": bytes(1),
    "quarter_turns": bytes(8),
    "matrix": bytes(48),
    "blur_sigma_px": bytes(4),
    "solarized": bytes(1),
}


@pytest.mark.core
@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("name", [*RECORD, "orientation", "out"])
def test_a_buffer_of_another_size_is_refused(name: str, by: int) -> None:
    native = pytest.importorskip("wherefrom.kernels._native", reason="the CPU view kernel is not built")

    def plan(given: dict[str, bytes]) -> object:
        *record, orientation, out = given.values()
        family = (1, 2, 3, "uint8", False, False, *record, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), bytearray(out))
        return native.Plan(1, orientation, (family,), "baseline")

    right = RECORD | {"orientation": b"\1", "out": bytes(2 * 3 * 3)}
    plan(right)
    size = len(right[name])
    with pytest.raises(ValueError, match=f"{name} has {size + by} bytes, expected {size}"):
        plan(right | {name: (right[name] + b"\0")[: size + by]})


def longest_stop(call: Callable[[], object]) -> float:
    """Return the longest time in which this thread stood still while another made the call, as a share of the call's time."""
    span: list[float] = []

    def work() -> None:
        span.append(perf_counter())
        call()
        span.append(perf_counter())

    thread = Thread(target=work)
    thread.start()
    ticks: list[float] = []
    while thread.is_alive():
        ticks.append(perf_counter())
        sleep(0.001)
    start, end = span
    during = [start, *(tick for tick in ticks if start < tick < end), end]
    return max(later - earlier for earlier, later in pairwise(during)) / (end - start)


@pytest.mark.core
@pytest.mark.parametrize("one_by_one", [False, True], ids=["render_all", "render_picture"])
def test_python_goes_on_while_views_are_rendered(one_by_one: bool) -> None:
    if native_missing() is not None:
        pytest.skip("the CPU view kernel is not built")
    pictures = [torch.randint(0, 256, (1200, 1200, 3), dtype=torch.uint8)] * (1 if one_by_one else 4)
    shape = (len(pictures), 96 // len(pictures))
    request = ViewRequest(
        boxes=torch.tensor([0.0, 0, 1200, 1200]).expand(*shape, 4),
        flipped=torch.zeros(shape, dtype=torch.bool),
        quarter_turns=torch.zeros(shape, dtype=torch.int64),
        out=torch.empty(*shape, 3, 224, 224),
    )
    plan = ViewPlan([request])
    picture = pictures[0].numpy()
    call = partial(plan.render_picture, 0, picture) if one_by_one else partial(plan.render_all, pictures)
    assert min(longest_stop(call) for _ in range(3)) < 0.5  # the least of three: others may hold the processor, too


@pytest.mark.core
def test_a_call_that_holds_the_interpreter_stops_python() -> None:
    # one of three: between the first look at the clock and the call, others may hold the processor
    assert any(longest_stop(partial(ctypes.PyDLL(None).usleep, 300_000)) > 0.9 for _ in range(3))
