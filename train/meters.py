"""What a run keeps between two lines of its log: losses that nobody has read yet, and where the time went.

Here: the window of updates, which finds a broken one and says whose it was, and the clock.
Not here: what a line of the log holds (reporting.py), when one is due (loop.py).
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from wherefrom.train.ranks import Ranks

# columns of the window: a prefix and a name, or one of these
LOSS, FINITE = "loss", "finite"  # finite is 0 from the first update on whose loss or gradient is not
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

    They stay on the device until somebody has to know. A row may have other names than the one before, and on one rank others than on
    another: every mean is over those that have the name.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.rows: list[dict[str, float]] = []
        self._ranks = ranks
        self._pending: list[tuple[int, tuple[str, ...], Tensor, Tensor]] = []

    def add(self, update: int, values: dict[str, Tensor], samples: Tensor) -> None:
        """Take in an update's values, scalars on the device, and this rank's samples."""
        self._pending.append((update, tuple(values), torch.stack([value.float() for value in values.values()]), samples))

    def settle(self) -> None:
        """Read what is pending.

        Raises: FloatingPointError, on all ranks alike, if an update was broken: its number, terms, samples.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        by_ranks = self._names_by_ranks([names for _, names, _, _ in pending])
        columns = list(dict.fromkeys(name for rows in by_ranks for names in rows for name in names))
        own = torch.stack([_in_columns(names, values, columns) for _, names, values, _ in pending])
        total = own
        if self._ranks.count > 1:
            total = own.clone()
            dist.all_reduce(total)
        for number, ((update, names, _, samples), own_row, row) in enumerate(zip(pending, own.tolist(), total.tolist(), strict=True)):
            ranks_with = {name: sum(name in rows[number] for rows in by_ranks) for name in columns}
            means = {name: value / ranks_with[name] for name, value in zip(columns, row, strict=True) if ranks_with[name]}
            if means[FINITE] < 1:
                own_values = dict(zip(columns, own_row, strict=True))
                raise FloatingPointError(self._complaint(update, {name: own_values[name] for name in names}, samples))
            self.rows.append(means)

    def take(self) -> dict[str, float]:
        """Return the means over the window, each over the updates that have its name, and empty it."""
        self.settle()
        rows, self.rows = self.rows, []
        values_of: dict[str, list[float]] = {}
        for row in rows:
            for name, value in row.items():
                values_of.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in values_of.items()}

    def _names_by_ranks(self, rows: list[tuple[str, ...]]) -> list[list[tuple[str, ...]]]:
        """Return the names of every rank's rows."""
        distinct = list(dict.fromkeys(rows))
        texts = self._ranks.texts(json.dumps({"distinct": distinct, "rows": [distinct.index(names) for names in rows]}))
        tables = [json.loads(text) for text in texts]
        return [[tuple(one["distinct"][number]) for number in one["rows"]] for one in tables]

    def _complaint(self, update: int, row: dict[str, float], samples: Tensor) -> str:
        not_finite = [name for name, value in row.items() if not math.isfinite(value) and not name.startswith(METER)]
        terms = [name for name in not_finite if name.startswith(TERM)] or not_finite
        ids = samples.tolist()
        complaint = ", ".join(f"{name.removeprefix(TERM)} is {row[name]}" for name in terms)
        more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
        complaint += f" on rank {self._ranks.rank}, samples {', '.join(map(str, ids[:8]))}{more}"
        by_ranks = [text for text in self._ranks.texts(complaint if terms else "") if text]
        return f"update {update}: {'; '.join(by_ranks)}; look at these samples, or lower optim.lr. No weight was changed by it"


def _in_columns(names: Sequence[str], values: Tensor, columns: Sequence[str]) -> Tensor:
    """Return `values` (n,), called `names`, as a row of all columns, 0 where there is none."""
    if list(names) == list(columns):
        return values
    row = values.new_zeros(len(columns))
    row[torch.tensor([columns.index(name) for name in names], device=values.device)] = values
    return row
