"""What the samples of all ranks say together: gathering with gradient, means, BatchNorm. One process is a group of one.

Here: what an objective computes with, over the default group and on any device that the group serves.
Not here: what the hosts agree on (ranks.py); gradients of weights, whose mean over ranks DDP takes.
Convention: every rank has as many samples, and the loss is the mean of what the ranks return. With DDP's mean of gradients that is the
loss, and the gradient, of one process that has the whole batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

KNOWN = (_BatchNorm.forward, nn.SyncBatchNorm.forward, BatchNormAct2d.forward)  # what BatchNormOverRanks computes, too

_alone = False  # whether this rank computes by itself for now


def rank_count() -> int:
    """Return how many ranks there are."""
    return dist.get_world_size() if not _alone and dist.is_available() and dist.is_initialized() else 1


@contextmanager
def this_rank_alone() -> Iterator[None]:
    """Let this rank compute as if there were no other: evaluation on one rank must not wait for those that wait for it."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def own_rank() -> int:
    """Return which of the ranks this is, counted from 0: a gathered tensor's rows from `own_rank() * n` on are its own."""
    return dist.get_rank() if rank_count() > 1 else 0


def gathered(tensor: Tensor) -> Tensor:
    """Return what all ranks bring, one after the other, with gradient: (n, ...) each -> (ranks * n, ...).

    A row's gradient is the sum of what all ranks say of it.
    """
    return tensor if rank_count() == 1 else _gather(tensor)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean of what all ranks bring, of any shape, with gradient."""
    return tensor if rank_count() == 1 else _mean(tensor)


def share_of_counted(counted: Tensor) -> Tensor | float:
    """Return by what a mean over so many of this rank is multiplied so that the ranks' mean is that over all; 1 of one rank."""
    return 1.0 if rank_count() == 1 else counted / mean_over_ranks(counted.float()).clamp(min=1 / rank_count())


def mean_of_counted(values: Tensor, counted: Tensor) -> Tensor:
    """Return the mean of `values` where `counted`, both of one shape; 0 where none counts. The ranks' mean of it is that over all ranks."""
    number = mean_over_ranks(counted.sum().to(values.dtype)).clamp(min=1 / rank_count())
    return (values * counted).sum() / number


class BatchNormOverRanks(_BatchNorm):
    """BatchNorm by mean and variance of all ranks' samples: (n, C, ...) -> the same. Of one rank it is torch's own, bit for bit.

    On any device, where torch's SyncBatchNorm needs a GPU. The ranks' means and variances are gathered, and put together as in one batch.
    Source: SyncBatchNorm as PyTorch 2 has it.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"BatchNorm of shape {tuple(input.shape)}: needs (n, C, ...)")

    def forward(self, input: Tensor) -> Tensor:
        """Normalize; in training remember mean and variance, unless `track_running_stats` is off."""
        if not self.training or rank_count() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        axes = [0, *range(2, input.ndim)]
        own_variance, own_mean = torch.var_mean(wide, axes, correction=0)
        means, variances = gathered(torch.stack([own_mean, own_variance])[None]).unbind(1)  # (ranks, C) each
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        if self.track_running_stats and self.running_mean is not None:
            self._remember(mean.detach(), variance.detach(), count=rank_count() * input.numel() // input.shape[1])
        per_channel = (-1, *[1] * (input.ndim - 2))
        scale = (variance + self.eps).rsqrt() * (1 if self.weight is None else self.weight)
        normed = (wide - mean.view(per_channel)) * scale.view(per_channel)
        return (normed if self.bias is None else normed + self.bias.view(per_channel)).to(input.dtype)

    def _remember(self, mean: Tensor, variance: Tensor, *, count: int) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        for running, value in ((self.running_mean, mean), (self.running_var, variance * (count / (count - 1)))):
            share = 1 / self.num_batches_tracked.to(running.dtype) if self.momentum is None else self.momentum
            running.lerp_(value.to(running.dtype), share)


class _BatchNormActOverRanks(BatchNormOverRanks):
    """timm's BatchNorm with what it does afterwards."""

    def __init__(self, plain: BatchNormAct2d, **options: Any) -> None:
        super().__init__(plain.num_features, **options)
        self.drop, self.act = plain.drop, plain.act

    def forward(self, input: Tensor) -> Tensor:
        """Normalize, drop, activate."""
        return self.act(self.drop(super().forward(input)))


def batch_norm_over_ranks(module: nn.Module) -> nn.Module:
    """Let every BatchNorm of a module normalize over all ranks, in place; return the module, or what stands for it if it is one itself.

    Weights and statistics keep their names and values. A class of somebody's own, with a forward of its own, stays as it is.
    `Step` does this to its encoder and its objectives.
    """
    if isinstance(module, _BatchNorm) and type(module).forward in KNOWN:
        return _converted(module)
    for name, child in module.named_children():
        if (converted := batch_norm_over_ranks(child)) is not child:
            setattr(module, name, converted)
    return module


def _converted(plain: _BatchNorm) -> BatchNormOverRanks:
    options = {name: getattr(plain, name) for name in ("eps", "momentum", "affine", "track_running_stats")}
    if isinstance(plain, BatchNormAct2d):
        converted: BatchNormOverRanks = _BatchNormActOverRanks(plain, **options)
    else:
        converted = BatchNormOverRanks(plain.num_features, **options)
    for name, parameter in plain.named_parameters(recurse=False):
        setattr(converted, name, parameter)
    for name, buffer in plain.named_buffers(recurse=False):
        setattr(converted, name, buffer)
    return converted.train(plain.training)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(rank_count())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(rank_count())[own_rank()]


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total / rank_count()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Mean.forward(ctx, gradient)


@torch.compiler.disable
def _gather(tensor: Tensor) -> Tensor:
    return _Gather.apply(tensor.contiguous())


@torch.compiler.disable
def _mean(tensor: Tensor) -> Tensor:
    return _Mean.apply(tensor)
