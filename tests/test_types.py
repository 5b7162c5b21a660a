"""The type checker, as .ci/types runs it, against errors planted in a copy of the house. That the house is clean is held by .ci/run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "pipeline", "train", "tools")
PLANTED = """from wherefrom.pipeline.system import user_cache_folder

good = user_cache_folder().name
bad: int = user_cache_folder()
"""


@pytest.mark.core
@pytest.mark.skipif(shutil.which("bash") is None, reason=".ci/types is a bash script")
def test_planted_errors_are_found_in_every_folder(tmp_path: Path) -> None:
    house = tmp_path / "house"
    house.mkdir()
    for name in ("pyproject.toml", *FOLDERS):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, house / name)
    for folder in FOLDERS:
        (house / folder / "planted.py").write_text(PLANTED, encoding="utf-8")
    here = str(Path(sys.executable).parent)
    done = subprocess.run(
        ["bash", str(ROOT / ".ci" / "types"), str(house)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": f"{here}:/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    lines = [line for line in done.stdout.splitlines() if "planted.py" in line and ": error:" in line]
    places = sorted(line.split(": error: ")[0] for line in lines)
    assert places == [f"wherefrom/{folder}/planted.py:4" for folder in sorted(FOLDERS)], done.stdout
    assert all('expression has type "Path", variable has type "int"' in line for line in lines)
    assert done.returncode == 1
