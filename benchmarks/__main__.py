"""The command line of all benchmarks: `python -m benchmarks --help`."""

import argparse
import sys
from pathlib import Path

from benchmarks.notebook import copy_needed
from benchmarks.notebook import main as run_notebook
from ov_pixart.quiet import quiet_imports


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.function(options)
    except (ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, function, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(function=function)
        return added

    speed = command("speed", _speed, "seconds and peak memory of every engine at real size")
    speed.add_argument("--cases", default="", help="names, separated by commas; all by default")
    speed.add_argument("--engines", default="", help="names, separated by commas; all by default")
    speed.add_argument("--quick", action="store_true", help="a few layers only: five minutes")
    speed.add_argument("--fresh", action="store_true", help="convert and measure anew")

    memory = command("memory", _memory, "the smallest memory limit that each task runs within")
    memory.add_argument("--tasks", default="", help="beginnings of names, separated by semicolons")
    memory.add_argument("--fresh", action="store_true", help="measure anew")
    memory.add_argument(
        "--write", action="store_true", help="keep the limits in assets/bench and in the docs"
    )

    settings = command("settings", _settings, "OpenVINO's options against the defaults")
    settings.add_argument("kinds", nargs="*", help="dit, vae, t5; all by default")

    notebook = command("notebook", _notebook, "minutes, memory and disk that the notebook takes")
    notebook.add_argument("model", nargs="?", default="", help="real, few-steps or a folder")
    notebook.add_argument(
        "--copy-to", type=Path, metavar="FOLDER", help="copy all that it needs, and do not run it"
    )
    notebook.add_argument("--store", action="store_true", help="put the outputs into pixart.ipynb")
    command("docs", _docs, "write the tables of docs/performance.md from assets/bench")
    return parser


# Each command imports what it needs: torch and OpenVINO take seconds.


def _speed(options: argparse.Namespace) -> None:
    with quiet_imports():
        from benchmarks import speed

    speed.run(options.cases, options.engines, quick=options.quick, fresh=options.fresh)


def _memory(options: argparse.Namespace) -> None:
    with quiet_imports():
        from benchmarks import docs, memory

    report = memory.run(memory.select(options.tasks), fresh=options.fresh)
    if options.write:
        docs.keep_memory(report)


def _settings(options: argparse.Namespace) -> None:
    with quiet_imports():
        from benchmarks import settings

    settings.run(options.kinds)


def _notebook(options: argparse.Namespace) -> None:
    if options.copy_to:
        copy_needed(options.copy_to)
    else:
        run_notebook(options.model, keep=options.store)


def _docs(options: argparse.Namespace) -> None:
    with quiet_imports():
        from benchmarks import docs

    docs.write()


if __name__ == "__main__":
    sys.exit(main())
