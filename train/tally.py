"""What a run keeps between two lines of its log: losses that nobody has read yet, and where the time went.

Here: the window of updates, which finds a broken one and says whose it was, and the clock.
Not here: what a line of the log holds (reporting.py), when one is due (loop.py).
"""

import contextlib
import math
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from wherefrom.train.ranks import Ranks

# columns of the window: a prefix and a name, or one of these
LOSS, SOUND = "loss", "sound"  # sound is 0 from the first broken update on
TERM, METER, GRADIENT = "term:", "meter:", "gradient:"


class Clock:
    """Seconds by what they were spent on; one spending inside another counts for both."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("updating", "waiting", "writing", "evaluating"), 0.0)

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Count the time inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start

    @property
    def training(self) -> float:
        """Seconds of training: updates with their waiting, and writing; evaluations apart."""
        return self.seconds["updating"] + self.seconds["writing"]


class Window:
    """Losses, norms and meters of the updates since the last line of the log: one row an update, means over ranks.

    They stay on the device until somebody has to know.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.rows: list[dict[str, float]] = []
        self._ranks = ranks
        self._names: tuple[str, ...] = ()
        self._pending: list[tuple[int, Tensor, Tensor]] = []

    def add(self, update: int, values: dict[str, Tensor], samples: Tensor) -> None:
        """Take in an update's values, scalars on the device, and this rank's samples."""
        self._names = tuple(values)
        self._pending.append((update, torch.stack([value.float() for value in values.values()]), samples))

    def settle(self) -> None:
        """Read what is pending.

        Raises: FloatingPointError, on all ranks alike, if an update was broken: its number, terms, samples.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        own = torch.stack([row for _, row, _ in pending])
        mean = own
        if self._ranks.count > 1:
            mean = own.clone()
            dist.all_reduce(mean)
            mean /= self._ranks.count
        for (update, _, samples), own_row, row in zip(pending, own.tolist(), mean.tolist(), strict=True):
            named = dict(zip(self._names, row, strict=True))
            if named[SOUND] < 1:
                raise FloatingPointError(self._complaint(update, dict(zip(self._names, own_row, strict=True)), samples))
            self.rows.append(named)

    def take(self) -> dict[str, float]:
        """Return the means over the window, and empty it."""
        self.settle()
        rows, self.rows = self.rows, []
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}

    def _complaint(self, update: int, row: dict[str, float], samples: Tensor) -> str:
        broken = [name for name, value in row.items() if not math.isfinite(value) and not name.startswith(METER)]
        terms = [name for name in broken if name.startswith(TERM)] or broken
        ids = samples.tolist()
        said = ", ".join(f"{name.removeprefix(TERM)} is {row[name]}" for name in terms)
        more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
        said += f" on rank {self._ranks.rank}, samples {', '.join(map(str, ids[:8]))}{more}"
        by_ranks = [text for text in self._ranks.texts(said if terms else "") if text]
        return f"update {update}: {'; '.join(by_ranks)}; look at these samples, or lower optim.lr. No weight was changed by it"
