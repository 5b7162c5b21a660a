"""Small problems stay in the thread that asks, counted by the threads that the system knows of: OpenMP makes its others when first needed.

In a process of its own: in the tests' process they are there already.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ASKED = """
import os
import torch
from wherefrom.kernels import pair_loss, pair_targets, roi_align, roi_align_pairs

torch.set_num_threads(3)
seeded = torch.Generator().manual_seed(0)
corners = torch.rand(64, 6, 2, generator=seeded) * 100
boxes = torch.cat([corners, corners + 20 + 100 * torch.rand(64, 6, 2, generator=seeded)], -1)


def threads():
    return len(os.listdir("/proc/self/task"))


def pooled(samples, width):
    tokens = torch.randn(samples, 7, 7, width, generator=seeded, requires_grad=True)
    roi_align(tokens, boxes[:samples], frame_hw=224, out_hw=4).sum().backward()
    roi_align_pairs(tokens, boxes[:samples], frame_hw=224, out_hw=4)[0].sum().backward()


def lost(samples, width):
    a, b = (torch.randn(samples, 6, width, generator=seeded, requires_grad=True) for _ in "ab")
    weight, output_bias = torch.randn(3, width, generator=seeded, requires_grad=True), torch.zeros(3, requires_grad=True)
    for each in (False, True):
        pair_loss(a, b, boxes[:samples], weight=weight, output_bias=output_bias, per_sample=each).loss.sum().backward()


torch.ones(2, requires_grad=True).sum().backward()
before = threads()
pair_targets(boxes)
for width in (8, 32):  # what is done here with the results stays below what PyTorch shares out
    pooled(8, width)
    lost(16, width)
print(threads() - before, torch.get_num_threads())
LARGE
print(threads() - before)
"""


@pytest.mark.core
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
@pytest.mark.parametrize("large", ["pooled(64, 768)", "lost(64, 512)"])
def test_small_problems_wake_no_other_thread(large: str) -> None:
    done = subprocess.run([sys.executable, "-c", ASKED.replace("LARGE", large)], capture_output=True, text=True, check=True)
    woken, left, woken_by_large = done.stdout.split()
    assert (woken, left) == ("0", "3")
    assert int(woken_by_large) >= 2  # those that a large problem is shared out to


def test_second_derivatives_of_a_small_pair_loss_are_those_of_its_definition() -> None:
    import torch

    from wherefrom.kernels import pair_loss

    seeded = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 3, 2, generator=seeded) * 100
    boxes = torch.cat([corners, corners + 20], -1)
    given = [torch.randn(shape, generator=seeded) for shape in ((2, 3, 8), (2, 3, 8), (3, 8), (3,))]
    found = []
    for backend in ("auto", "reference"):
        a, b, weight, output_bias = (value.clone().requires_grad_() for value in given)
        loss = pair_loss(a, b, boxes, weight=weight, output_bias=output_bias, backend=backend).loss  # type: ignore[arg-type]
        (slope,) = torch.autograd.grad(loss, a, create_graph=True)
        slope.square().sum().backward()
        found.append([value.grad for value in (a, b, weight)])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().max() > 0
