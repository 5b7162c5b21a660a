"""The command `wherefrom replay`: the views of any update of a run, drawn again as `wherefrom views` draws them.

Here: which of the batch's pictures are drawn, and the files that are written.
Not here: how an update is found again (train/replay.py), the picture (views_picture.py).
"""

from pathlib import Path

from wherefrom.pipeline.files import write_aside
from wherefrom.pipeline.views import Batch
from wherefrom.tools.views_picture import save_batch_picture
from wherefrom.train.replay import Replay, open_replay

__all__ = ["replay_command"]


def replay_command(
    run: Path,
    *,
    update: int | None = None,
    sample: int | None = None,
    samples: int = 6,
    out: Path = Path("replay.png"),
    record: Path | None = None,
    data: str | None = None,
) -> int:
    """Draw the views of any update of a run again, from its settings, its position and its data: no process of it, and no GPU.

    Args:
        run: the run's folder; the run may be over, or going on.
        update: which (needed), as metrics.jsonl counts them; the first is 1. Its batch is that of all ranks and micro-batches.
        sample: draw this one of its batch.
        samples: how many of its batch are drawn, the first ones, unless one is named.
        out: the PNG.
        record: a file for the records of the drawn views, one JSON object a line, which `Record.from_json` reads.
        data: where the run's data lies, if no longer where its settings say.
    Returns: the exit code, 0.
    Raises: OSError or ValueError of one line if there is no such run, update or sample, or the data is not what the run learned from.
    """
    if update is None:
        raise ValueError(f"{run}: which update? e.g. --update 1, the first")
    if samples < 1:
        raise ValueError(f"samples={samples}: needs at least 1")
    for option, file in (("out", out), ("record", record)):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"{file}: there is no folder {file.absolute().parent}; make it, or take another --{option}")
    with open_replay(run, update, data=data, threads=0) as replay:
        if sample is not None:
            replay.check_holds(sample)
        batch = replay.batch(replay.ids[:samples] if sample is None else [sample])
        title = f"{run.absolute().name}, update {update} of {replay.updates}"
        save_batch_picture(out, replay.loader, batch, objectives=replay.settings.make_objectives(), title=title)
        if record is not None:
            _write_records(record, replay, batch)
    drawn = f"samples {', '.join(map(str, batch.drawn_for.tolist()))}" if len(batch) > 1 else f"sample {int(batch.drawn_for)}"
    where = f"update {update} of {replay.updates} (epoch {replay.epoch}, step {replay.step})"
    print(f"{out}: {where}, {drawn} of its {len(replay.ids)}, {replay.loader.renderer.name} renderer")
    for note in replay.notes:
        print(f"note: {note}")
    if record is not None:
        print(f"{record}: {len(batch)} x {len(batch.views)} records")
    return 0


def _write_records(path: Path, replay: Replay, batch: Batch) -> None:
    """Write a record a picture and family, picture by picture, whole or not at all."""
    records = replay.records(batch)
    with write_aside(path) as aside, aside.open("w", encoding="ascii") as lines:
        lines.writelines(f"{each[b].to_json()}\n" for b in range(len(batch)) for each in records)
