"""The command `wherefrom evaluate`: what a network knows, by named protocols.

Here: what is opened for it, ranks, the report's file, how it looks.
Not here: the protocols (train/evaluation/), parsing the command line (cli.py).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from accelerate import PartialState
from rich.console import Console

from wherefrom.pipeline.demo.shards import demo_shards
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.tools.console import ProgressLines, print_line, print_table, progress
from wherefrom.train.evaluation.dense_layouts import Masked, depths_by_layout, masks_by_layout
from wherefrom.train.evaluation.dense_pictures import DemoPictures, FilesOfDepth, ListedPictures
from wherefrom.train.evaluation.features import Evaluation
from wherefrom.train.evaluation.network import HUB, Which, open_network
from wherefrom.train.evaluation.other_pictures import other_pictures
from wherefrom.train.evaluation.pictures import ShardPictures
from wherefrom.train.evaluation.protocols import Measured, lacking, measure, protocols_named, read_report
from wherefrom.train.evaluation.report import check_held_out, check_same_classes, classes_not_learned, pictures_in_both
from wherefrom.train.plain_data import Plain
from wherefrom.train.ranks import Ranks
from wherefrom.train.run_folder import RunFolder
from wherefrom.train.settings import read_plain_settings

__all__ = ["evaluate_command"]

Folders = Annotated[dict[str, Path], tyro.conf.arg(metavar="NAME FOLDER [NAME FOLDER ...]")]
Sides = tuple[ListedPictures, ListedPictures]  # to learn from, held out
Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")]


def evaluate_command(
    network: str,
    *,
    data: str | None = None,
    val: str | None = None,
    labels: str | None = None,
    protocols: Names = (),
    others: Folders = {},  # noqa: B006  # never changed
    masks: str | None = None,
    depths: Path | None = None,
    depth_unit: float | None = None,
    farthest: float | None = None,
    which: Which = "exported",
    out: Path | None = None,
    again: bool = False,
    picture_px: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    renderer: str = "auto",
    threads: int | None = None,
) -> int:
    """Measure what a network knows by named protocols; return 0, or 1 if one failed, or one that was named could not be measured.

    Args:
        network: a run's folder, a folder that timm loads, hf-hub:OWNER/NAME, or a model of timm.
        data: pictures to learn from, as for `wherefrom index`; default: those of the run, or the demo's.
        val: held-out pictures; default: as data.
        labels: what labels tar shards, as for `wherefrom index`; default: as the run, if its pictures are taken.
        protocols: which, by name, such as knn; default: all that these pictures allow. Named ones are refused if they lack what they need.
        others: folders of pictures of the same classes from elsewhere, each behind its name: imagenet-c, imagenet-r, imagenet-a,
            imagenet-sketch.
        masks: LAYOUT:FOLDER of pictures with masks of classes, of both sides, in the layout voc, ade20k, coco or folder (images/train,
            masks/train, images/val, masks/val).
        depths: a folder of pictures with 16-bit PNGs of depths: images/train, depths/train, images/val, depths/val.
        depth_unit: meters of a value of 1 in them; default: 0.001.
        farthest: the largest depth that counts, in meters; default: 10.
        which: of a run, the network that it exports, a teacher where its host has one, or the student.
        out: the folder of evaluation.json; default: evaluations/ of the run (evaluations/student of its student), or of this folder, and
            the network's name.
        again: measure also what the report holds of the same network and pictures.
        picture_px: side of whole pictures; default: as the network says.
        limit: at most so many pictures of either side.
        seed: of random floors, heads and draws.
        device: where networks compute.
        renderer: which cuts views, as for `wherefrom train`.
        threads: that read and render; default: the loader's choice.
    Raises: OSError or ValueError of one line if something cannot be had or does not fit.
    """
    chosen = protocols_named(protocols)
    opened = open_network(network, which=which)
    with contextlib.ExitStack() as stack:
        state, ranks = stack.enter_context(machine(device))
        console = Console(quiet=not ranks.first)
        opened.encoder.to(state.device)
        options = {"renderer": renderer, "threads": threads, "device": state.device}
        of_depths = {name: number for name, number in (("unit", depth_unit), ("farthest", farthest)) if number is not None}
        with ranks.led_by(state.is_local_main_process):
            own_masks = _masks(console, masks, options)
            own_depths = _depths(depths, of_depths, options)
            train, held_out, of_demo = _pictures(console, network, data, val, labels)
        demo = (DemoPictures(train, **options), DemoPictures(held_out, **options)) if of_demo else None
        sources = demo or (ShardPictures(train, **options), ShardPictures(held_out, **options))
        for source in (*sources, *(own_masks or ()), *(own_depths or ())):
            stack.enter_context(source)
        lines = ProgressLines(lambda line: print_line(console, line))
        evaluation = Evaluation(
            opened,
            *sources,
            masked=own_masks or demo,
            depth=own_depths or demo,
            others=other_pictures(others, train, **options),
            picture_px=picture_px,
            limit=limit,
            ranks=ranks,
            seed=seed,
            progress=lines,
        )
        evaluation.grid()  # refuses pictures of a size that the network does not take
        for name in protocols:
            reason = lacking(evaluation, chosen[name.partition("@")[0]])
            if reason:
                raise ValueError(f"protocol {name}: {reason}; name what it needs, or leave it out")
        folder = out or _folder(network, which)
        file, page = folder / "evaluation.json", folder / "evaluation.html"
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
        heading = [
            f"{opened.name}: {opened.encoder.settings.described()}, pictures of {evaluation.picture_px} px",
            f"{len(train)} pictures to learn from, {len(held_out)} held out",
            *(f"{len(of[0])} pictures with {what} to learn from, {len(of[1])} held out" for what, of in _own(own_masks, own_depths)),
            *classes_not_learned(train, held_out),
        ]
        shared = {"pictures": pictures_in_both(train, held_out)}
        for what, of in _own(own_masks, own_depths):
            shared[f"pictures with {what}"] = pictures_in_both(of[0].index, of[1].index, rows=(of[0].rows, of[1].rows))
        for what, number in shared.items():
            if number:
                heading.append(
                    f"{number} of the {what} held out are, byte for byte, among those to learn from: scores are too good by them"
                )
        for line in heading:
            print_line(console, line)
        elsewhere = {name: str(folder.absolute()) for name, folder in others.items()}
        about: dict[str, Plain] = {"train": train.fingerprint, "held_out": held_out.fingerprint, "others": elsewhere, "limit": limit}
        about |= {what: [side.fingerprint for side in of] for what, of in _own(own_masks, own_depths)} | of_depths

        def tell(found: Measured) -> None:
            print_table(console, found.table())
            for note in found.notes:
                print_line(console, f"{found.protocol}: not measured, {note}")

        def aside(kept: Path) -> None:
            if page.exists():
                page.rename(kept.with_suffix(page.suffix))
            print_line(console, f"{file} held results of another network, other pictures or other options: they are now in {kept}")

        found = measure(evaluation, chosen, file=file, about=about, again=again, done=tell, aside=aside)
        if ranks.first:
            from wherefrom.tools.evaluation_page import write_page  # matplotlib is slow to import

            run = RunFolder(Path(network)) if Path(network).is_dir() else None
            write_page(page, evaluation, read_report(file).measured, about=heading, run=run)
            print_line(console, f"written to {file} and {page}")
    return 1 if any(measured.failed or (protocols and measured.not_measured) for measured in found) else 0


@contextlib.contextmanager
def machine(device: Literal["auto", "cpu", "cuda"]) -> Iterator[tuple[PartialState, Ranks]]:
    """Hand out the device and the ranks of a command, and leave the process free for others.

    Raises: ValueError if a device is asked for that is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': torch sees no CUDA device here; use auto or cpu")
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    try:
        yield state, Ranks(state.process_index, state.num_processes)
    finally:
        state.destroy_process_group()
        PartialState._reset_state()


def _pictures(console: Console, network: str, data: str | None, val: str | None, labels: str | None) -> tuple[ShardIndex, ShardIndex, bool]:
    """Return the pictures to learn from, those held out, and whether they are the demo's."""
    settings = RunFolder(Path(network)).settings
    if settings.is_file() and (data is None or val is None):
        plain = read_plain_settings(settings)
        of_run = {name: None if plain.get(name) is None else str(plain[name]) for name in ("data", "val", "labels")}
        data, val, labels = data or of_run["data"], val or of_run["val"], labels or of_run["labels"]
        if data is not None and val is None:
            raise ValueError(f"{network}: the run held no pictures out; name some by --val")
    of_demo = data is None and val is None
    if of_demo:
        demo = demo_shards()
        data, val = demo.train, demo.val
    if data is None or val is None:
        raise ValueError("one of --data and --val alone: give both, or neither for the pictures of the run")
    with progress(console, "indexing") as show:
        train = ShardIndex.open(data, labels=labels, progress=show)
        held_out = ShardIndex.open(val, labels=labels, classes=train.classes, progress=show)
    check_held_out(train, held_out)
    check_same_classes(train, held_out)
    return train, held_out, of_demo


def _masks(console: Console, masks: str | None, options: dict[str, Any]) -> tuple[Masked, Masked] | None:
    if masks is None:
        return None
    with progress(console, "reading masks") as show:
        return masks_by_layout(masks, progress=show, **options)


def _depths(depths: Path | None, of_depths: dict[str, float], options: dict[str, Any]) -> tuple[FilesOfDepth, FilesOfDepth] | None:
    if depths is None and of_depths:
        raise ValueError("--depth-unit and --farthest are of --depths: name its folder, or leave them out")
    return None if depths is None else depths_by_layout(depths, **of_depths, **options)


def _own(masks: Sides | None, depths: Sides | None) -> list[tuple[str, Sides]]:
    return [(what, sides) for what, sides in (("masks", masks), ("depths", depths)) if sides is not None]


def _folder(network: str, which: Which) -> Path:
    """Return where a report goes that no folder is named for: another for every network."""
    if Path(network).is_dir():
        return Path(network, "evaluations", *(["student"] if which == "student" else []))
    return Path("evaluations", *network.removeprefix(HUB).split("/"))
