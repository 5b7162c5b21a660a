"""A stage of `gpu_check`: JPEGs decoded on the GPU by PyTorch's libraries, as on a machine without DALI, and `triton` rendering them.

Here: every picture against decode.py, damaged files, the pixel proof of the renderer behind the decoder, its views against those of
pictures that decode.py decoded, pictures a second; a loader's views on a stream of the consumer's own.
Not here: the decoder (pipeline/render/gpu_decode.py), the kernel alone (views.py), DALI (loading.py).
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.pipeline.decode import decode_or_stand_in, is_jpeg
from wherefrom.pipeline.loader import make_loader
from wherefrom.pipeline.proof.level_errors import levels
from wherefrom.pipeline.proof.prove import proof_cases, prove
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.render.decoder import Decoded
from wherefrom.pipeline.render.gpu_decode import Bytes, DecodeJpegs, TensorDecoder, decode_by_torchvision, is_for_nvjpeg, jpeg_libraries
from wherefrom.pipeline.render.triton_renderer import TritonRenderer
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.shards.reader import ShardReader
from wherefrom.pipeline.view_recipe import ColorLaw, ViewFamily, ViewRecipe
from wherefrom.tools.gpu_check.stages import Options, Report

# Levels, mean over a picture. nvJPEG repeats chroma where libjpeg-turbo interpolates it: 0.5 on most photographs of 4:2:0, 2.3 on the worst
# of 250. Another picture is off by 30 and more.
DECODER_BAR = 4.0
BATCH = 64
LEAST_LEFT_S = 20.0  # for what comes after the pictures
RATE_S = 2.0  # of timing
LATE_CYCLES = 10**9  # of a GPU, half a second or more, by which the stream is late on which views are rendered
LATE_BATCHES = 3


class _Counting:
    """Decodes JPEGs by a library, and counts the pictures that it decoded."""

    def __init__(self, decode_jpegs: DecodeJpegs) -> None:
        self._decode_jpegs, self.decoded = decode_jpegs, 0

    def __call__(self, encoded: Sequence[Bytes], device: torch.device) -> list[Tensor]:
        pictures = self._decode_jpegs(encoded, device)
        self.decoded += len(pictures)
        return pictures


def without_dali(options: Options, report: Report) -> None:
    """Check every library that decodes JPEGs on a GPU, and the `triton` renderer behind it; time what is right."""
    if not options.shards:
        report.leave_out("decoding: no SHARDS were given")
        return
    libraries = {"torchvision": decode_by_torchvision} if options.dry_run else jpeg_libraries()  # of which that decodes on a CPU as well
    if not libraries:
        report.leave_out("decoding: neither torchcodec nor torchvision decodes JPEGs on a GPU here")
        return
    index = ShardIndex.open(options.shards)
    for name, decode_jpegs in libraries.items():
        outcomes = [check(name, decode_jpegs, index, options, report) for check in (check_pictures, check_damaged_files, check_renderer)]
        if all(outcomes):
            _time(name, decode_jpegs, index, options, report)
    check_streams(index, options, report)


def check_pictures(name: str, decode_jpegs: DecodeJpegs, index: ShardIndex, options: Options, report: Report) -> bool:
    """Hold every picture of the shards, as far as time goes, to decode.py; return whether all are right."""
    counting = _Counting(decode_jpegs)
    decoder = TensorDecoder(device=torch.device(options.device), decode_jpegs=counting)
    compared, due, worst, wrong = 0, 0, 0.0, []
    for ids, files in _batches(index):
        if report.seconds_left < LEAST_LEFT_S:
            break
        decoded = decoder.decode(files)
        due += sum(map(is_for_nvjpeg, files))
        for i, (sample, file) in enumerate(zip(ids, files, strict=True)):
            fault, error = _fault(decoded, i, file)
            worst = max(worst, error)
            wrong += [f"{index.name(sample)}: {fault}"] if fault else []
        compared += len(files)
    decoder.close()
    report.add(f"{name}, pictures", {"compared": compared, "of": len(index), "by_library": counting.decoded, "worst_levels": worst})
    if counting.decoded < due:
        wrong.append(f"it decoded {counting.decoded} of {due} JPEGs that it should; the CPU had to")
    for words in wrong[:10]:
        report.fail(f"{name}: {words}")
    report.say(f"{name}: {compared} of {len(index)} pictures, {counting.decoded} by it, {worst:.2f} levels mean where worst")
    return not wrong


def _fault(decoded: Decoded, position: int, file: Bytes) -> tuple[str, float]:
    """Return what is wrong with a decoded picture, or "", and its mean error in levels."""
    expected, refusal = decode_or_stand_in(file)
    if position in decoded.failed or refusal:
        # a GPU may show what is damaged, but must not refuse what is intact
        return (f"is refused: {decoded.failed[position]}" if not refusal else ""), 0.0
    picture = picture_of(decoded, position)
    if picture.shape != expected.shape:
        return f"has size {picture.shape[:2]}, not {expected.shape[:2]}", 0.0
    error = float(np.abs(picture.astype(np.int16) - expected).mean())
    if expected.any() and not picture.any():
        return "is black", error
    return (f"is {error:.1f} levels off, at most {DECODER_BAR:g} is right" if not error <= DECODER_BAR else ""), error


def picture_of(decoded: Decoded, position: int) -> Bytes:
    """Return a picture of a `TensorDecoder`, (H, W, 3)."""
    return cast(dict[int, Tensor], decoded.owner)[position].cpu().numpy()


def check_damaged_files(name: str, decode_jpegs: DecodeJpegs, index: ShardIndex, options: Options, report: Report) -> bool:
    """See that damaged files among intact ones are refused or shown, as a picture of their size, and change no other; return whether so."""
    intact = [file for file in next(_batches(index))[1] if is_jpeg(file)][:4]
    decoder = TensorDecoder(device=torch.device(options.device), decode_jpegs=decode_jpegs)
    outcomes, wrong = {}, []
    for damage, spoil in DAMAGES.items():
        spoiled = spoil(intact[0])
        decoded = decoder.decode([intact[0], spoiled, *intact[1:]])
        outcomes[damage] = decoded.failed.get(1, "shown")
        if 1 not in decoded.failed and picture_of(decoded, 1).max() == picture_of(decoded, 1).min():
            wrong.append(f"a JPEG {damage} is shown as one color")
        for i, file in zip((0, *range(2, len(intact) + 1)), intact, strict=True):
            fault, _ = _fault(decoded, i, file)
            wrong += [f"beside a JPEG {damage}, an intact one {fault}"] if fault else []
    decoder.close()
    report.add(f"{name}, damaged files", outcomes)
    for words in wrong:
        report.fail(f"{name}: {words}")
    report.say(f"{name}: of {len(DAMAGES)} damaged files {sum(outcome != 'shown' for outcome in outcomes.values())} are refused")
    return not wrong


def _overwritten(file: Bytes, start: float, stop: float) -> Bytes:
    copy = file.copy()
    copy[int(start * len(file)) : int(stop * len(file))] = 0x55
    return copy


DAMAGES: dict[str, Callable[[Bytes], Bytes]] = {
    "cut in half": lambda file: file[: len(file) // 2].copy(),
    "cut in half and ended": lambda file: np.concatenate([file[: len(file) // 2], np.array([0xFF, 0xD9], np.uint8)]),
    "without its end": lambda file: file[:-2].copy(),
    "of its header alone": lambda file: file[:400].copy(),
    "overwritten in its middle": lambda file: _overwritten(file, 0.45, 0.55),
    "overwritten from its middle on": lambda file: _overwritten(file, 0.5, 1),
}


def check_renderer(name: str, decode_jpegs: DecodeJpegs, index: ShardIndex, options: Options, report: Report) -> bool:
    """Prove the renderer behind the decoder, and compare its views with those of pictures that decode.py decoded; return whether right."""
    device = torch.device(options.device)

    def renderer(recipe: ViewRecipe, decode_jpegs: DecodeJpegs | None) -> TritonRenderer:
        return TritonRenderer(recipe, device=device, decoder=TensorDecoder(device=device, decode_jpegs=decode_jpegs))

    cases = proof_cases(quick=True)
    if options.dry_run:  # hundreds of views take the interpreter too long
        cases = (replace(cases[1], size_px=(20, 24), source_size=(61, 73), pixels="float32", laws=("grid",)),)
    proof = prove(partial(renderer, decode_jpegs=decode_jpegs), cases=cases)
    worst = max(row.worst_px for row in proof.rows)
    if not proof.passed:
        report.fail(f"{name}: the renderer's pixels do not prove its records: {worst:.3f} source px where worst")

    ids, files = next(_batches(index))
    ids, files = (ids[:2], files[:2]) if options.dry_run else (ids, files)
    side_px = 12 if options.dry_run else 224
    family = ViewFamily(name="one", views=2, size_px=(side_px, side_px), mirror="view", turns=True, color=ColorLaw(), min_side_px=4)
    recipe = ViewRecipe(families=(family,))
    records = draw_records(
        recipe, seed=0, epoch=0, drawn_for=ids, source_size=index.source_size[ids], stored_orientation=index.orientation[ids]
    )
    rendered, expected = (levels(renderer(recipe, each).render(files, records).pixels[0], recipe) for each in (decode_jpegs, None))
    error = float((rendered - expected).abs().flatten(1).mean(1).max())
    if not error <= DECODER_BAR:
        report.fail(f"{name}: views of a picture are {error:.1f} levels off, at most {DECODER_BAR:g} is right")
    report.add(f"{name}, renderer", {"proof_worst_px": worst, "views_levels": error, "proven": proof.passed})
    report.say(f"{name}: the renderer is {'proven' if proof.passed else 'NOT proven'}, {worst:.3f} source px; views {error:.2f} levels off")
    return proof.passed and error <= DECODER_BAR


def check_streams(index: ShardIndex, options: Options, report: Report) -> None:
    """Read a loader's views on a stream of the consumer's own while the stream that renders them is late: they must be done.

    Control: views that nobody waits for must not be, or the stage shows nothing.
    """
    on_gpu, side_px = options.device == "cuda", 224 if options.device == "cuda" else 12
    recipe = ViewRecipe(families=(ViewFamily(name="one", views=1, size_px=(side_px, side_px), min_side_px=4),))
    unfinished: dict[str, int] = {}
    for words, waits in (("handed over", True), ("not waited for", False))[: 2 if on_gpu else 1]:
        batch = min(16 if on_gpu else 1, len(index) // LATE_BATCHES)
        with make_loader(index, recipe, global_batch=batch, renderer="triton" if on_gpu else "auto", device=options.device) as loader:
            if not waits:
                loader.device = torch.device("cpu")  # to which it hands over what it has
            if on_gpu:
                torch.cuda._sleep(LATE_CYCLES)
            with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else contextlib.nullcontext():
                seen = [(views, views.clone()) for views in (batch.views[0].pixels for batch in islice(loader, LATE_BATCHES))]
            if on_gpu:
                torch.cuda.synchronize()
            unfinished[words] = sum(not torch.equal(views, at_once) for views, at_once in seen)
    report.add("unfinished batches on a consumer's stream", unfinished)
    if unfinished["handed over"]:
        report.fail(f"{unfinished['handed over']} of {LATE_BATCHES} batches were not done on the stream of who got them")
    if unfinished.get("not waited for") == 0:
        report.fail("views that nobody waited for were done all the same: nothing is shown of streams")
    report.say(f"a consumer's own stream: {unfinished} of {LATE_BATCHES} batches were not done")


def _time(name: str, decode_jpegs: DecodeJpegs, index: ShardIndex, options: Options, report: Report) -> None:
    """Time decoding one batch again and again."""
    ids = index.replacement(np.arange(min(options.batch, len(index))))
    decoder = TensorDecoder(device=torch.device(options.device), decode_jpegs=decode_jpegs)
    with ShardReader(index) as reader:
        files = reader.read_batch(ids)
        decoder.decode(files)
        started, decoded = time.perf_counter(), 0
        while time.perf_counter() - started < (0.1 if options.dry_run else RATE_S):
            decoder.decode(files)
            decoded += len(files)
        rate = decoded / (time.perf_counter() - started)
    decoder.close()
    report.add(f"{name}, pictures decoded a second", rate)
    report.say(f"{rate:.0f} pictures/s decoded by {name}, B{len(files)}")


def _batches(index: ShardIndex) -> Iterator[tuple[NDArray[np.int64], list[Bytes]]]:
    """Yield the ids of valid pictures and their files, a batch at a time."""
    ids = np.unique(index.replacement(np.arange(len(index))))
    with ShardReader(index) as reader:
        for start in range(0, len(ids), BATCH):
            some = ids[start : start + BATCH]
            yield some, reader.read_batch(some)
