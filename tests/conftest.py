"""Fixtures shared by the tests: where the real photographs are, and small pictures and shards made on the spot."""

import importlib
import io
import os
import shutil
import sys
import tarfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

# Read by libgomp when torch is imported, here and in every process that a test starts: its threads spin at each barrier by
# default, so that where another process holds a core every small parallel region waits for a whole time slice.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # a process of pytest for every core: each computes by one thread
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

if not torch.cuda.is_available():  # the kernels themselves run on CPU tensors then; read by Triton when it is first imported
    os.environ["TRITON_INTERPRET"] = "1"

# a busy machine is not a fault; where a run is to be repeated, every example is the same again
hypothesis.settings.register_profile(
    "ours", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], derandomize="CI" in os.environ
)
hypothesis.settings.load_profile("ours")

NO_PHOTOGRAPHS = "no photographs; point WHEREFROM_TEST_DATA at a folder with imagenet-sample/"


@pytest.hookimpl(optionalhook=True)  # a lent machine lacks pytest-xdist
def pytest_xdist_auto_num_workers() -> int:
    """Run the tests by a process a core, but by no more than there is memory for on a large machine: each imports torch."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def photographs_folder() -> Path | None:
    """Return the folder of real photographs, or None: $WHEREFROM_TEST_DATA, else shared/data beside the repository."""
    named = os.environ.get("WHEREFROM_TEST_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if (folder / "imagenet-sample").is_dir() else None


@pytest.fixture
def photographs() -> Path:
    """The folder that holds imagenet-sample/ and imagenette/; skips, counted, where there is none."""
    folder = photographs_folder()
    if folder is None:
        pytest.skip(NO_PHOTOGRAPHS)
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say aloud how many tests did not run because the photographs are missing."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NO_PHOTOGRAPHS in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests need real photographs and were skipped; set WHEREFROM_TEST_DATA")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `cpu_renderer` or `cutter` with every renderer of ours that renders or cuts on the CPU, by name."""
    for argument in {"cpu_renderer", "cutter"} & set(metafunc.fixturenames):
        from wherefrom.pipeline.render.choose import RENDERERS, renderer_entry  # not above: kernels are tested where no pipeline can be

        entries = {name: renderer_entry(name) for name in RENDERERS.own}
        serving = {name: entry for name, entry in entries.items() if (entry.cutter if argument == "cutter" else "cpu" in entry.devices)}
        skips = {name: pytest.mark.skipif(entry.missing() is not None, reason=f"{entry.missing()}") for name, entry in serving.items()}
        metafunc.parametrize(argument, [pytest.param(name, marks=skip) for name, skip in skips.items()])


def write_shard(path: Path, samples: Sequence[tuple[str, Mapping[str, bytes]]]) -> Path:
    """Write a tar at `path` whose members are `key.extension` for every (key, {extension: bytes}), in that order; return `path`."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for extension, content in members.items():
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    return path


def encode_jpeg(array: NDArray[np.uint8], quality: int = 95, exif_orientation: int = 1) -> bytes:
    """Encode (H, W) or (H, W, 3) uint8 as a JPEG without chroma subsampling; orientation 1 writes no EXIF at all."""
    exif = Image.Exif()
    exif[0x0112] = exif_orientation
    encoded = io.BytesIO()
    tags = exif.tobytes() if exif_orientation != 1 else b""
    Image.fromarray(array).save(encoded, "JPEG", quality=quality, subsampling=0, exif=tags)
    return encoded.getvalue()


@pytest.fixture
def make_shard() -> Callable[..., Path]:
    """`make_shard(path, [(key, {"jpg": bytes, "cls": b"3"}), ...]) -> path` writes a tar shard."""
    return write_shard


@pytest.fixture
def jpeg_bytes() -> Callable[..., bytes]:
    """`jpeg_bytes(array, quality=95, exif_orientation=1) -> bytes` encodes a small picture."""
    return encode_jpeg


def write_metadata(site: Path, name: str, version: str, entries: Mapping[str, Mapping[str, str]]) -> None:
    """Write into a folder what pip would leave there of a package with these entry points, by group, in place of what is there of it."""
    metadata = site / f"{name.replace('-', '_')}-{version}.dist-info"
    shutil.rmtree(metadata, ignore_errors=True)
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = (f"[{group}]\n" + "".join(f"{entry} = {value}\n" for entry, value in points.items()) for group, points in entries.items())
    (metadata / "entry_points.txt").write_text("\n".join(groups))
    importlib.invalidate_caches()


@pytest.fixture
def install(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`install("their-laws", {"wherefrom.laws": {"ring": "their_laws:Ring"}}, version="1.5", modules=folder)`: a package, as pip leaves it.

    Its metadata and the folder of its modules come to the head of the path; modules imported from there are forgotten afterwards.
    """
    folders: list[Path] = []

    def put(name: str, entries: Mapping[str, Mapping[str, str]], *, version: str = "1.5", modules: Path | None = None) -> None:
        site = tmp_path_factory.mktemp("site")
        write_metadata(site, name, version, entries)
        for folder in (site,) if modules is None else (site, modules):
            monkeypatch.syspath_prepend(str(folder))
            folders.append(folder)

    yield put
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is not None and Path(file).parent in folders:
            del sys.modules[name]


def smooth_picture(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Return a picture of soft blobs, (H, W, 3): something to look at in every part, and small as a JPEG."""
    small = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.tar (40 labeled pictures) and val.tar (16)."""
    folder = tmp_path_factory.mktemp("tiny-shards")
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("val", 16)):
        pictures = [smooth_picture(rng, int(rng.integers(64, 96)), int(rng.integers(64, 96))) for _ in range(count)]
        write_shard(
            folder / f"{name}.tar",
            [(f"{name}{i:03d}", {"jpg": encode_jpeg(picture), "cls": str(i % 4).encode()}) for i, picture in enumerate(pictures)],
        )
    return folder


@pytest.fixture
def declare() -> Callable[[Path, Path], None]:
    """`declare(pyproject, site)` writes into `site`, which is on the path, the metadata of a package that is not installed."""

    def write(pyproject: Path, site: Path) -> None:
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        write_metadata(site, project["name"], project["version"], project.get("entry-points", {}))

    return write
