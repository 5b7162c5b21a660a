"""What measured numbers depend on: processor, memory, GPU, system and versions.

Here: what is written beside them; the last line of what a process complained of. Not here: any measuring.
"""

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wherefrom.tools.system_limits import read_memory

SMI_FIELDS = ("driver_version", "power.limit", "clocks.max.sm", "memory.total")


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Return the machine in words and numbers, with the versions of those packages that are installed; "gpu" is None without one."""
    import torch  # here: where it does not load, there are versions to tell

    from wherefrom.pipeline.system import available_cores  # here: what the kernels need alone has not the pipeline's libraries

    models = {line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")}
    versions = {package: version for package in packages if (version := installed_version(package)) is not None}
    return {
        "cpu": ", ".join(sorted(models)) or platform.processor(),
        "cores": available_cores(),
        "memory_gib": round(read_memory().get("MemTotal", 0) / 2**30, 1),
        "gpu": _gpu() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def query_gpu(fields: Sequence[str]) -> dict[str, str]:
    """Return what nvidia-smi says about the first GPU, such as {"power.limit": "700.00 W"}; nothing where it is not installed."""
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {} if done.returncode else dict(zip(fields, (value.strip() for value in done.stdout.split(",")), strict=True))


def last_line(words: str) -> str:
    """Return the last line of what a process wrote: of a traceback the error."""
    return (words.strip().splitlines() or ["no words"])[-1]


def _gpu() -> dict[str, str]:
    import torch

    return {"name": torch.cuda.get_device_name()} | query_gpu(SMI_FIELDS)


def installed_version(package: str) -> str | None:
    """Return the version of a package, or None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
