"""Runs for tests of hosts: in this process, in one that is killed, in two that are ranks. A module of its own, which those can import."""

import contextlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from wherefrom.pipeline import ShardIndex
from wherefrom.train import Encoder, Progress, Reporter, Step, Trainer, TrainSettings, run
from wherefrom.train.loop import accelerator_for
from wherefrom.train.meters import GRADIENT, LOSS, TERM

Rows = list[dict[str, float]]


@contextlib.contextmanager
def trainer_of(settings: TrainSettings) -> Iterator[Trainer]:
    assert settings.data is not None
    AcceleratorState._reset_state(reset_partial_state=True)  # of another precision
    with contextlib.closing(Trainer(settings, ShardIndex.open(settings.data), accelerator_for(settings))) as trainer:
        yield trainer


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Let encoders and objectives that are made meanwhile compute in float64."""
    make, encode = Step.__init__, Encoder.forward

    def make_double(self: Step, *parts: Any, **options: Any) -> None:
        make(self, *parts, **options)
        self.double()

    def encode_double(self: Encoder, pixels: Tensor, **options: Any) -> Any:
        return encode(self, pixels.double(), **options)

    Step.__init__, Encoder.forward = make_double, encode_double  # type: ignore[method-assign]
    try:
        yield
    finally:
        Step.__init__, Encoder.forward = make, encode  # type: ignore[method-assign]


def updates_of(settings: TrainSettings) -> tuple[Rows, dict[str, Tensor]]:
    """Return losses and gradient norms of every update of a run, and the state that it ends with."""
    with trainer_of(settings) as trainer:
        rows = []
        for _ in range(trainer.updates):
            trainer.update()
            row = trainer.window.take()
            rows.append({name: value for name, value in row.items() if name == LOSS or name.startswith((TERM, GRADIENT))})
        return rows, {name: tensor.clone() for name, tensor in trainer.step.state_dict().items()}


def observed(settings: TrainSettings, *, precise: bool) -> dict[str, Any]:
    """Return losses and gradient norms of every update of a run, `precise` those in float64, sums of its state, and the first loss."""
    with trainer_of(settings) as trainer:
        trainer.update()
        first = trainer.window.take()[LOSS]
    with in_float64() if precise else contextlib.nullcontext():
        rows, state = updates_of(settings)
    return {"rows": rows, "sums": {name: tensor.double().sum().item() for name, tensor in state.items()}, "first in float32": first}


def in_processes(target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> list[int | None]:
    """Call a function of this module once for each tuple, each in a process of its own, all at once; return the exit codes.

    They are forks of a server that has imported the library and computed nothing: what counts is that they can be killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["wherefrom.train"])
    processes = [context.Process(target=target, args=(torch.get_num_threads(), *each)) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in processes]


def run_until_killed(threads: int, settings: TrainSettings, out: Path, at: int) -> None:
    """Go on with a run; after the gradients of update `at`, before the weights follow them, be killed: no moment to tidy up."""
    torch.set_num_threads(threads)
    plain = Step.before_update

    def before_update(self: Step, progress: Progress) -> None:
        if progress.update == at:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(self, progress)

    Step.before_update = before_update  # type: ignore[method-assign]
    run(settings, reporter=Reporter(), out=out, resume=out.is_dir())


def be_a_rank(threads: int, settings: TrainSettings, folder: Path, rank: int, port: str, precise: bool) -> None:
    """Be one of two ranks, and write down what this one saw."""
    torch.set_num_threads(threads)
    place = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(place)
    (folder / f"rank.{rank}").write_text(json.dumps(observed(settings, precise=precise)))
    torch.distributed.destroy_process_group()
