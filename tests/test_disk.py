"""A disk that is full: the kernel refuses files beyond a limit, as it refuses all on a full disk; what was saved before stays whole."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from wherefrom.train import checkpoint
from wherefrom.train.disk import DiskFullError, writing
from wherefrom.train.optimizer import make_optimizer
from wherefrom.train.run_folder import RunFolder, append_metrics, read_metrics, write_evaluation
from wherefrom.train.settings import OptimSettings


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes; Python ignores the signal that says so."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100_000, 200_000], ids=["weights", "optimizer"])
def test_a_checkpoint_for_which_there_is_no_room_leaves_the_one_before_whole(size: int, tmp_path: Path) -> None:
    model = nn.Linear(200, 200)  # 160 kB, and twice that in the optimizer
    optimizer = make_optimizer(model, OptimSettings())
    folder = tmp_path / "checkpoints"

    def saved(update: int) -> Path:
        model(torch.ones(1, 200)).sum().backward()
        optimizer.step()
        state = checkpoint.State(update=update, settings={}, position={}, unlogged=[], seconds={})
        return checkpoint.save(folder, state, model, optimizer, keep=1)

    first = saved(1)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with files_of_at_most(size), pytest.raises(DiskFullError) as refused:
        saved(2)
    assert str(refused.value).startswith(f"{folder / 'update-00000002'}: cannot be written (File too large), ")
    assert (" MB are free there; make room" in str(refused.value), "\n" in str(refused.value)) == (True, False)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert checkpoint.latest(folder) == first
    checkpoint.load(first, model, optimizer)
    assert saved(3) == checkpoint.latest(folder)


@pytest.mark.core
def test_a_log_for_which_there_is_no_room_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    append_metrics(folder, {"update": 1})
    with files_of_at_most(20), pytest.raises(DiskFullError, match=r"metrics\.jsonl: cannot be written"):
        append_metrics(folder, {"update": 2, "name": "x" * 20})
    assert read_metrics(folder) == [{"update": 1}]


@pytest.mark.core
def test_a_report_for_which_there_is_no_room_leaves_the_one_before_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_evaluation(folder, {"r2": 0.5})
    before = folder.evaluation.read_bytes()
    with files_of_at_most(20), pytest.raises(DiskFullError, match=r"cannot be written \(File too large\)"), writing(folder.path):
        write_evaluation(folder, {"r2": 0.5, "name": "x" * 20})
    assert (folder.evaluation.read_bytes(), list(tmp_path.iterdir())) == (before, [folder.evaluation])


@pytest.mark.core
def test_other_failures_come_as_they_are(tmp_path: Path) -> None:
    for problem in (FileNotFoundError(2, "none"), RuntimeError("of torch's"), OSError("without a number")):
        with pytest.raises(type(problem)) as raised, writing(tmp_path / "file"):
            raise problem
        assert raised.value is problem
