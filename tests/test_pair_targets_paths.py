"""Every path of pair targets against its float64 definition: the Triton kernel (interpreted where there is no GPU), torch, compiled."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wherefrom.kernels import pair_targets
from wherefrom.kernels.pair_targets_reference import Axes, PairUnits, PositionUnit, Scale, pair_targets_reference

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pair_targets_triton = pytest.importorskip("wherefrom.kernels.pair_targets_triton").pair_targets_triton
store_pair_targets = pytest.importorskip("wherefrom.kernels.pair_targets_triton").store_pair_targets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def some_boxes(*shape: int, seed: int = 0) -> Tensor:
    """Return boxes (*shape, 4) on the grid of 1/1024 pixel, none with a side under a pixel."""
    draw = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=draw) * 400
    size = 1 + torch.rand(*shape, 2, generator=draw) * 200
    return (torch.cat([corner, corner + size], -1) * 1024).round().div(1024).to(DEVICE)


def everything(
    samples: int, boxes: int, *, position: PositionUnit = "reference", scale: Scale = "log_area", axes: Axes = "view", seed: int = 0
) -> dict[str, Any]:
    """Return an orientation for every box, picture sizes, and units with numbers to standardize by."""
    draw = torch.Generator().manual_seed(seed)
    channels = len(PairUnits(scale=scale).channels)
    values = {
        "flipped": torch.rand(samples, boxes, generator=draw) < 0.5,
        "quarter_turns": torch.randint(0, 4, (samples, boxes), generator=draw, dtype=torch.uint8),
        "picture_hw": torch.randint(300, 800, (samples, 2), generator=draw, dtype=torch.int32),
    }
    mean, std = torch.rand(channels, generator=draw).to(DEVICE), 0.5 + torch.rand(channels, generator=draw).to(DEVICE)
    units = PairUnits(position=position, scale=scale, axes=axes, mean=mean, std=std)
    return {name: value.to(DEVICE) for name, value in values.items()} | {"units": units}


def assert_no_worse_than_eager(out: Tensor, boxes: Tensor, pairs: Tensor | None, **options: Any) -> None:
    """Hold an output to twice eager float32's error plus 4 ulp of the largest value, both against float64."""
    exact = pair_targets_reference(boxes.double(), pairs, **options)
    eager = (pair_targets_reference(boxes.float(), pairs, **options).double() - exact).abs().max()
    ulp = math.ulp(float(exact.abs().max())) * 2**29  # of float32
    assert out.dtype == torch.float32
    assert (out.double() - exact).abs().max() <= 2 * eager + 4 * ulp


@pytest.mark.core
@pytest.mark.parametrize("position", ["reference", "picture", "mean"])
@pytest.mark.parametrize("scale", ["log_area", "log_sides", "ratio", "none"])
@pytest.mark.parametrize("axes", ["view", "source"])
@pytest.mark.parametrize("chosen", [False, True])
def test_the_kernel_gives_every_option(position: PositionUnit, scale: Scale, axes: Axes, chosen: bool) -> None:
    boxes = some_boxes(2, 5)
    options = everything(2, 5, position=position, scale=scale, axes=axes)
    pairs = torch.tensor([[0, 1], [4, 2], [3, 3]], device=DEVICE) if chosen else None
    out = pair_targets(boxes, pairs, **options, backend="triton")
    assert_no_worse_than_eager(out, boxes, pairs, **options)
    jumbled = boxes + 0.5 * torch.rand(2, 5, 1, device=DEVICE)
    with pytest.raises(AssertionError):  # half a pixel is seen
        assert_no_worse_than_eager(out, jumbled, pairs, **options)


@pytest.mark.parametrize("count", [1, 2, 17, 63])
def test_the_kernel_takes_any_number_of_boxes(count: int) -> None:
    boxes = some_boxes(3, count)
    out = pair_targets(boxes, backend="triton")
    assert out.shape == (3, count, count, 3)
    assert_no_worse_than_eager(out, boxes, None)


def test_all_38416_pairs_of_a_vit() -> None:
    boxes = some_boxes(1, 196)
    assert_no_worse_than_eager(pair_targets(boxes, backend="triton"), boxes, None)


@given(seed=st.integers(0, 2**32 - 1), samples=st.integers(1, 3), boxes=st.integers(1, 6))
@settings(max_examples=10)
def test_the_kernel_repeats_bit_for_bit_and_takes_any_strides(seed: int, samples: int, boxes: int) -> None:
    plain = some_boxes(samples, boxes, seed=seed)
    strided = torch.stack([plain, plain * 2], -1)[..., 0]
    options = everything(samples, boxes, seed=seed)
    first = pair_targets(plain, **options, backend="triton")
    assert torch.equal(first, pair_targets(strided, **options, backend="triton"))
    assert torch.equal(first, pair_targets(plain, **options, backend="triton"))
    expanded = plain[:1].expand(samples, boxes, 4)
    assert_no_worse_than_eager(pair_targets(expanded, backend="triton"), expanded, None)


def test_degenerate_boxes_give_what_the_definition_gives() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [5, 5, 5, 8], [9, 9, 2, 2], [math.nan, 0, 4, 4]], device=DEVICE)[None]
    torch.testing.assert_close(
        pair_targets(boxes, backend="triton"), pair_targets_reference(boxes.double()).float(), equal_nan=True, rtol=1e-6, atol=1e-6
    )


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(math.nan))
    for units in (PairUnits(), PairUnits(scale="log_sides")):
        assert pair_targets(some_boxes(2, 17), units=units, backend="triton").isfinite().all()


def test_leading_axes_may_be_many_or_none() -> None:
    boxes = some_boxes(2, 3, 4)
    torch.testing.assert_close(pair_targets(boxes, backend="triton"), pair_targets(boxes, backend="torch"))
    torch.testing.assert_close(pair_targets(boxes[0, 0], backend="triton"), pair_targets(boxes[0, 0], backend="torch"))
    nothing = pair_targets(boxes[:0], backend="triton")
    assert nothing.shape == (0, 3, 4, 4, 3)
    assert pair_targets(boxes, torch.empty(0, 2, dtype=torch.int64, device=DEVICE), backend="triton").shape == (2, 3, 0, 3)


@triton.jit
def write_far_sample(out_ptr, boxes_ptr, sample, N, P, PAIRS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write sample `sample`, an int32, with pointers so far before the tensors that only right offsets land in them."""
    far = sample.to(tl.int64)
    out_ptr, boxes_ptr = out_ptr - far * P * 3, boxes_ptr - far * N * 4
    store_pair_targets(
        out_ptr, boxes_ptr, boxes_ptr, boxes_ptr, boxes_ptr, boxes_ptr, boxes_ptr, boxes_ptr,
        sample, 0, N, P, "reference", "log_area", False, False, False, False, False, False, PAIRS,
    )  # fmt: skip


def test_the_kernels_offsets_pass_two_to_the_31() -> None:
    boxes, out = some_boxes(1, 4), torch.full((1, 4, 4, 3), math.nan, device=DEVICE)
    write_far_sample[(1,)](out, boxes, 2**30, 4, 16, 16)  # wrapped in 32 bits, the offsets would be 0 and the process dead
    assert_no_worse_than_eager(out, boxes, None)


@pytest.mark.core
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiled_whole_it_gives_the_same(backend: str) -> None:
    boxes, options = some_boxes(2, 5), everything(2, 5)
    call = torch.compile(lambda b: pair_targets(b, **options, backend=backend), fullgraph=True)  # type: ignore[arg-type]
    torch.testing.assert_close(call(boxes), pair_targets(boxes, **options), rtol=1e-6, atol=1e-6)


@pytest.mark.core
def test_the_operator_passes_pytorchs_own_check() -> None:
    boxes = some_boxes(2, 5)
    arguments = (boxes, None, None, None, None, None, None, "reference", "log_area", "view", "triton")
    torch.library.opcheck(torch.ops.wherefrom.pair_targets.default, arguments)


@pytest.mark.core
def test_gradients_of_any_order_reach_the_boxes() -> None:
    boxes = some_boxes(1, 3).double().requires_grad_()
    scale = torch.rand(3, 3, 3, device=DEVICE, dtype=torch.float64)
    wanted = torch.func.grad(lambda b: (pair_targets_reference(b) * scale).sum())(boxes.detach())
    got = torch.func.grad(lambda b: (pair_targets(b) * scale).sum())(boxes.detach())
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
    assert torch.autograd.gradgradcheck(lambda b: pair_targets(b, backend="reference"), (boxes,))


@pytest.mark.core
def test_autocast_changes_nothing() -> None:
    boxes = some_boxes(2, 5)
    plain = pair_targets(boxes, backend="triton")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(pair_targets(boxes, backend="triton"), plain)


@pytest.mark.core
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "cuda"}, "backend='cuda': take one of auto, triton, torch, reference"),
        ({"boxes": torch.zeros(4, 4, dtype=torch.bfloat16)}, "boxes is bfloat16, expected float32 or float64"),
        ({"pairs": torch.zeros(3, 2)}, "pairs is float32, expected int64 or int32"),
        ({"pairs": torch.tensor([[0, 1], [2, 4]])}, r"pairs\[1\] is \(2, 4\), boxes are numbered 0 to 3"),
        ({"pairs": torch.tensor([[0, -1]])}, r"pairs\[0\] is \(0, -1\), boxes are numbered 0 to 3"),
        ({"flipped": torch.zeros(4, device="meta").bool()}, "flipped is on meta, boxes on cpu; move one of them"),
        ({"boxes": torch.zeros(4, 4, requires_grad=True), "backend": "triton"}, "boxes requires a gradient"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], words: str) -> None:
    arguments = {"boxes": torch.zeros(4, 4), "pairs": None} | change
    with pytest.raises(ValueError, match=words):
        pair_targets(arguments.pop("boxes"), arguments.pop("pairs"), **arguments)


def test_a_pair_that_names_no_box_reads_nothing() -> None:
    boxes = some_boxes(2, 3)
    pairs = torch.tensor([[0, 1], [0, 3], [2**40, 0], [1, -7]], device=DEVICE)
    out = pair_targets_triton(boxes, pairs, PairUnits(), None, None, None)
    assert out[:, 0].isfinite().all()
    assert out[:, 1:].isnan().all()


@pytest.mark.parametrize(
    "backend", ["torch", pytest.param("triton", marks=pytest.mark.filterwarnings("ignore::RuntimeWarning")), "reference"]
)
@pytest.mark.parametrize("box", [(math.nan,) * 4, (0, 0, 5, math.nan), (0, 0, math.inf, 5), (3, 3, 3, 3)])
def test_a_box_without_a_size_spoils_its_own_pairs_and_no_others(box: tuple[float, ...], backend: Any) -> None:
    boxes = some_boxes(1, 4)
    clean = pair_targets(boxes, backend=backend)
    boxes[0, 2] = torch.tensor(box)
    targets = pair_targets(boxes, backend=backend)
    own = torch.zeros(4, 4, dtype=torch.bool, device=DEVICE)
    own[2], own[:, 2] = True, True
    assert not targets[0, own].isfinite().all(-1).any()
    assert torch.equal(targets[0, ~own], clean[0, ~own])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_derivatives_of_boxes_are_right_or_refused_and_never_0(backend: Any) -> None:
    boxes, along = some_boxes(2, 3), some_boxes(2, 3, seed=1)

    def targets(boxes: Tensor) -> Tensor:
        return pair_targets(boxes, flipped=torch.tensor([[True, False, True]] * 2, device=DEVICE), backend=backend)

    exact = torch.func.jvp(lambda boxes: pair_targets(boxes, backend="reference"), (boxes,), (along,))[1].abs()
    transforms: list[Any] = [
        lambda: torch.func.jvp(targets, (boxes,), (along,))[1],
        lambda: torch.func.jvp(torch.vmap(targets), (boxes[None],), (along[None],))[1][0],
        lambda: torch.func.jacfwd(targets)(boxes).flatten(-3) @ along.flatten(),
        lambda: torch.func.jacrev(targets)(boxes).flatten(-3) @ along.flatten(),
    ]
    torch.testing.assert_close(torch.vmap(targets)(boxes[None])[0], targets(boxes))
    for transform in transforms:
        if backend == "triton":
            with pytest.raises((ValueError, RuntimeError), match=r'backend="triton".*; use backend="torch"$'):
                transform()
        else:
            torch.testing.assert_close(transform().abs().double(), exact, rtol=1e-4, atol=1e-4)
