"""What `wherefrom doctor` finds of the machine: what the system allows, places for files of ours, the data and its disk.

Here: what is good and what is not.
Not here: readings (system_limits.py), what is stored of an index (pipeline/shards/store.py), what a pattern names (shards/pattern.py).
"""

import contextlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from wherefrom.tools.console import in_bytes
from wherefrom.tools.findings import Asked, Finding, first_line, from_reason, good_unless
from wherefrom.tools.system_limits import ReadSpeed, SystemLimits, read_limits, read_speed

CORE_BYTES_PER_S = 50e6  # of JPEGs of 0.2 megapixels that one decodes and cuts: 32e6 (ten views) to 84e6 (two, decoded in part)
LEAST_MEMORY_BYTES = 2 * 2**30
LEAST_SHARED_BYTES = 2**30  # a few batches of views of 256 pictures
LEAST_OPEN_FILES = 1024  # the reader keeps up to 256 shards open; several ranks or workers hold some hundred sockets and pipes
LEAST_DISK_BYTES = 10**9
TEMPORARY_BYTES, LOOSE_BYTES = 2**24, 2**20  # of the file that is read without data; below which a file is a picture, no shard
INDEX_S, SIZE_S = 2.0, 0.3  # for the index of the data, for the size of a folder


def look_at_system(_: Asked) -> Iterator[Finding]:
    """Say what the system lets this process have."""
    yield from judge_limits(read_limits())


def judge_limits(limits: SystemLimits) -> Iterator[Finding]:
    """Judge cores, memory, shared memory and open files."""
    yield _cores(limits)
    if limits.memory_bytes is not None and limits.memory_available_bytes is not None:
        text = f"{in_bytes(limits.memory_bytes)}, {in_bytes(limits.memory_available_bytes)} of it free"
        if limits.memory_limit_bytes is not None:
            text += f", but the cgroup allows {in_bytes(limits.memory_limit_bytes)}"
        mend = "lower --global-batch, end other work, or raise the limit (docker run --memory, resources.limits.memory)"
        least = min(limits.memory_available_bytes, limits.memory_limit_bytes or math.inf)
        yield good_unless(least < LEAST_MEMORY_BYTES, "memory", text, mend)
    if limits.shared_bytes is not None and limits.shared_free_bytes is not None:
        text = f"/dev/shm has {in_bytes(limits.shared_bytes)}, {in_bytes(limits.shared_free_bytes)} of it free"
        mend = "remove old files from /dev/shm" if limits.shared_bytes >= LEAST_SHARED_BYTES else "docker run --shm-size 8g, or --ipc host"
        short = limits.shared_free_bytes < LEAST_SHARED_BYTES
        yield good_unless(short, "shared memory", f"{text}; workers and GPUs hand over through it" if short else text, mend)
    if limits.open_files is not None:
        hard = limits.open_files_at_most or 65536
        mend = f"ulimit -n {min(hard, 65536)}, in the shell that starts the run"
        if hard < LEAST_OPEN_FILES:
            mend = "docker run --ulimit nofile=65536, or nofile in /etc/security/limits.conf"
        short, text = limits.open_files < LEAST_OPEN_FILES, f"at most {limits.open_files} at once"
        yield good_unless(short, "open files", f"{text}; the reader alone keeps 256 shards open" if short else text, mend)


def _cores(limits: SystemLimits) -> Finding:
    seen, allowed, quota = limits.cores_seen, limits.cores_allowed, limits.quota_cores
    text = f"{allowed} of {seen} are allowed" if allowed < seen else f"{seen}, all allowed"
    if quota is not None and quota < allowed:
        threads = math.ceil(quota)
        text += f", but the cgroup gives the time of {quota:.3g}: the loader takes {threads} threads, PyTorch takes {allowed}"
        mend = f"OMP_NUM_THREADS={threads} where a processor trains, or raise it (docker run --cpus, resources.limits.cpu)"
        return Finding("mend", "cores", text, mend)
    if allowed == 1 < seen:
        text += ": this process is bound to one core, which the loader and training share"
        return Finding("mend", "cores", text, f"start it without taskset or numactl, or with srun --cpus-per-task {seen}")
    return Finding("good", "cores", text)


def look_at_caches(_: Asked) -> Iterator[Finding]:
    """Say where what is kept lies, how large it is, and whether it can be written."""
    from wherefrom.pipeline.system import user_cache_folder

    try:
        folder = user_cache_folder()
    except OSError as problem:
        yield from_reason("mend", "cache", first_line(problem))
    else:
        free = shutil.disk_usage(folder).free
        mend = "make room, or set WHEREFROM_CACHE to a folder on another disk"
        yield good_unless(free < LEAST_DISK_BYTES, "cache", f"{folder}: {_folder_size(folder)}, {in_bytes(free)} are free", mend)
    with contextlib.suppress(ImportError):
        from triton import knobs

        yield _other_cache("Triton's cache", Path(knobs.cache.dir), "TRITON_CACHE_DIR")
    with contextlib.suppress(ImportError):
        from huggingface_hub import constants

        yield _other_cache("timm's weights", Path(constants.HF_HUB_CACHE), "HF_HOME")


def _other_cache(name: str, folder: Path, variable: str) -> Finding:
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return Finding("mend", name, f"{folder} cannot be written", f"set {variable} to a folder that can")
    return Finding("good", name, f"{folder}: {_folder_size(folder) if folder.is_dir() else 'nothing as yet'}")


def _folder_size(folder: Path) -> str:
    """Return how much lies in a folder, in words; of a large one what could be counted in time."""
    total, ends = 0, time.monotonic() + SIZE_S
    for inner, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(inner, name)).st_size
        if time.monotonic() > ends:
            return f"over {in_bytes(total)}"
    return in_bytes(total)


def look_at_data(asked: Asked) -> Iterator[Finding]:
    """Say whether the data is there, indexed, decoded once, and how fast it is read; without data, how fast a temporary file is."""
    if asked.data is None:
        yield _temporary_file()
        return
    from wherefrom.pipeline.shards.pattern import expand_pattern

    try:
        paths = expand_pattern(asked.data)
    except (OSError, ValueError) as problem:
        yield from_reason("FAILS", "data", " ".join(str(problem).split()), "name a shard, a folder or a pattern")
        return
    yield from _index(asked, paths)
    try:
        yield judge_speed(read_speed(_files_of(paths)), of_data=True)
    except OSError as problem:
        yield Finding("FAILS", "data", f"cannot be read: {first_line(problem)}", "see that you may read it, and that its disk is healthy")


def _index(asked: Asked, paths: Sequence[str]) -> Iterator[Finding]:
    from wherefrom.pipeline.shards.store import IndexState, stored_tables

    ends, states = time.monotonic() + INDEX_S, list[IndexState]()
    for state in stored_tables(paths, labels=asked.labels):
        states.append(state)
        if time.monotonic() > ends:
            break
    shards = f"{len(paths)} shards" if len(states) == len(paths) else f"the first {len(states)} of {len(paths)} shards"
    command = f"wherefrom index '{asked.data}'" + (f" --labels {asked.labels}" if asked.labels else "")
    stored = [state.stored for state in states if state.stored is not None]
    stale = sum(state.stale for state in states)
    absent = len(states) - len(stored) - stale
    if absent or stale:
        counts = {"have none yet": absent, "have one that no longer fits": stale}
        text = ", ".join(f"{count} of {shards} {words}" for words, count in counts.items() if count)
        yield Finding("mend", "index", text, f"{command}, or let the run do it as it starts")
        return
    tables = [each.table for each in stored]
    pictures, valid = sum(map(len, tables)), sum(int(table.valid().sum()) for table in tables)
    if not valid:
        yield Finding("FAILS", "index", f"none of the {pictures} pictures of {shards} is valid", f"{command} says why")
        return
    where = ", ".join(sorted({str(each.file.parent) for each in stored if each.file is not None})[:2])
    damaged = f"{pictures - valid} of them damaged and replaced, " if valid < pictures else ""
    yield Finding("good", "index", f"{pictures} pictures in {shards}, {damaged}up to date in {where}")
    yield _verdicts(sum(bool(table.audited[0]) for table in tables), len(tables), command)


def _verdicts(audited: int, shards: int, command: str) -> Finding:
    from wherefrom.pipeline.render.jpeg_parts import part_decoder_missing

    if audited == shards:
        return Finding("good", "verdicts", "every picture was decoded once: it is known which ones do not decode")
    text = f"{shards - audited} of {shards} shards were never decoded once"
    if part_decoder_missing() is None:
        text += ", so their pictures are decoded whole"
    return Finding("mend", "verdicts", text, f"{command} --decode, once, or let a long run do it as it starts")


def _files_of(paths: Sequence[str]) -> Iterator[Path]:
    """Yield tars, and of trees their pictures, which are listed no further than they are asked for."""
    from wherefrom.pipeline.shards.tree_folders import PICTURE_SUFFIXES

    for path in map(Path, paths):
        if path.is_file():
            yield path
        for folder, _, names in os.walk(path):
            yield from (Path(folder, name) for name in sorted(names) if name.lower().endswith(PICTURE_SUFFIXES))


def _temporary_file() -> Finding:
    from wherefrom.pipeline.system import user_cache_folder

    try:
        with tempfile.NamedTemporaryFile(dir=user_cache_folder()) as file:
            file.write(os.urandom(TEMPORARY_BYTES))
            file.flush()
            os.fsync(file.fileno())
            return judge_speed(read_speed([Path(file.name)]), of_data=False)
    except OSError:
        return Finding("absent", "disk", "no temporary file can be written in the cache folder, so none is read")


def judge_speed(speed: ReadSpeed, *, of_data: bool) -> Finding:
    """Judge how fast files are read, data's against what the cores that are allowed take of it."""
    from wherefrom.pipeline.system import available_cores

    if not speed.bytes:
        return Finding("absent", "disk", "there is nothing to read")
    files = f"{speed.files} files" if speed.files > 1 else "one file"
    text = f"{in_bytes(speed.bytes_per_s)}/s, {files} of the {'data' if of_data else 'cache folder'} in order"
    if speed.cold is False:
        return Finding("good", "disk", f"{text}, from memory: the system keeps them there")
    feeds, cores = speed.bytes_per_s / CORE_BYTES_PER_S, available_cores()
    text += f", {'cold' if speed.cold else 'cold or not, which this disk does not tell'}: enough for {feeds:.2g} decoding cores"
    mend = "copy it to a local disk, or have memory for all of it"
    if speed.files > 1 and speed.bytes / speed.files < LOOSE_BYTES:
        mend = f"pack it into tars (wherefrom pack), {mend}"
    return good_unless(of_data and feeds < cores, "disk", f"{text}, {cores} are allowed", mend)
