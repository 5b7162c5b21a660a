"""What the kernels' benchmark compares: for every kernel its inputs, each way to compute it, and what has to come out.

Here: contenders, the float64 truth, bytes and operations from shapes.
Not here: which sizes (cases.py), checking and timing (measuring.py).
Baselines get what is fixed beforehand: regions in torchvision's form, the number of samples as a constant that torch.compile can see.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.kernels.dispatch import Backend
from wherefrom.kernels.pair_loss import pair_loss
from wherefrom.kernels.pair_loss_reference import pair_loss_reference
from wherefrom.kernels.pair_targets import pair_targets
from wherefrom.kernels.pair_targets_reference import pair_targets_reference
from wherefrom.kernels.render_views import ViewBackend, render_views
from wherefrom.kernels.render_views_reference import render_views_reference
from wherefrom.kernels.roi_align import roi_align
from wherefrom.kernels.roi_align_pairs import roi_align_pairs
from wherefrom.kernels.roi_align_reference import roi_align_reference

Results = dict[str, Tensor]  # outputs and gradients by name
Call = Callable[[], Results]

COMPILE_MODE = "default"  # of torch.compile
FRAME_PX = 224  # sides of the frame that boxes lie in
SIDE_FRAC = (0.25, 0.75)  # of the frame, sides of boxes
VIEW_EDGE_PX = 2  # pixels of a view that may see beyond its box, on each side
PLANTED_PX = 4.0  # how far one edge of every box lies elsewhere in a planted error


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelContender:
    """One way to compute a case."""

    call: Call  # what is timed
    ours: bool = False
    compiled: bool = False  # by torch.compile
    settle: Callable[[Results], Results] = lambda results: results  # into the truth's layout; checked, not timed


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelProblem:
    """A case on a device: its contenders, what they have to come to, and what cannot be avoided."""

    contenders: dict[str, KernelContender]  # "eager" among them: its error is the yardstick
    truth: Call  # in float64, from the same rounded inputs
    dtype: torch.dtype  # of the inputs
    bytes_moved: int  # at the least: what is read once and written once
    operations: int  # at the least, a multiply-add being one
    formulas: str  # of these two


def pair_targets_problem(batch: int, dtype: torch.dtype, device: torch.device, planted: bool, *, N: int) -> KernelProblem:
    """All ordered pairs of N boxes a sample, position / size of the reference and ln of the area ratio."""
    boxes = _boxes(batch, N, device)
    moved = _moved(boxes) if planted else boxes
    reference = _compiled(pair_targets_reference)
    contenders = {
        **_ours(device, lambda backend: lambda: {"targets": pair_targets(moved, backend=backend)}),
        "eager": KernelContender(call=lambda: {"targets": pair_targets_reference(boxes)}),
        "compile": KernelContender(call=lambda: {"targets": reference(boxes)}, compiled=True),
    }
    return KernelProblem(
        contenders=contenders,
        truth=lambda: {"targets": pair_targets_reference(boxes.double())},
        dtype=dtype,
        bytes_moved=batch * (16 * N + 12 * N * N),
        operations=batch * N * N * 20,
        formulas="bytes: B (16 N + 12 N^2); operations: 20 a pair",
    )


def pair_loss_problem(
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    planted: bool,
    *,
    N: int,
    H: int,
    activation: str,
    loss: str,
    backward: bool = True,
) -> KernelProblem:
    """The loss of all ordered pairs of N tokens with H hidden channels, and the gradients of all that is learned."""
    boxes, C = _boxes(batch, N, device), 3
    moved = _moved(boxes) if planted else boxes
    random = torch.Generator().manual_seed(1)

    def learned(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=random) * scale).to(device, dtype)

    each = {"a": learned(batch, N, H), "b": learned(batch, N, H)}
    shared = {"weight": learned(C, H, scale=H**-0.5), "output_bias": learned(C), "hidden_bias": learned(H)}
    inputs = {name: value.requires_grad_(backward) for name, value in (each | shared).items()}
    options: dict[str, Any] = {"activation": activation, "loss": loss}

    def run(compute: Callable[..., Any], boxes: Tensor, inputs: Mapping[str, Tensor]) -> Results:
        value = compute(inputs["a"], inputs["b"], boxes, **{name: inputs[name] for name in shared}, **options).loss
        return {"loss": value.detach()} | (_gradients(value, inputs, None) if backward else {})

    def truth() -> Results:
        """A sample at a time: float64 of a whole batch may not fit."""
        exact = {name: value.detach().double().requires_grad_(backward) for name, value in inputs.items()}
        samples = []
        for b in range(batch):
            sample = exact | {name: exact[name].detach()[b : b + 1].requires_grad_(backward) for name in each}
            samples.append(run(pair_loss_reference, boxes[b : b + 1].double(), sample))
        joined = {name: torch.stack([sample[name] for sample in samples]).mean(0) for name in samples[0]}
        return joined | {f"d_{name}": torch.cat([sample[f"d_{name}"] for sample in samples]) / batch for name in each if backward}

    reference = _compiled(pair_loss_reference)
    contenders = {
        **_ours(device, lambda backend: lambda: run(partial(pair_loss, backend=backend), moved, inputs)),
        "eager": KernelContender(call=lambda: run(pair_loss_reference, boxes, inputs)),
        "compile": KernelContender(call=lambda: run(reference, boxes, inputs), compiled=True),
    }
    read = sum(value.numel() for value in inputs.values()) * dtype.itemsize
    each_activation = 5 + 3 * C if backward else 2 + C
    return KernelProblem(
        contenders=contenders,
        truth=truth,
        dtype=dtype,
        bytes_moved=read * (2 if backward else 1) + 16 * batch * N,
        operations=batch * N * N * H * each_activation,
        formulas=f"bytes: boxes, inputs{', their gradients' if backward else ''}; operations: B N^2 H {each_activation}, of these "
        f"{3 * C if backward else C} multiply-adds with or for the weight, the others sums, activations and their derivatives",
    )


def roi_align_problem(
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    planted: bool,
    *,
    R: int,
    map_hw: tuple[int, int],
    D: int,
    out_hw: tuple[int, int],
    backward: bool = True,
    pairs: bool = False,
) -> KernelProblem:
    """R boxes of each token map, adaptive sampling, and the gradient of the tokens; with `pairs` also the targets of all pairs of boxes."""
    boxes = _boxes(batch, R, device)
    moved = _moved(boxes) if planted else boxes
    random = torch.Generator().manual_seed(1)
    tokens = torch.randn(batch, *map_hw, D, generator=random).to(device, dtype).requires_grad_(backward)
    upstream = torch.randn(batch, R, *out_hw, D, generator=random).to(device, dtype)
    options: dict[str, Any] = {"frame_hw": (FRAME_PX, FRAME_PX), "out_hw": out_hw}

    def finish(pooled: Tensor, tokens: Tensor, upstream: Tensor, targets: Tensor | None) -> Results:
        results = {"pooled": pooled.detach()} | ({} if targets is None else {"targets": targets})
        return results | (_gradients(pooled, {"tokens": tokens}, upstream) if backward else {})

    def ours(backend: Backend) -> Call:
        def call() -> Results:
            if pairs:
                pooled, targets = roi_align_pairs(tokens, moved, **options, backend=backend)
                return finish(pooled, tokens, upstream, targets)
            return finish(roi_align(tokens, moved, **options, backend=backend), tokens, upstream, None)

        return call

    def apart(pool: Callable[..., Tensor]) -> Call:
        return lambda: finish(pool(tokens, boxes), tokens, upstream, pair_targets_reference(boxes) if pairs else None)

    def truth() -> Results:
        """A sample at a time: the definition goes through the whole batch for every region."""
        samples = []
        for b in range(batch):
            sample, box = tokens.detach()[b : b + 1].double().requires_grad_(backward), boxes[b : b + 1]
            pooled = roi_align_reference(sample, box, **options)
            targets = pair_targets_reference(box.double()) if pairs else None
            samples.append(finish(pooled, sample, upstream[b : b + 1].double(), targets))
        return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}

    sides = (boxes[..., 2:] - boxes[..., :2]).amax((0, 1)).tolist()  # (width, height)
    most = tuple(math.ceil(side * n / FRAME_PX / bins + 1e-6) for side, n, bins in zip(sides[::-1], map_hw, out_hw, strict=True))
    batched = partial(_roi_align_batched, out_hw=out_hw, most=most)
    contenders = {
        **_ours(device, ours),
        "eager": KernelContender(call=apart(batched)),
        "compile": KernelContender(call=apart(_compiled(batched)), compiled=True),
        "torchvision": KernelContender(call=apart(_torchvision_round_trip(boxes, map_hw, out_hw))),
    }
    if pairs:
        contenders["apart"] = KernelContender(
            call=lambda: finish(roi_align(tokens, boxes, **options), tokens, upstream, pair_targets(boxes))
        )
    else:
        contenders["torchvision NCHW"] = _torchvision_alone(tokens, boxes, upstream, out_hw, backward)
    passes = 2 if backward else 1
    written = batch * R * out_hw[0] * out_hw[1] * D
    return KernelProblem(
        contenders=contenders,
        truth=truth,
        dtype=dtype,
        bytes_moved=passes * (tokens.numel() + written) * dtype.itemsize + boxes.numel() * 4 + (12 * batch * R * R if pairs else 0),
        operations=passes * batch * R * D * map_hw[1] * out_hw[0] * (map_hw[0] + out_hw[1]) + (20 * batch * R * R if pairs else 0),
        formulas=f"bytes: {passes} x (tokens + result), boxes{' and targets, 12 a pair' if pairs else ''}; operations: {passes} x "
        f"B R D (p H W + p q W) for p x q bins{', 20 a pair' if pairs else ''}",
    )


def render_views_problem(
    batch: int, dtype: torch.dtype, device: torch.device, planted: bool, *, V: int, picture_hw: tuple[int, int], side_px: int
) -> KernelProblem:
    """V views, mirrored or not, of each picture; only pixels that do not see beyond the box are compared, where crop and resize stops."""
    random = torch.Generator().manual_seed(1)
    pictures = [torch.randint(256, (*picture_hw, 3), generator=random, dtype=torch.uint8).to(device) for _ in range(batch)]
    size = torch.randint(side_px, min(picture_hw), (batch, V, 2), generator=random)
    corner = ((torch.tensor(picture_hw[::-1]) - size) * torch.rand(batch, V, 2, generator=random)).floor()
    boxes, flipped = torch.cat([corner, corner + size], -1), torch.rand(batch, V, generator=random) < 0.5
    views, flips = boxes.tolist(), flipped.tolist()  # known beforehand to those who crop picture by picture
    boxes, flipped = boxes.to(device), flipped.to(device)
    upright, moved = torch.zeros_like(flipped, dtype=torch.int64), _moved(boxes) if planted else boxes
    options: dict[str, Any] = {"flipped": flipped, "quarter_turns": upright, "size_px": (side_px, side_px), "dtype": dtype}

    def eager() -> Results:
        crops = []
        for picture, corners, mirrored in zip(pictures, views, flips, strict=True):
            channels = picture.permute(2, 0, 1)
            for (x0, y0, x1, y1), mirror in zip(corners, mirrored, strict=True):
                crop = channels[None, :, int(y0) : int(y1), int(x0) : int(x1)].float()
                view = F.interpolate(crop, (side_px, side_px), mode="bilinear", antialias=True)
                crops.append(view.flip(-1) if mirror else view)
        return {"views": torch.cat(crops).view(batch, V, 3, side_px, side_px).to(dtype)}

    def truth() -> Results:
        each = zip(pictures, boxes, flipped, upright, strict=True)
        exact = [render_views_reference(*arguments, options["size_px"]) for arguments in each]
        return inner({"views": torch.stack(exact)})

    def inner(results: Results) -> Results:
        return {"views": results["views"][..., VIEW_EDGE_PX:-VIEW_EDGE_PX, VIEW_EDGE_PX:-VIEW_EDGE_PX]}

    path: ViewBackend = "triton" if device.type == "cuda" else "native"
    threads = torch.get_num_threads()
    contenders = {
        path: KernelContender(
            call=lambda: {"views": render_views(pictures, moved, **options, backend=path, threads=threads)}, ours=True, settle=inner
        ),
        "eager": KernelContender(call=eager, settle=inner),
    }
    sides = size.double()
    return KernelProblem(
        contenders=contenders,
        truth=truth,
        dtype=dtype,
        bytes_moved=sum(picture.numel() for picture in pictures) + batch * V * 3 * side_px**2 * dtype.itemsize,
        operations=int(6 * (sides.prod(-1) + side_px * sides[..., 1]).sum()),
        formulas="bytes: pictures and views; operations: 3 channels x 2 (box width + view width) box height a view",
    )


def _roi_align_batched(tokens: Tensor, boxes: Tensor, *, out_hw: tuple[int, int], most: tuple[int, ...]) -> Tensor:
    """Compute roi_align_reference's formula for all regions at once, every sample stored; `most` samples a bin, some of them masked."""
    B, H, W, _ = tokens.shape
    x0, x1 = (boxes[..., corner] * (W / FRAME_PX) - 0.5 for corner in (0, 2))  # (B, R)
    y0, y1 = (boxes[..., corner] * (H / FRAME_PX) - 0.5 for corner in (1, 3))
    sample = torch.arange(B, device=tokens.device).view(B, 1, 1, 1)
    region = torch.arange(boxes.shape[1], device=tokens.device).view(1, -1, 1, 1)

    before, after, low, high = _samples(y0, y1, out_hw[0], most[0], H)  # (B, R, p, s)
    exact = tokens.float()
    rows = (exact[sample, before] * low[..., None, None] + exact[sample, after] * high[..., None, None]).sum(3)  # (B, R, p, W, D)
    before, after, low, high = _samples(x0, x1, out_hw[1], most[1], W)  # (B, R, q, s)
    columns = rows.transpose(2, 3)  # (B, R, W, p, D)
    pooled = columns[sample, region, before] * low[..., None, None] + columns[sample, region, after] * high[..., None, None]
    return pooled.sum(3).transpose(2, 3).contiguous().to(tokens.dtype)


def _samples(low: Tensor, high: Tensor, bins: int, most: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the two tokens that each sample of an axis reads, and their weights: (B, R) -> (B, R, bins, most) each."""
    width = ((high - low) / torch.full_like(low, bins))[..., None, None]  # a tensor: CUDA multiplies by the reciprocal of a number
    count = width.ceil()
    bin, s = torch.arange(bins, device=low.device)[:, None], torch.arange(most, device=low.device)
    position = low[..., None, None] + bin * width + (s + 0.5) * width / count
    counts = ((position >= -1) & (position <= size) & (s < count)) / count
    position = position.clamp(0, size - 1)
    before = position.floor().long()
    fraction = position - before
    return before, (before + 1).clamp(max=size - 1), (1 - fraction) * counts, fraction * counts


def _torchvision_round_trip(boxes: Tensor, map_hw: tuple[int, int], out_hw: tuple[int, int]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return torchvision's roi_align from channels-last tokens to channels-last results: to its layout and dtype and back."""
    from torchvision import ops

    regions = _regions(boxes)

    def pool(tokens: Tensor, _: Tensor) -> Tensor:
        maps = tokens.permute(0, 3, 1, 2).contiguous()
        if tokens.device.type == "cuda":
            with torch.autocast("cuda", torch.bfloat16):  # goes to float32 and back
                pooled = ops.roi_align(maps, regions, out_hw, map_hw[1] / FRAME_PX, aligned=True)
        else:
            pooled = ops.roi_align(maps.float(), regions, out_hw, map_hw[1] / FRAME_PX, aligned=True)
        return pooled.to(tokens.dtype).permute(0, 2, 3, 1).reshape(*boxes.shape[:2], *out_hw, -1)

    return pool


def _torchvision_alone(tokens: Tensor, boxes: Tensor, upstream: Tensor, out_hw: tuple[int, int], backward: bool) -> KernelContender:
    """torchvision's roi_align given float32 maps (B, D, H, W), whose results stay as they are: (B * R, D, *out_hw)."""
    from torchvision import ops

    regions, scale = _regions(boxes), tokens.shape[2] / FRAME_PX
    maps = tokens.detach().float().permute(0, 3, 1, 2).contiguous().requires_grad_(backward)
    above = upstream.float().flatten(0, 1).permute(0, 3, 1, 2).contiguous()

    def call() -> Results:
        pooled = ops.roi_align(maps, regions, out_hw, scale, aligned=True)
        return {"pooled": pooled.detach()} | (_gradients(pooled, {"tokens": maps}, above) if backward else {})

    def settle(results: Results) -> Results:
        last = {name: value.permute(0, 2, 3, 1) for name, value in results.items()}
        return last | {"pooled": last["pooled"].reshape(upstream.shape)}

    return KernelContender(call=call, settle=settle)


def _regions(boxes: Tensor) -> Tensor:
    """Return boxes (B, R, 4) as torchvision wants them: (B * R, 5), the sample's number first."""
    sample = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype).repeat_interleave(boxes.shape[1])
    return torch.cat([sample[:, None], boxes.flatten(0, 1)], 1)


def _gradients(value: Tensor, inputs: Mapping[str, Tensor], upstream: Tensor | None) -> Results:
    gradients = torch.autograd.grad(value, list(inputs.values()), upstream)
    return {f"d_{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}


def _ours(device: torch.device, call: Callable[[Backend], Call]) -> dict[str, KernelContender]:
    """Return our paths that a device has: Triton's interpreter is for tests, its speed says nothing."""
    paths: tuple[Backend, ...] = ("triton", "torch") if device.type == "cuda" else ("torch",)
    return {path: KernelContender(call=call(path), ours=True) for path in paths}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled for these very shapes; nothing is compiled before the first call."""
    return torch.compile(function, fullgraph=True, dynamic=False, mode=COMPILE_MODE)


def _boxes(batch: int, each: int, device: torch.device) -> Tensor:
    """Draw boxes inside the frame, sides uniform in SIDE_FRAC of it: (batch, each, 4)."""
    random = torch.Generator().manual_seed(0)
    low, high = (frac * FRAME_PX for frac in SIDE_FRAC)
    size = low + (high - low) * torch.rand(batch, each, 2, generator=random)
    corner = (FRAME_PX - size) * torch.rand(batch, each, 2, generator=random)
    return torch.cat([corner, corner + size], -1).to(device)


def _moved(boxes: Tensor) -> Tensor:
    """Return boxes whose left edge lies elsewhere: an error for the check to find."""
    return boxes - boxes.new_tensor([PLANTED_PX, 0, 0, 0])
