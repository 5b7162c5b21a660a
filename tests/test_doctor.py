"""`wherefrom doctor` against planted faults: in processes that really have them where that can be had, else by injected readings.

Every fault has to be named by its own line, with a mend that says what to do, and healthy neighbors have to stay good.
"""

import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from wherefrom.kernels.dispatch import interpreted, triton_missing
from wherefrom.kernels.render_views import native_missing, open_jpeg
from wherefrom.pipeline.render import jpeg_parts
from wherefrom.pipeline.render.choose import RENDERERS
from wherefrom.pipeline.render.dali_decode import dali_missing
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.system import cpu_quota
from wherefrom.tools import doctor, machine_findings, software_findings, system_limits
from wherefrom.tools.cli import main
from wherefrom.tools.findings import Asked, Finding, print_finding, summary
from wherefrom.tools.machine_findings import judge_limits, judge_speed, look_at_caches, look_at_data
from wherefrom.tools.software_findings import judge_absent_gpu, look_at_kernels, look_at_renderers
from wherefrom.tools.system_limits import ReadSpeed, SystemLimits, memory_limit, read_limits, read_speed

pytestmark = pytest.mark.core
native_only = pytest.mark.skipif(native_missing() is not None, reason=str(native_missing()))

NO_LIMITS = SystemLimits(
    cores_seen=8,
    cores_allowed=8,
    quota_cores=None,
    memory_bytes=64 * 10**9,
    memory_available_bytes=60 * 10**9,
    memory_limit_bytes=None,
    shared_bytes=32 * 10**9,
    shared_free_bytes=32 * 10**9,
    open_files=65536,
    open_files_at_most=65536,
)


def by_name(findings: Iterator[Finding] | list[Finding]) -> dict[str, Finding]:
    named = {finding.name: finding for finding in findings}
    assert all(finding.text and "\n" not in finding.text + finding.mend for finding in named.values())
    assert [finding for finding in named.values() if finding.mark in ("mend", "FAILS") and not finding.mend] == []
    return named


def doctored(plant: str, *words: str, environment: Mapping[str, str | None]) -> tuple[int, dict[str, Finding]]:
    """Run `wherefrom doctor WORDS --json` in a process in which a plant, Python code, has run first; return exit code and findings."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET" and name not in environment}
    changed = inherited | {"OMP_NUM_THREADS": "1"} | {name: value for name, value in environment.items() if value is not None}
    code = f"{plant}\nimport sys\nfrom wherefrom.tools.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "doctor", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=changed)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    assert told["exit_code"] == done.returncode
    assert "Traceback" not in done.stderr
    return done.returncode, by_name([Finding(**finding) for finding in told["findings"]])


# planted really, in a process each


def test_a_poor_machine_is_told_what_is_poor_about_it(tmp_path: Path) -> None:
    """One core, few open files, no compiler, no cache, no DALI, no data: six faults that do not hide one another."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "file").write_text("a file, no folder")
    plant = "import os, resource, sys\nresource.setrlimit(resource.RLIMIT_NOFILE, (128, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
    plant += "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nsys.modules['nvidia.dali'] = None"
    environment = {"PATH": str(tmp_path / "bin"), "CC": None, "WHEREFROM_CACHE": str(tmp_path / "file" / "cache")}
    code, findings = doctored(plant, "--renderer", "dali", "--data", str(tmp_path / "trian.tar"), environment=environment)
    assert code == 1
    assert {name for name, finding in findings.items() if finding.mark == "FAILS"} == {"renderer dali", "data"}
    assert findings["renderer dali"][2:] == ("NVIDIA DALI is not installed", "pip install nvidia-dali-cuda130")
    assert "trian.tar: no such file" in findings["data"].text
    assert findings["data"].mend.startswith("fetch it, or name a shard")
    assert "reader alone keeps 256 shards open" in findings["open files"].text and findings["open files"].mend.startswith("ulimit -n ")
    assert findings["cache"].mark == "mend" and "cannot be written" in findings["cache"].text
    assert findings["cache"].mend == "set WHEREFROM_CACHE to a folder that can"
    assert findings["C compiler"].text.startswith("none: neither gcc nor clang is on the PATH")
    assert "gcc" in findings["C compiler"].mend
    assert findings["Triton"].mark == ("mend" if torch.cuda.is_available() else "absent")
    if (os.cpu_count() or 1) > 1:
        assert findings["cores"].mark == "mend" and findings["cores"].text.startswith(f"1 of {os.cpu_count()} are allowed")
        assert "taskset" in findings["cores"].mend
    assert findings["renderer torch"].mark == "good" and findings["GPU"].mark in ("good", "absent")


def write_metadata(folder: Path, name: str, version: str, needs: str = "") -> None:
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *([f"Requires-Dist: {needs}"] if needs else [])]
    (metadata / "METADATA").write_text("\n".join(lines) + "\n")


@native_only
def test_ill_software_is_named_library_by_library(tmp_path: Path) -> None:
    """torchvision of another torch, an old simplejpeg, no Triton, a compiled kernel of an older wherefrom, CUDA asked for and hidden."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    write_metadata(tmp_path, "torchvision", "0.24.0", "torch (==2.9.0)")
    write_metadata(tmp_path, "simplejpeg", "1.7.2")
    plant = "import sys, types, wherefrom.kernels._native as new\nsys.modules['triton'] = None\nold = types.ModuleType(new.__name__)\n"
    plant += "vars(old).update(vars(new))\ndel old.open_jpeg\nsys.modules[new.__name__] = old"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "WHEREFROM_CACHE": str(tmp_path / "cache")}
    code, findings = doctored(plant, "--device", "cuda", environment=environment)
    assert code == 1
    assert {name for name, finding in findings.items() if finding.mark == "FAILS"} == {"torchvision", "GPU"}
    assert findings["torch"].text == f"is {torch.__version__.partition('+')[0]}, torchvision 0.24.0 needs ==2.9.0"
    assert findings["torch"].mend.startswith("pip install --upgrade torchvision torch, both at once")
    assert findings["torchvision"].text == "does not load: operator torchvision::nms does not exist"
    assert findings["torchvision"].mend.startswith("pip install --force-reinstall torch torchvision, both at once")
    assert findings["simplejpeg"][2:] == ("is 1.7.2, wherefrom needs >=1.8", "pip install 'simplejpeg>=1.8'")
    assert "numpy" in findings["libraries"].text and not {"simplejpeg", "torch"} & set(findings["libraries"].text.split())
    assert findings["Triton"].mark == "mend" and findings["Triton"].text.endswith("Triton is not installed")
    assert findings["view kernel"].text.endswith("the CPU view kernel is of an older wherefrom, it has no open_jpeg")
    assert findings["view kernel"].mend.startswith("pip install ")
    assert findings["region decoding"].text.endswith("it has no open_jpeg")
    assert findings["GPU"].mend
    assert findings["renderer native"].mark == "good"


def test_where_torch_does_not_load_that_is_what_is_said(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    code, findings = doctored("", environment={"PYTHONPATH": str(tmp_path)})
    assert code == 1 and findings["torch"].mark == "FAILS"
    assert findings["torch"].text == "does not load: libcudart.so.13: cannot open shared object file"
    assert list(findings)[-1] == "all the rest" and findings["libraries"].mark == "good"


def test_a_part_of_ours_that_does_not_load_is_mended_by_an_install() -> None:
    assert software_findings.load_fault("wherefrom.pipeline") is None
    finding = software_findings.load_fault("wherefrom.no_such_part")
    assert finding is not None and finding.mark == "FAILS" and finding.mend.startswith("pip install wherefrom again")


# planted here


@pytest.fixture
def parts_forgotten() -> Iterator[None]:
    jpeg_parts._open.cache_clear()
    yield
    jpeg_parts._open.cache_clear()


def test_a_kernel_that_was_not_built_is_told_with_what_builds_it(monkeypatch: pytest.MonkeyPatch, parts_forgotten: None) -> None:
    monkeypatch.setitem(sys.modules, "wherefrom.kernels._native", None)
    kernels, renderers = by_name(look_at_kernels(Asked())), by_name(look_at_renderers(Asked(device="cpu")))
    assert kernels["view kernel"].text == "views are cut more slowly: the CPU view kernel was not built with this wherefrom"
    assert kernels["view kernel"].mend == "pip install it from source with gcc 12 or clang there"
    assert kernels["region decoding"].mark == "absent"
    assert renderers["renderer native"].mark == "mend" and renderers["renderer torch"].text.startswith("serves on cpu")
    assert by_name(look_at_renderers(Asked(renderer="native")))["renderer native"].mark == "FAILS"


@native_only
def test_a_kernel_older_than_its_source_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sys.modules["wherefrom.kernels._native"]
    copy = ModuleType(real.__name__)
    vars(copy).update(vars(real) | {"__file__": str(tmp_path / "kernels" / "_native.so")})
    (tmp_path / "kernels").mkdir()
    for name, written_s in (("_native.so", 2000), ("a.h", 1000), ("b.c", 3000)):
        (tmp_path / "kernels" / name).touch()
        os.utime(tmp_path / "kernels" / name, (written_s, written_s))
    monkeypatch.setitem(sys.modules, real.__name__, copy)
    assert by_name(look_at_kernels(Asked()))["view kernel"].text.endswith("_native.so is older than its source, b.c")
    os.utime(tmp_path / "kernels" / "b.c", (1000, 1000))
    assert by_name(look_at_kernels(Asked()))["view kernel"].mark == "good"


@native_only
def test_a_pillow_without_its_libjpeg_is_told(monkeypatch: pytest.MonkeyPatch, parts_forgotten: None) -> None:
    monkeypatch.setattr(jpeg_parts, "open_jpeg", lambda _: open_jpeg("there/is/no/such.so"))
    finding = by_name(look_at_kernels(Asked()))["region decoding"]
    assert finding.mark == "mend" and finding.text.startswith(
        "pictures are decoded whole: Pillow's libjpeg does not serve (no shared object"
    )
    assert finding.mend.startswith("pip install --force-reinstall pillow")


def test_a_compiler_that_is_named_and_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    finding = by_name(look_at_kernels(Asked()))["C compiler"]
    assert finding.mark == "mend" and finding.text.startswith("CC=no-such-compiler names no program")


@pytest.mark.parametrize(("interpret", "mark"), [("1", "mend"), ("0", "good")])
def test_an_interpreter_that_was_left_switched_on_is_told_where_a_gpu_is_meant(
    interpret: str, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if triton_missing():
        pytest.skip(str(triton_missing()))
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    finding = by_name(look_at_kernels(Asked(device="cuda")))["Triton"]
    assert finding.mark == mark and ("unset TRITON_INTERPRET" in finding.mend) == (mark == "mend")
    assert by_name(look_at_kernels(Asked()))["Triton"].mark == "good" or torch.cuda.is_available()


def test_a_kernel_of_triton_is_tried() -> None:
    if triton_missing() or not interpreted():
        pytest.skip("it would be compiled for a GPU")
    assert software_findings._triton(torch.device("cpu")).text.endswith("a tiny kernel runs on cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_renderer_for_gpus_fails_where_it_is_asked_for_without_one() -> None:
    finding = by_name(look_at_renderers(Asked(renderer="triton")))["renderer triton"]
    assert finding.mark == "FAILS" and finding.mend
    assert by_name(look_at_renderers(Asked()))["renderer triton"].mark == "absent"


def test_a_renderer_that_shows_another_picture_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software_findings, "PROBE_ERROR", -1)
    finding = by_name(look_at_renderers(Asked(renderer="torch")))["renderer torch"]
    assert finding[:3] == ("FAILS", "renderer torch", "it shows another picture than it was given")


@pytest.mark.skipif(dali_missing() is not None, reason="DALI is not installed")
def test_a_renderer_that_serves_has_rendered_a_picture() -> None:
    assert by_name(look_at_renderers(Asked(renderer="dali", device="cpu")))["renderer dali"].text.endswith("(as asked), rendered a picture")


def test_a_renderer_of_a_package_that_does_not_import_is_told(install: Callable[..., None]) -> None:
    install("their-renderers", {RENDERERS.group: {"ink": "there_is_no_such:ENTRY"}})
    for asked, mark in ((Asked(), "mend"), (Asked(renderer="ink"), "FAILS")):
        finding = by_name(look_at_renderers(asked))["renderer ink"]
        assert finding.mark == mark and "cannot be imported" in finding.text and finding.mend == "mend or uninstall it"


@pytest.mark.parametrize(
    ("built_for", "driver", "visible", "text", "mend"),
    [
        (None, "580.1", None, "torch is built without CUDA", "torch built for CUDA"),
        ("13.0", "580.1", "", "CUDA_VISIBLE_DEVICES='' hides it", "unset CUDA_VISIBLE_DEVICES"),
        ("13.0", "520.2", "0", "built for CUDA 13.0, sees none under driver 520.2: too old", "update the driver"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told_apart(
    built_for: str | None, driver: str, visible: str | None, text: str, mend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for device, mark in (("auto", "mend"), ("cuda", "FAILS")):
        finding = judge_absent_gpu(Asked(device=device), built_for=built_for, driver=driver, told="too old")  # type: ignore[arg-type]
        assert finding.mark == mark and text in finding.text and mend in finding.mend


def test_without_a_driver_a_gpu_is_absent_unless_it_is_asked_for() -> None:
    assert judge_absent_gpu(Asked(), built_for="13.0", driver=None).mark == "absent"
    asked = judge_absent_gpu(Asked(device="cuda"), built_for=None, driver=None)
    assert asked.mark == "FAILS" and asked.text.endswith("and torch is built without CUDA") and "--device cpu" in asked.mend


def test_a_gpu_that_computes_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", refuse)
    assert [finding.mark for finding in software_findings.look_at_gpu(Asked(device="cpu"))] == ["mend"]
    (finding,) = software_findings.look_at_gpu(Asked())
    assert finding.mark == "FAILS" and finding.text.endswith("no kernel image is available for execution on the device")


# the system


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "400000 100000"}, 4),
        ({"proc/self/cgroup": "0::/not/seen/from/here\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        ({"proc/self/cgroup": "0::/../..\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "5:memory:/m\n3:cpu,cpuacct:/docker/x\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({}, None),
    ],
)
def test_the_quota_of_a_cgroup_is_read_of_either_version(files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    plant(tmp_path, files)
    assert cpu_quota(tmp_path) == quota


def plant(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("file", "text", "limit"),
    [
        ("sys/fs/cgroup/memory.max", "1000000\n", 1_000_000),
        ("sys/fs/cgroup/memory.max", "max\n", None),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "1000000\n", 1_000_000),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n", None),
    ],
)
def test_the_memory_of_a_cgroup_is_read_of_either_version(file: str, text: str, limit: int | None, tmp_path: Path) -> None:
    meminfo = "MemTotal:        8000000 kB\nMemAvailable:    5000000 kB\nHugePages_Total: 0\n"
    plant(tmp_path, {"proc/self/cgroup": "4:memory:/gone\n0::/\n", "proc/meminfo": meminfo, file: text})
    assert memory_limit(tmp_path) == limit
    assert read_limits(tmp_path).memory_available_bytes == 5_000_000 * 1024


def test_limits_of_this_process_are_its_own() -> None:
    limits = read_limits()
    assert 1 <= limits.cores_allowed == len(os.sched_getaffinity(0)) and limits.cores_seen == os.cpu_count()
    assert limits.memory_bytes is None or limits.memory_bytes > 2**28


POOR = {  # what is changed -> the finding's name, what it says, what mends it
    "quota": ({"quota_cores": 1.5}, "cores", "8, all allowed, but the cgroup gives the time of 1.5", "OMP_NUM_THREADS=2 where a"),
    "one core": ({"cores_allowed": 1}, "cores", "1 of 8 are allowed: this process is bound to one core", "taskset"),
    "little memory": ({"memory_available_bytes": 10**9}, "memory", "64 GB, 1 GB of it free", "lower --global-batch"),
    "memory of a cgroup": ({"memory_limit_bytes": 10**9}, "memory", "but the cgroup allows 1 GB", "docker run --memory"),
    "docker's shared memory": (
        {"shared_bytes": 64 * 2**20, "shared_free_bytes": 64 * 2**20},
        "shared memory",
        "/dev/shm has 67.1 MB, 67.1 MB of it free; workers and GPUs hand over through it",
        "docker run --shm-size 8g",
    ),
    "full shared memory": ({"shared_free_bytes": 0}, "shared memory", "32 GB, 0 B of it free", "remove old files"),
    "few open files": ({"open_files": 256}, "open files", "at most 256 at once", "ulimit -n 65536"),
    "never more open files": ({"open_files": 256, "open_files_at_most": 256}, "open files", "at most 256", "docker run --ulimit"),
}


@pytest.mark.parametrize("case", POOR)
def test_what_the_system_withholds_is_told_and_nothing_else(case: str) -> None:
    change, name, text, mend = POOR[case]
    findings = by_name(judge_limits(replace(NO_LIMITS, **change)))  # type: ignore[arg-type]
    assert [finding.name for finding in findings.values() if finding.mark == "mend"] == [name]
    assert text in findings[name].text and mend in findings[name].mend


def test_a_machine_without_limits_is_good() -> None:
    assert {finding.mark for finding in judge_limits(NO_LIMITS)} == {"good"}
    assert {finding.mark for finding in judge_limits(replace(NO_LIMITS, cores_allowed=4, quota_cores=4.0))} == {"good"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_cache_folder_that_is_closed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    monkeypatch.setenv("WHEREFROM_CACHE", str(tmp_path / "cache"))
    assert by_name(look_at_caches(Asked()))["cache"].mark == "mend"


def test_caches_are_told_with_place_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHEREFROM_CACHE", str(tmp_path))
    plant(tmp_path, {"indexes/a.index": "x" * 1500})
    finding = by_name(look_at_caches(Asked()))["cache"]
    assert finding.mark == "good" and finding.text.startswith(f"{tmp_path}: 1.5 KB, ")
    monkeypatch.setattr(machine_findings, "LEAST_DISK_BYTES", 10**18)
    assert "WHEREFROM_CACHE" in by_name(look_at_caches(Asked()))["cache"].mend


# the data


@pytest.fixture
def shards(make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two tars, and a cache of its own beside it."""
    monkeypatch.setenv("WHEREFROM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in "ab":
        picture = jpeg_bytes(np.full((40, 48, 3), 90, np.uint8))
        make_shard(folder / f"{name}.tar", [(f"{name}{number}", {"jpg": picture}) for number in range(3)])
    return folder


def data_findings(data: Path, **asked: Any) -> dict[str, Finding]:
    return by_name(look_at_data(Asked(data=str(data), **asked)))


def test_an_index_is_told_missing_there_stale_and_with_verdicts_and_nothing_is_built(shards: Path) -> None:
    before = sorted(shards.rglob("*"))
    missing = data_findings(shards)["index"]
    assert missing[:3] == ("mend", "index", "2 of 2 shards have none yet")
    assert missing.mend.startswith(f"wherefrom index '{shards}'")
    assert sorted(shards.rglob("*")) == before

    ShardIndex.open(shards)
    there = data_findings(shards)
    assert there["index"][:3] == ("good", "index", f"6 pictures in 2 shards, up to date in {shards / '.wherefrom'}")
    assert there["verdicts"].mark == "mend" and there["verdicts"].mend.startswith(f"wherefrom index '{shards}' --decode")
    assert data_findings(shards, labels="json.label")["index"].mend.startswith(f"wherefrom index '{shards}' --labels json.label")

    ShardIndex.open(shards, decode=True)
    assert data_findings(shards)["verdicts"].mark == "good"

    os.utime(shards / "a.tar", (1, 1))
    stale = data_findings(shards)["index"]
    assert stale[:3] == ("mend", "index", "1 of 2 shards have one that no longer fits")


def test_an_index_of_loose_pictures_is_told_too(tmp_path: Path, jpeg_bytes: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHEREFROM_CACHE", str(tmp_path / "cache"))
    for name in ("cat/1.jpg", "dog/2.jpg"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True)
        (tmp_path / "tree" / name).write_bytes(jpeg_bytes(np.zeros((16, 16, 3), np.uint8)))
    for folder in ("tree/cat", "tree/dog", "tree"):
        os.utime(tmp_path / folder, (10**9, 10**9))
    assert data_findings(tmp_path / "tree")["index"].text == "1 of 1 shards have none yet"
    ShardIndex.open(tmp_path / "tree")
    findings = data_findings(tmp_path / "tree")
    assert findings["index"].text.startswith("2 pictures in 1 shards, up to date")
    assert "2 files of the data in order" in findings["disk"].text
    os.utime(tmp_path / "tree" / "cat", (10**9 + 1, 10**9 + 1))
    assert data_findings(tmp_path / "tree")["index"].text == "1 of 1 shards have one that no longer fits"


def test_data_without_a_valid_picture_fails(shards: Path, make_shard: Callable[..., Path]) -> None:
    make_shard(shards / "b.tar", [("x", {"jpg": b"\xff\xd8 no picture"})])
    ShardIndex.open(shards)
    assert "1 of them damaged and replaced" in data_findings(shards)["index"].text
    ShardIndex.open(shards / "b.tar")
    assert data_findings(shards / "b.tar")["index"].mark == "FAILS"


def test_data_that_cannot_be_read_fails(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> ReadSpeed:
        raise OSError(5, "Input/output error", "a.tar")

    monkeypatch.setattr(machine_findings, "read_speed", refuse)
    assert data_findings(shards)["data"].mark == "FAILS"


def test_labels_that_are_no_rule_fail_in_a_line(shards: Path) -> None:
    findings = by_name(doctor._looked_at("data", look_at_data, Asked(data=str(shards), labels="")))
    assert findings["data"].mark == "FAILS" and findings["data"].text.startswith("cannot be looked at: ")


@pytest.mark.parametrize(
    ("speed", "mark", "words"),
    [
        (
            ReadSpeed(bytes=10**8, files=1, seconds=0.1, cold=True),
            "good",
            "1 GB/s, one file of the data in order, cold: enough for 20",
        ),
        (
            ReadSpeed(bytes=10**7, files=1, seconds=1, cold=True),
            "mend",
            "10 MB/s, one file of the data in order, cold: enough for 0.2",
        ),
        (ReadSpeed(bytes=10**7, files=1, seconds=1, cold=None), "mend", "cold or not, which this disk does not tell"),
        (ReadSpeed(bytes=10**7, files=1, seconds=1, cold=False), "good", "from memory"),
        (ReadSpeed(bytes=10**7, files=100, seconds=1, cold=True), "mend", "100 files"),
        (ReadSpeed(bytes=0, files=0, seconds=0, cold=None), "absent", "nothing to read"),
    ],
)
def test_a_disk_is_judged_by_what_the_cores_take(speed: ReadSpeed, mark: str, words: str) -> None:
    finding = judge_speed(speed, of_data=True)
    assert finding.mark == mark and words in finding.text
    assert ("wherefrom pack" in finding.mend) == (speed.files == 100)
    assert judge_speed(speed, of_data=False).mark in ("good", "absent")


def test_a_short_read_stops_at_its_bounds(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(bytes(3000))
    files = sorted(tmp_path.iterdir())
    assert (read_speed(files).bytes, read_speed(files).files) == (9000, 3)
    assert (read_speed(files, most_bytes=4000).bytes, read_speed(files, most_bytes=4000).files) == (4000, 2)
    assert read_speed(files, seconds=0).bytes == 0
    with pytest.raises(OSError, match="not a regular file"):
        read_speed([tmp_path])


@pytest.mark.parametrize(
    ("held", "cold"),
    [
        ([False, True], True),  # before and after the read
        ([True, True], False),
        ([False, False], None),  # a system that never says that it holds anything
        ([None, None], None),
        ([False, True, True, True], False),
        ([False, True, None, None], None),
    ],
)
def test_a_read_is_cold_only_where_the_system_says_so(
    held: list[bool | None], cold: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter(held)
    monkeypatch.setattr(system_limits, "_is_held", lambda _: next(told))
    files = [tmp_path / str(number) for number in range(len(held) // 2)]
    for file in files:
        file.write_bytes(b"x")
    assert read_speed(files).cold is cold


# how it is said


def test_lines_keep_to_eighty_columns_wherever_they_go() -> None:
    finding = Finding("mend", "shared memory", "words " * 30, "a mend of many words " * 10)
    for terminal, width in ((False, 300), (True, 300), (True, 60)):
        stream = io.StringIO()
        print_finding(Console(file=stream, force_terminal=terminal, width=width, color_system=None), finding)
        lines = stream.getvalue().splitlines()
        assert len(lines) > 6 and max(map(len, lines)) <= min(width, 80)
        assert lines[0].startswith("mend    shared memory    words") and sum("-> a mend" in line for line in lines) == 1


def test_marks_are_colored_on_a_terminal_unless_nobody_wants_color(monkeypatch: pytest.MonkeyPatch) -> None:
    def printed() -> str:
        stream = io.StringIO()
        print_finding(Console(file=stream, force_terminal=True, width=80, color_system="standard"), Finding("mend", "cores", "few", "more"))
        return stream.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[33mmend\x1b[0m" in printed()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in printed()


def test_the_last_line_names_what_fails_and_what_is_to_be_mended() -> None:
    good, mend, fails = Finding("good", "a", "x"), Finding("mend", "b", "x", "y"), Finding("FAILS", "c", "x", "y")
    assert summary([good]) == "all that was asked for works"
    assert summary([good, mend]) == "all that was asked for works; to mend: b"
    assert summary([good, mend, fails]) == "FAILS: c; to mend: b"


def test_a_look_that_fails_is_a_line_among_others() -> None:
    def look(_: Asked) -> Iterator[Finding]:
        yield Finding("good", "first", "x")
        warnings.warn("not shown", UserWarning, stacklevel=1)
        raise RuntimeError("it broke\nand more")

    for asked, mark in ((Asked(), "mend"), (Asked(renderer="torch"), "FAILS")):
        with doctor._quiet():
            findings = list(doctor._looked_at("renderers", look, asked))
        assert findings == [Finding("good", "first", "x"), Finding(mark, "renderers", "cannot be looked at: it broke", "mend that first")]  # type: ignore[arg-type]


def test_a_healthy_machine_gets_good_lines_and_exit_code_0(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ShardIndex.open(shards, decode=True)
    assert main(["doctor", "--data", str(shards), "--device", "cpu", "--renderer", "torch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if not line.startswith(" ")} <= {"good", "absent", "mend", "all"}
    assert lines[-1].startswith("all that was asked for works")
    assert [line for line in lines if len(line) > 80 and str(shards) not in line and len(max(line.split(), key=len)) < 40] == []


def test_a_renderer_that_is_misspelled_is_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--renderer", "dalli"]) == 2
    assert "did you mean 'dali'" in capsys.readouterr().err
