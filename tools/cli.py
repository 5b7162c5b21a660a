"""The command `wherefrom`: which sub-commands there are, and what a failure looks like from outside.

Here: dispatch, errors of one line with exit code 2.
Not here: what the sub-commands do. They are imported when they are called, so that asking what there is does not wait for torch.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence

FAILED, MISUSED = 1, 2  # exit codes
HELP = ("-h", "--help")

COMMANDS = {  # name: (what it does, module, function)
    "train": ("pretrain an encoder: a recipe, by default the demo, which needs no data", "wherefrom.tools.training", "train_command"),
    "recipes": ("list the recipes by name, one line each", "wherefrom.tools.recipes", "recipes_command"),
    "evaluate": ("measure what a network knows, by named protocols", "wherefrom.tools.evaluate", "evaluate_command"),
    "compare": ("put what several networks know side by side", "wherefrom.tools.compare", "compare_command"),
    "embed": ("write features of pictures as files", "wherefrom.tools.embed", "embed_command"),
    "views": ("draw a picture of sources, their boxes and their views", "wherefrom.tools.views_picture", "views_command"),
    "replay": ("draw the views of any update of a run again", "wherefrom.tools.replay", "replay_command"),
    "doctor": ("look whether this machine has what is needed, and what mends it", "wherefrom.tools.doctor", "doctor_command"),
    "profile": (
        "measure what limits a run on this machine, and what would change it",
        "wherefrom.tools.throughput.command",
        "profile_command",
    ),
    "prove": ("prove by pixels that the records of every renderer here are true", "wherefrom.tools.prove", "prove_command"),
    "index": ("build, audit and explain the index of a set of shards", "wherefrom.tools.index", "index_command"),
    "show": ("look a picture up by key or number: its bytes, size, label, validity", "wherefrom.tools.show", "show_command"),
    "pack": ("pack a folder, tars or parquet files into tar shards", "wherefrom.tools.pack", "pack_command"),
    "bench loader": ("measure the loader against others", "wherefrom.tools.bench_loader.command", "bench_loader_command"),
    "bench kernels": ("measure the kernels against the usual ways", "wherefrom.tools.bench_kernels.command", "bench_kernels_command"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command and return its exit code: 0, 1 if it failed, 2 if it was misused, 128 + n if signal n ended it."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="wherefrom",
        description="Pretrain image encoders on where things are.",
        epilog=_list_commands(COMMANDS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"wherefrom {importlib.metadata.version('wherefrom')}")
    parser.add_argument("command", metavar="COMMAND", help="one of those below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    if not words:
        parser.print_help()
        return MISUSED
    options = parser.parse_args(words)
    name, rest = options.command, options.rest
    group = [command for command in COMMANDS if command.startswith(f"{name} ")]
    if group and (not rest or rest[0] in HELP):
        print(f"usage: wherefrom {name} [-h] COMMAND\n\n{_list_commands(group)}")
        return 0 if rest else MISUSED
    if group:
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in COMMANDS:
        parser.error(f"no command {name!r}; there are {', '.join(COMMANDS)}")
    try:
        return _call(name, rest)
    except (ValueError, OSError) as problem:
        return _fail(problem, MISUSED)
    except FloatingPointError as problem:
        return _fail(problem, FAILED)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _list_commands(names: Iterable[str]) -> str:
    lines = "\n".join(f"  {name:<13} {COMMANDS[name][0]}" for name in names)
    return f"commands:\n{lines}\n\nwherefrom COMMAND --help says more."


def _call(name: str, arguments: Sequence[str]) -> int:
    """Call a sub-command's function: `train` reads its words itself, the parameters of the others are their options."""
    if name in ("train", "profile") and "OMP_WAIT_POLICY" not in os.environ:
        # for PyTorch's OpenMP (GNU's), which reads it when it is loaded: at a barrier its threads spin for milliseconds by default, and
        # where another process holds a core, each of the many small steps of a training loop then waits for a whole slice of time.
        # Asleep at once they take a quarter of the rate on quiet cores, after 2000 rounds hardly any
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    _, module, function = COMMANDS[name]
    command = getattr(importlib.import_module(module), function)
    if name == "train":
        return command(arguments)
    import tyro

    markers = (tyro.conf.PositionalRequiredArgs, tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(command, prog=f"wherefrom {name}", args=arguments, config=markers) or 0


def _fail(problem: Exception, code: int) -> int:
    line = f"wherefrom: {' '.join(str(problem).split())}"
    summary = os.environ.get("TORCHELASTIC_ERROR_FILE")  # torchrun ends with a summary of what its processes write there
    if summary is not None:
        with open(summary, "w", encoding="utf-8") as file:
            json.dump({"message": line, "timestamp": int(time.time())}, file)
    if summary is None or os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
    return code


if __name__ == "__main__":  # for torchrun and accelerate launch, -m wherefrom.tools.cli
    sys.exit(main())
