"""What is shipped, as setuptools packs it: an archive that can be built elsewhere, and a wheel that is honest about what it holds.

The wheel with the CPU view kernel in it is built, and both are imported, by .ci/run.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE", "kernels", "pipeline", "train", "tools")


@pytest.fixture
def without_compiler(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """A source archive and a wheel in tmp_path/packed, made from a fresh copy where there is no C compiler."""
    pytest.importorskip("setuptools", minversion="77", reason="pip would fetch the setuptools that pyproject.toml asks for")
    source = tmp_path / "source"
    source.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, source)
    pack = "import sys; from setuptools import build_meta as b; to = sys.argv[1]; b.build_sdist(to); b.build_wheel(to)"
    environment = os.environ | {"CC": str(tmp_path / "no-compiler")}
    command = [sys.executable, "-c", pack, tmp_path / "packed"]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.core
def test_without_a_compiler_the_archive_is_whole_and_the_wheel_holds_every_python_file_and_table_and_no_more(
    without_compiler: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    (archive,) = (tmp_path / "packed").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        archived = {name.partition("/")[2] for name in tar.getnames()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "kernels").glob("*.[ch]")} | {"setup.py"} <= archived

    (wheel,) = (tmp_path / "packed").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = {name for name in packed.namelist() if ".dist-info/" not in name}
    sources = {path for folder in ("kernels", "pipeline", "train", "tools") for path in (ROOT / folder).rglob("*")}
    assert names == {f"wherefrom/{path.relative_to(ROOT)}" for path in sources if path.suffix in (".py", ".txt") or path.name == "py.typed"}
    assert "wherefrom: built without its CPU view kernel; it needs" in without_compiler.stderr
