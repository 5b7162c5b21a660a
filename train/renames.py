"""Settings of earlier versions under today's names: the one place that knows what they were called.

Here: what 0.1.0 wrote into settings.yaml, or read from a file written by hand.
Not here: whether the values are any good (plain_data.py); checkpoints of earlier versions, which are refused (checkpoint.py).
"""

import copy
from typing import Any

LAW_FIELDS = {  # of 0.1.0: the laws that there were, and what belonged to which; every file held all of it
    "paired": ("position_max", "position_min", "log_scale_max", "side_frac", "aspect_jitter", "border_frac"),
    "disjoint": ("area_frac", "aspect", "min_gap_frac"),
    "independent": ("area_frac", "aspect"),
}
FLAT = tuple(dict.fromkeys(name for names in LAW_FIELDS.values() for name in names))
OBJECTIVES = ("spatial", "dense")  # of 0.1.0, the host first
RENAMED = {  # of 0.1.0, in this order: where a setting was -> where it is
    "spatial.colour": "spatial.color",
    "spatial.color.grey_prob": "spatial.color.gray_prob",
    "spatial.color.solarise_prob": "spatial.color.solarize_prob",
    "spatial.equalise_px": "spatial.equalize_px",
    "spatial.standardise": "spatial.standardize",
    "spatial.law": "spatial.law.name",
    **{f"spatial.{name}": f"spatial.law.{name}" for name in FLAT},
    "dense.colour": "dense.color",
    "dense.color.grey_prob": "dense.color.gray_prob",
    "dense.color.solarise_prob": "dense.color.solarize_prob",
    "dense.standardise": "dense.standardize",
}


def current(plain: dict[str, Any]) -> dict[str, Any]:
    """Return named settings under today's names; what has no other name stays where it is.

    Raises: ValueError in one line if something is named twice, as 0.1.0 called it and as it is called today.
    """
    names = copy.deepcopy(plain)
    spatial = names.get("spatial")
    if isinstance(spatial, dict) and spatial.get("law") in list(LAW_FIELDS):
        _leave_to_the_law(spatial)
    for old, new in RENAMED.items():
        _move(names, old.split("."), new.split("."))
    for objective in (names.get(name) for name in OBJECTIVES):
        if isinstance(objective, dict) and {"weight_position", "weight_scale"} <= objective.keys():
            objective.setdefault("weight", 1.0)  # 0.1.0 had weights of the terms alone
    if "objectives" not in names and {*OBJECTIVES, "optim", "runtime"} <= names.keys():  # a whole file, which says what is learned
        learned = {name: names.pop(name) for name in OBJECTIVES}
        names["objectives"] = {name: settings for name, settings in learned.items() if settings is not None}
    return names


def _leave_to_the_law(spatial: dict[str, Any]) -> None:
    """Take out what 0.1.0 wrote down of other laws than the named one, and the number of views where it is the law's or the default."""
    law, flat = spatial["law"], [name for name in FLAT if name in spatial]
    for name in set(flat) - set(LAW_FIELDS[law]):
        del spatial[name]
    if law == "paired":
        spatial.setdefault("border_frac", 0.02)  # the default of 0.1.0, as the next; the laws' own are 0 and (0.08, 1)
    elif law == "independent":
        spatial.setdefault("area_frac", [0.05, 0.12])
    if flat and (law == "paired" or spatial.get("views") == 6):
        spatial["views"] = None


def _move(names: dict[str, Any], old: list[str], new: list[str]) -> None:
    """Move a setting, if it is there; only a word moves into a place below its own, all else that lies there is of today.

    Raises: ValueError if its place is taken.
    """
    parent = _mapping_at(names, old[:-1])
    if parent is None or old[-1] not in parent or (new[: len(old)] == old and not isinstance(parent[old[-1]], str)):
        return
    value = parent.pop(old[-1])
    target = _mapping_at(names, new[:-1], make=True)
    if target is None:
        parent[old[-1]] = value
    elif new[-1] in target:
        today = ".".join(new)
        raise ValueError(f"{'.'.join(old)}: is called {today} today, which is given too; leave one of them out")
    else:
        target[new[-1]] = value


def _mapping_at(names: dict[str, Any], path: list[str], *, make: bool = False) -> dict[str, Any] | None:
    """Return the mapping at a place, None if there is none."""
    held: Any = names
    for name in path:
        if not isinstance(held, dict):
            return None
        held = held.setdefault(name, {}) if make else held.get(name)
    return held if isinstance(held, dict) else None
