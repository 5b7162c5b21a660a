"""PART in one dimension: python examples/part_1d.py. How far apart two windows of a recording lie, learned in a minute on any CPU.

A window of a signal is a box of height one, from its first step to the one behind its last; `pair_loss` does the rest, as for pictures.
Source: PART, arXiv 2506.03682, and on signals PARS, arXiv 2511.11940, whose target was read in a third party's code: (t_j - t_i) / (T - 1)
of windows that begin at t_i and t_j of T steps. PARS lets windows see one another; here each is embedded alone, so one knows no other.
Data: two files of the package aeon (1.6.0 was read, BSD-3-Clause), by default JapaneseVowels: 640 times /ae/ by 9 men, 12 cepstral
coefficients in 7 to 29 steps of 6.4 ms; Kudo, Toyama, Shimbo, doi 10.24432/C5NS47. UCI's policy is CC BY 4.0; aeon names no license of it.
"""

import argparse
import copy
import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherefrom.kernels import PairLoss, PairUnits, pair_loss

UNITS = PairUnits(position="picture", scale="none")  # the picture is T - 1 wide
HEADS = ("both", "apart", "first", "second")  # what a head sees of two windows: both, f(first) + g(second), one of them alone
COLUMNS = (*HEADS, "raw, 3", "raw", "random, 3", "random", "trained, 3", "trained")
Split = tuple[list[Tensor], Tensor]  # signals, each (C, T), and their classes (N,)


def read_signals(path: Path) -> tuple[list[Tensor], list[str]]:
    """Return signals (C, T) and class names of a .ts file: a line is channels, then the class, between colons; what is missing is "?"."""
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] not in "#@")
    rows = [line.replace("?", "nan").split(":") for line in lines]
    signals = [torch.tensor([[float(value) for value in channel.split(",")] for channel in channels]) for *channels, _ in rows]
    return signals, [name for *_, name in rows]


def bundled_signals(name: str, window: int) -> tuple[Split, Split]:
    """Return the archive's training set and its test set, channels by the first's mean and deviation."""
    found = importlib.util.find_spec("aeon")  # found, not imported: that takes all that it needs itself
    folder = Path((found and found.origin) or "__init__.py").parent / "datasets" / "data" / name
    if not folder.is_dir():
        raise ValueError(f"{name} lies in the package aeon, which is not here, or has none: pip install --no-deps 'aeon>=1.6'")
    (train, train_names), (test, test_names) = (read_signals(folder / f"{name}_{part}.ts") for part in ("TRAIN", "TEST"))
    check_signals([*train, *test], window)
    std, mean = torch.std_mean(torch.cat(train, 1), 1, keepdim=True)
    classes = sorted({*train_names})
    train_y, test_y = (torch.tensor([classes.index(label) for label in names]) for names in (train_names, test_names))
    return ([(signal - mean) / std for signal in train], train_y), ([(signal - mean) / std for signal in test], test_y)


def check_signals(signals: list[Tensor], window: int) -> None:
    """Raise ValueError unless signals, each (C, T), are finite, of as many channels, and longer than a window."""
    for number, signal in enumerate(signals):
        if len(signal) != len(signals[0]):
            raise ValueError(f"signal {number} has {len(signal)} channels, signal 0 has {len(signals[0])}; leave one of them out")
        if not 1 <= window < signal.shape[1]:
            raise ValueError(f"window={window}: signal {number} has {signal.shape[1]} steps; take 1 to {signal.shape[1] - 1}")
        if not signal.isfinite().all():
            channel, step = (~signal.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"signal {number} is {signal[channel, step]:g} at step {step} of channel {channel}; fill it, or leave it out")


def draw_windows(signals: list[Tensor], window: int, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw N windows a signal, uniform over all places: windows (B, N, C, W), boxes (B, N, 4) in steps, picture_hw (B, 2)."""
    steps = torch.tensor([signal.shape[1] for signal in signals])
    start = (torch.rand(len(signals), number, dtype=torch.float64, generator=generator) * (steps - window + 1).unsqueeze(1)).long()
    windows = torch.stack([signal.unfold(1, window, 1)[:, row].transpose(0, 1) for signal, row in zip(signals, start, strict=True)])
    boxes = torch.stack([start, torch.zeros_like(start), start + window, torch.ones_like(start)], -1)
    return windows, boxes.float(), torch.stack([torch.ones_like(steps), steps - 1], -1).float()


class PairHead(nn.Module):
    """W act(a_r + b_t) + c, a two-layer MLP of two embeddings; or of less, which tells what less is worth."""

    def __init__(self, width: int, hidden: int, sees: str) -> None:
        super().__init__()
        self.sees, self.of_first, self.of_second = sees, nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.out = nn.Linear(hidden * (2 if sees == "apart" else 1), len(UNITS.channels))

    def loss(self, z: Tensor, boxes: Tensor, picture_hw: Tensor) -> PairLoss:
        """Return the loss over all pairs of two windows, embedded as z (B, N, D); boxes of one height differ in x alone."""
        a, b = self.of_first(z), self.of_second(z)
        if self.sees == "apart":  # act(a + 0) and act(0 + b) side by side
            a, b = F.pad(a, (0, a.shape[-1])), F.pad(b, (b.shape[-1], 0))
        elif self.sees != "both":
            a, b = (a, torch.zeros_like(b)) if self.sees == "first" else (torch.zeros_like(a), b)
        head = {"weight": self.out.weight, "output_bias": self.out.bias, "channel_weights": z.new_tensor([1.0, 0.0])}
        return pair_loss(a, b, boxes, pairs="others", units=UNITS, picture_hw=picture_hw, **head)


def train(encoder: nn.Module, heads: list[PairHead], signals: list[Tensor], window: int, *, updates: int, freeze: bool) -> None:
    """Teach heads, and the encoder unless told to freeze it, how 8 windows of each of 64 signals lie."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    optimizer = torch.optim.AdamW(nn.ModuleList([*heads, *([] if freeze else [encoder])]).parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=updates)
    for _ in range(updates):
        rows = torch.randint(len(signals), (64,), generator=generator).tolist()
        windows, boxes, picture_hw = draw_windows([signals[row] for row in rows], window, 8, generator)
        with torch.set_grad_enabled(not freeze):
            z = encoder(windows)
        optimizer.zero_grad()
        torch.stack([head.loss(z, boxes, picture_hw).loss for head in heads]).sum().backward()
        optimizer.step()
        schedule.step()


def probe(network: nn.Module, train_set: Split, test_set: Split, window: int, labels: int) -> float:
    """Return the accuracy of ridge regression from windows' mean features onto classes, by so many labels of each: the mean of 10 draws."""
    (x, y), (tested, right) = (
        (torch.stack([network(signal.unfold(1, window, 1).transpose(0, 1)).mean(0) for signal in signals]).double(), classes)
        for signals, classes in (train_set, test_set)
    )
    accuracy = 0.0
    for draw in range(10):
        mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(draw))
        rows = torch.cat([mixed[y[mixed] == label][:labels] for label in y.unique()])
        std, mean = torch.std_mean(x[rows], 0)
        a, b = (F.pad((features - mean) / (std + 1e-6), (0, 1), value=1.0) for features in (x[rows], tested))
        weights = torch.linalg.solve(a.mT @ a + 1e-2 * len(a) * torch.eye(a.shape[1]).double(), a.mT @ F.one_hot(y[rows]).double())
        accuracy += float(((b @ weights).argmax(-1) == right).double().mean()) / 10
    return accuracy


def compare(train_set: Split, test_set: Split, window: int, updates: int) -> list[float]:
    """Return the numbers of COLUMNS: R2 of relative position by heads that see more or less, accuracies by 3 labels a class and by all."""
    layers = (nn.Linear(len(train_set[0][0]) * window, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.LayerNorm(64))
    encoder = nn.Sequential(nn.Flatten(-2), *layers)  # (..., C, W) -> (..., D)
    untrained, heads = copy.deepcopy(encoder), [PairHead(64, 128, sees) for sees in HEADS]
    train(encoder, [PairHead(64, 128, "both")], train_set[0], window, updates=updates, freeze=False)
    train(encoder, heads, train_set[0], window, updates=updates, freeze=True)  # all alike, on the same embeddings
    with torch.no_grad():
        windows, *places = draw_windows(test_set[0], window, 16, torch.Generator().manual_seed(0))
        r2 = [float(head.loss(encoder(windows), *places).r2[0]) for head in heads]
        networks = (nn.Flatten(-2), untrained, encoder)
        return r2 + [probe(network, train_set, test_set, window, labels) for network in networks for labels in (3, len(train_set[0]))]


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--set", choices=("JapaneseVowels", "BasicMotions"), default="JapaneseVowels")
    for name, default, words in (("window", 3, "its steps"), ("updates", 300, "of each training"), ("seeds", 3, "lines of the table")):
        options.add_argument(f"--{name}", type=int, default=default, help=words)
    chosen = options.parse_args()
    try:
        data = bundled_signals(chosen.set, chosen.window)
    except ValueError as error:
        sys.exit(f"part_1d.py: {error}")
    print("".join(f"{name:>12}" for name in COLUMNS))
    for seed in range(chosen.seeds):
        torch.manual_seed(seed)  # of the networks and of the draws
        print("".join(f"{number:12.3f}" for number in compare(*data, chosen.window, chosen.updates)), flush=True)
