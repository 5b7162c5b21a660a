"""Weights on disk, and a disk that is full, told as one line, whichever library found it so.

Here: weights as others may read them; what the libraries raise where no byte can be written any more, as an OSError that names the file,
and the room that is left.
Not here: what is written (checkpoint.py, run_folder.py), and that it is whole or not there at all (pipeline/files.py).
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(OSError):
    """No more can be written; its text says where."""


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file, readable by whom the umask lets read: the library makes files for their owner alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path, metadata={"format": "pt"})
    path.chmod(mode)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Write `path` inside.

    Raises: DiskFullError if it is the room that lacks; every other failure as it comes.
    """
    try:
        yield
    except DiskFullError:
        raise
    except (OSError, RuntimeError, SafetensorError) as problem:
        reason = _reason(problem)
        if reason is None:
            raise
        raise DiskFullError(
            f"{path}: cannot be written ({reason}), {_free_mb(path):.1f} MB are free there; make room, then go on by --resume"
        ) from problem


def _reason(problem: BaseException) -> str | None:
    """Return what the system says, if it is that the disk is full, else None."""
    if isinstance(problem, SafetensorError):  # it has the number in its text alone
        number = re.search(r"(?:os error|code:) (\d+)", str(problem))
        code = int(number[1]) if number else 0
    elif isinstance(problem, OSError):
        code = problem.errno or 0
    else:  # torch.save complains of its own position, after the file has complained
        return _reason(problem.__context__) if isinstance(problem.__context__, OSError) else None
    return os.strerror(code) if code in FULL else None


def _free_mb(path: Path) -> float:
    folder = next(above for above in path.absolute().parents if above.is_dir())
    return shutil.disk_usage(folder).free / 1e6
