"""Small runs of every registered objective, for tests of hosts: in this process, in one that is killed, in two that are ranks.

A module of its own, which those processes can import. A new method is a row of METHODS.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from wherefrom.pipeline import Disjoint, ShardIndex, Tiles
from wherefrom.train import (
    BarlowTwinsSettings,
    BYOLSettings,
    ColorizationSettings,
    ContextSettings,
    DenseSpatialSettings,
    DINOSettings,
    Encoder,
    EvaluationSettings,
    GTSASettings,
    JigsawSettings,
    MAESettings,
    MoCoV3Settings,
    ModelSettings,
    ObjectiveSettings,
    OptimSettings,
    PARTSettings,
    Progress,
    Reporter,
    RotationSettings,
    RuntimeSettings,
    SimCLRSettings,
    SpatialSettings,
    Step,
    TileGuards,
    Trainer,
    TrainSettings,
    VICRegSettings,
    run,
)
from wherefrom.train.loop import accelerator_for
from wherefrom.train.meters import GRADIENT, LOSS, TERM

Rows = list[dict[str, float]]

VIT = ModelSettings(view_size_px=24, patch_size_px=6, width=32, depth=2, heads=2, drop_path=0.3)
SINCOS = replace(VIT, positions="sincos")
SP = SpatialSettings(law=Disjoint(area_frac=(0.06, 0.16)), views=3, size_px=24, min_side_px=4, color=None, weight=1.0)
ABSENT, STOPPED = replace(SP, weight=0.0), replace(SP, stop="encoder")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method at a size that takes a second or so: 8 pictures an update, 5 updates an epoch."""

    settings: ObjectiveSettings
    model: ModelSettings = VIT
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(lr=1e-3))


RESNET = ModelSettings(name="test_resnet", drop_path=0.3)
LARS = OptimSettings(name="ssl_lars", lr=0.2, weight_decay=1e-6, clip_norm=None)

PAIR: dict[str, Any] = {"size_px": 32, "hidden": 24, "out": 16}
DINO: dict[str, Any] = {"local_views": 2, "prototypes": 32, "hidden": 24, "bottleneck": 16, "prototypes_rest_epochs": 0.4}
GTSA: dict[str, Any] = {"size_px": 24, "local_px": 12, "local_views": 2, "region_bins": 4, "local_region_bins": 2}
GTSA |= {"hidden": 32, "out": 16, "rotation_hidden": (24, 24, 12), "patch_from_epoch": 0.0, "teacher_momentum": 0.9}
TILES: dict[str, Any] = {"size_px": 24, "tiles": Tiles(window_px=96, tile_px=24), "hidden": 24, "min_side_px": 4}
GUARDS = TileGuards(normalize=True, color="drop", channel_shift_px=2, resample_prob=0.5, resample_px=(8, 16))
MOCO_OF_RESNET = MoCoV3Settings(**PAIR, temperature=1.0, projector_layers=2, predictor_norm=False, decay_all=False)

METHODS = {  # by the objective's name, and what follows it where there is more than one form
    "mae": Method(settings=MAESettings(size_px=24, decoder_width=16, decoder_depth=1, decoder_heads=2), model=SINCOS),
    "simclr": Method(settings=SimCLRSettings(**PAIR, temperature=0.5), model=RESNET, optim=replace(LARS, name="simclr_lars")),
    "dino": Method(
        settings=DINOSettings(**DINO, size_px=24, local_px=12, teacher_momentum=0.9),
        optim=OptimSettings(lr=1e-3, weight_decay=0.04, final_weight_decay=0.4, clip_by="parameter"),
    ),
    "gtsa": Method(
        settings=GTSASettings(**GTSA),
        optim=OptimSettings(lr=1e-3, weight_decay=0.04, final_weight_decay=0.4, clip_by="parameter"),
    ),
    "byol": Method(settings=BYOLSettings(**PAIR), model=RESNET, optim=LARS),
    "moco_v3": Method(settings=MoCoV3Settings(size_px=24, hidden=24, out=16), model=replace(SINCOS, frozen=("patch_embed",))),
    "barlow": Method(settings=BarlowTwinsSettings(**PAIR, bias_lr_factor=0.024), model=RESNET, optim=LARS),
    "spatial": Method(settings=SP),
    "part": Method(settings=PARTSettings(size_px=32, patch_px=6, patches=9, snap="pixel", color=None)),
    "vicreg": Method(settings=VICRegSettings(**PAIR), model=RESNET),
    "part by cross-attention": Method(
        settings=PARTSettings(
            size_px=32, patch_px=6, patches=9, sides_px=(4, 9), snap="pixel", head="cross_attention", pairs=40, keys_frac=0.7
        )
    ),
    "dense": Method(settings=DenseSpatialSettings(size_px=24, regions=4, min_side_px=4, color=None, weight=1.0)),
    "rotation": Method(settings=RotationSettings(size_px=24)),
    "context": Method(settings=ContextSettings(**TILES)),
    "jigsaw": Method(settings=JigsawSettings(**TILES, permutations=24, guards=GUARDS)),
    "colorization": Method(settings=ColorizationSettings(size_px=24)),
    "moco_v3 of a ResNet": Method(settings=MOCO_OF_RESNET, model=RESNET, optim=LARS),
    "gtsa with a bound in cells": Method(settings=GTSASettings(**GTSA, min_cells=1.5, local_area_frac=(0.03, 0.3))),
    "dino with BatchNorm": Method(
        settings=DINOSettings(**DINO, size_px=32, local_px=32, head_batch_norm=True, free_prototype_norms=True), model=RESNET
    ),
}


def host_of(name: str) -> str:
    """Return the objective's name of a row."""
    return name.partition(" ")[0]


def method_run(name: str, shards: Path, *, plugins: Sequence[SpatialSettings] = (), **changes: Any) -> TrainSettings:
    """Return the settings of a short run of a method, alone or with SP beside it; `changes` are of the run, its model or its runtime."""
    method = METHODS[name]
    of_model, of_runtime = (
        {key: changes.pop(key) for key in tuple(changes) if key in {each.name for each in dataclasses.fields(kind)}}
        for kind in (ModelSettings, RuntimeSettings)
    )
    runtime = RuntimeSettings(device="cpu", renderer="torch", threads=1, log_every=1, checkpoint_every=3, log_with="none")
    return replace(
        TrainSettings(
            recipe="demo",
            data=str(shards / "train.tar"),
            global_batch=8,
            updates=4,
            model=replace(method.model, **of_model),
            objectives={host_of(name): method.settings} | {f"plugin_{number}": plugin for number, plugin in enumerate(plugins)},
            optim=replace(method.optim, warmup_frac=0.5),
            evaluation=EvaluationSettings(every=0),
            runtime=replace(runtime, **of_runtime),
        ),
        **changes,
    )


@contextlib.contextmanager
def trainer_of(settings: TrainSettings) -> Iterator[Trainer]:
    assert settings.data is not None
    AcceleratorState._reset_state(reset_partial_state=True)  # of another precision
    try:
        with contextlib.closing(Trainer(settings, ShardIndex.open(settings.data), accelerator_for(settings))) as trainer:
            yield trainer
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


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
