"""What only the Triton kernels of ROI pooling can get wrong: their tables of weights to the bit, and offsets past 2^31 elements.

Compared with the torch path's tables, with Python's integers, and with a picture that lies past 2^31 elements in a file with a hole.
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from wherefrom.kernels import roi_align_triton
from wherefrom.kernels.dispatch import interpreted
from wherefrom.kernels.roi_align import ADAPTIVE, AREA, roi_align
from wherefrom.kernels.roi_align_torch import weights_torch
from wherefrom.kernels.roi_align_triton import result_offset, roi_weights_triton, tf32, token_offset

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAST = 2**31


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("samples", [ADAPTIVE, AREA, 1, 3])
@pytest.mark.parametrize("turned", [False, True])
def test_tables_of_weights_equal_the_torch_path_to_the_bit(samples: int, turned: bool) -> None:
    """Both round every operation alone: the number of samples is the same on every device."""
    random = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 12, 2, 2, generator=random) * 300 - 40
    boxes = torch.cat([corners.amin(2), corners.amax(2)], -1)
    boxes[:, :4] = torch.tensor([[0.0, 0, 224, 224], [0, 0, 2000, 3000], [9, 9, 9, 50], [96, 112, 48, 16]])
    turns = torch.randint(-4, 5, (2, 12), generator=random).to(DEVICE) if turned else None
    flipped, valid = torch.rand(2, 2, 12, generator=random).to(DEVICE) < torch.tensor([0.5, 0.8], device=DEVICE).view(2, 1, 1)
    arguments: tuple[Any, ...] = (boxes.to(DEVICE), turns, flipped, valid, (9, 40), (224.0, 240.0), (3, 11), samples)
    for ours, theirs in zip(roi_weights_triton(*arguments), weights_torch(*arguments), strict=True):
        assert torch.equal(ours, theirs)
        assert (ours != 0).any()


class Recorder:
    """Stands in for a kernel: keeps what its launches are compiled by instead of making them."""

    def __init__(self, kernel: Any, unspecialized: Sequence[str] | None = None) -> None:
        self.parameters = inspect.signature(kernel.fn).parameters
        own = kernel.kwargs["do_not_specialize"] if interpreted() else [each.name for each in kernel.params if each.do_not_specialize]
        self.unspecialized = own if unspecialized is None else unspecialized
        self.keys: list[dict[str, Any]] = []

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*given: Any, **named: Any) -> None:
            named |= dict(zip(self.parameters, given, strict=False))
            self.keys.append({name: self.compiled_by(name, value) for name, value in named.items()})

        return launch

    def compiled_by(self, name: str, value: Any) -> Any:
        """Triton compiles anew for every constant, and for integers that are 1, or multiples of 16, unless it is told not to look."""
        if name not in self.parameters or self.parameters[name].annotation is tl.constexpr:
            return value
        if isinstance(value, int) and name not in self.unspecialized:
            return value == 1, value % 16 == 0
        return None


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_size_of_a_map_compiles_another_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {name: getattr(roi_align_triton, name) for name in ("weights_kernel", "contract_kernel")}

    def keys(maps: Sequence[tuple[int, int]], transposed: bool, unspecialized: Sequence[str] | None = None) -> list[list[dict[str, Any]]]:
        recorders = {name: Recorder(kernel, unspecialized) for name, kernel in kernels.items()}
        for name, recorder in recorders.items():
            monkeypatch.setattr(roi_align_triton, name, recorder)
        for map_hw in maps:
            rows, columns = roi_weights_triton(torch.zeros(2, 3, 4), None, None, None, map_hw, (9.0, 9.0), (2, 5), 2)
            source = torch.zeros(2, *((3, 2, 5) if transposed else map_hw), 32, dtype=dtype)
            roi_align_triton.roi_contract_triton(source, rows, columns, None, map_hw, (2, 5), transposed)
        return [recorder.keys for recorder in recorders.values()]

    maps = [(14, 14), (16, 16), (9, 13), (32, 10), (14, 17), (16, 32), (40, 300)]
    for of_kernel in (*keys(maps, False), *keys([*maps, (1, 1), (1, 200), (200, 1)], True)):
        assert len(of_kernel) >= 4 and all(key == of_kernel[0] for key in of_kernel)
    # the control: sizes that Triton looks at
    assert all(key[0] != key[1] for key in keys(maps, False, unspecialized=()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("map_hw", [(3, 2), (5, 7), (7, 20), (1, 33)])
@pytest.mark.parametrize("out_hw", [(1, 1), (9, 1), (2, 33)])
def test_stretches_of_any_map_and_any_bins_sum_what_the_torch_path_does(
    dtype: torch.dtype, map_hw: tuple[int, int], out_hw: tuple[int, int]
) -> None:
    """Rows that two stretches share count once, columns past the last and bins past a table's end not at all."""
    random = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[[0.0, 0, map_hw[1], map_hw[0]], [0.3, 0.2, map_hw[1] - 0.4, map_hw[0] - 0.3]]], device=DEVICE)
    tokens = torch.randn(1, *map_hw, 3, generator=random).to(DEVICE, dtype)
    upstream = torch.randn(1, 2, *out_hw, 3, generator=random).to(DEVICE, dtype)
    found = []
    for backend in ("triton", "torch"):
        leaf = tokens.clone().requires_grad_()
        pooled = roi_align(leaf, boxes, frame_hw=map_hw, out_hw=out_hw, backend=backend)
        pooled.backward(upstream)
        assert leaf.grad is not None
        found.append((pooled.detach().float(), leaf.grad.float()))
    for ours, theirs in zip(*found, strict=True):
        bound = 1e-5 if dtype == torch.float32 else 1 / 64  # the interpreter cuts bfloat16 off
        assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


@triton.jit
def write_tf32(out_ptr, in_ptr, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(out_ptr + place, tf32(tl.load(in_ptr + place)))


def test_two_parts_of_a_float32_hold_it_to_2_to_the_minus_21() -> None:
    """Tensor cores read the 11 leading bits of a number and drop the rest: of the part that is left, only what lies below those is lost."""
    random = torch.Generator().manual_seed(0)
    numbers = torch.randn(1024, generator=random).to(DEVICE) * torch.logspace(-30, 30, 1024).to(DEVICE)
    numbers[:4] = torch.tensor([0.0, float("inf"), -float("inf"), 1 + 2**-11])
    large = torch.full_like(numbers, float("nan"))
    write_tf32[(1,)](large, numbers, N=len(numbers))
    assert torch.equal(large[1:3], numbers[1:3]) and large[3] == 1 + 2**-10  # a half rounds away from zero

    def dropped(values: Tensor) -> Tensor:
        return (values.view(torch.int32) & -0x2000).view(torch.float32)

    assert torch.equal(dropped(large), large)

    def worst(part: Tensor, bits: int) -> bool:
        return bool(((numbers - part).abs()[3:] <= numbers.abs()[3:] * 2.0**-bits).all())

    assert worst(large, 11) and worst(large + dropped(numbers - large), 21)
    # negative controls: one part, and a first part cut off rather than rounded
    assert not worst(large, 12) and not worst(dropped(numbers), 11)


@triton.jit
def write_offsets(out_ptr, y, x, sample, line, stride_b, stride_y, stride_x, lines, D, WIDE: tl.constexpr):
    place = tl.arange(0, 1)
    sample = sample + place
    sample = sample.to(tl.int64) if WIDE else sample.to(tl.int32)
    tl.store(out_ptr + place, token_offset(sample, stride_b, y + place, stride_y, x + place, stride_x))
    tl.store(out_ptr + 1 + place, result_offset(sample, lines, line + place, D).to(tl.int64))


@pytest.mark.core
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_offsets_past_2_to_the_31_do_not_wrap() -> None:
    y, x, sample, line, stride_b, stride_y, stride_x, lines, D = 511, 300, 40_000, 97, 196 * 768, 2**22 + 1, 768, 8 * 49, 768
    expected = [sample * stride_b + y * stride_y + x * stride_x, (sample * lines + line) * D]
    assert min(expected) > PAST
    found = {wide: torch.zeros(2, dtype=torch.int64, device=DEVICE) for wide in (True, False)}
    for wide, out in found.items():
        write_offsets[(1,)](out, y, x, sample, line, stride_b, stride_y, stride_x, lines, D, WIDE=wide)
    assert found[True].tolist() == expected
    assert all(
        wrapped != true for wrapped, true in zip(found[False].tolist(), expected, strict=True)
    )  # as it would be if the number of the picture were not int64


@pytest.mark.skipif(DEVICE == "cuda", reason="a file with a hole is no device memory")
def test_a_picture_past_2_to_the_31_elements_is_read_where_it_lies(tmp_path: Path) -> None:
    H, W, D, step = 2, 3, 4, PAST + 24
    file = torch.from_file(str(tmp_path / "hole"), shared=True, size=step + H * W * D, dtype=torch.bfloat16)
    tokens = file.as_strided((2, H, W, D), (step, W * D, D, 1))
    tokens[1] = torch.randn(H, W, D)
    boxes = torch.tensor([[[0.0, 0, 3, 2]]]).expand(2, 1, 4)
    pooled = roi_align(tokens, boxes, frame_hw=(H, W), out_hw=(2, 2), backend="triton")
    alone = roi_align(tokens[1:].clone(), boxes[1:], frame_hw=(H, W), out_hw=(2, 2), backend="triton")
    assert torch.equal(pooled[1:], alone)
    assert (pooled[0] == 0).all() and (alone != 0).any()


@pytest.mark.core
def test_operators_pass_opcheck_by_triton() -> None:
    boxes = torch.tensor([[[0.0, 0, 2, 3], [1, 1, 3, 2]]], device=DEVICE)
    weights: tuple[Any, ...] = (boxes, None, None, None, [3, 4], [3.0, 4.0], [2, 1], 2, "triton")
    rows, columns = torch.ops.wherefrom.roi_weights(*weights)
    source: Tensor = torch.randn(1, 4, 3, 5, device=DEVICE).transpose(1, 2)
    torch.library.opcheck(torch.ops.wherefrom.roi_weights.default, weights)
    torch.library.opcheck(torch.ops.wherefrom.roi_contract.default, (source, rows, columns, None, [3, 4], [2, 1], False, "triton"))
