"""`make bench` measures this machine. A benchmark is a module bench_<name>.py with `run(options) -> Report`.

One that only has `main() -> int` (1 when a goal is missed) prints its own table, and is left out by --quick.
"""

import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

FOLDER = Path(__file__).parent
ORDER = ("training", "sampling", "bulk", "data", "utilisation", "paper")


def names() -> list[str]:
    """All benchmarks, the quickly told ones last."""
    found = {path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")}
    return [name for name in ORDER if name in found] + sorted(found - set(ORDER))


def main(
    chosen: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help=f"Of {', '.join(names())}.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only show that everything runs; within a minute.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all processors.")] = 0,
    runs_dir: Annotated[Path, typer.Option(help="Results go to bench/ in it.")] = Path("runs"),
) -> None:
    """Measure training, sampling, data and utilisation; tables here, bench.json and bench.md under runs/bench."""
    unknown = [name for name in chosen or () if name not in names()]
    if unknown:
        raise typer.BadParameter(f"no benchmark {unknown[0]!r}; there are {', '.join(names())}")
    from varscale.numerics.machine import processors

    threads = threads or processors()
    # read by libraries on import: threads that spin while they wait slow down all else, as in a sweep's workers
    os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), GOMP_SPINCOUNT="20000")
    import torch

    from benchmarks.measuring import Options, machine
    from benchmarks.reporting import show, write

    torch.set_num_threads(threads)
    described = machine(threads)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(" · ".join(f"{name} {value}" for name, value in described.items()), highlight=False)
    reports, missed_elsewhere = [], False
    paths: tuple[Path, ...] = ()
    with tempfile.TemporaryDirectory(prefix="varscale-bench-") as folder:
        for name in chosen or names():
            console.print(f"measuring: {name} …", style="dim")
            module = importlib.import_module(f"benchmarks.bench_{name}")
            if not hasattr(module, "run"):  # it prints its own table
                if chosen or not quick:
                    missed_elsewhere |= bool(module.main())
                continue
            reports.append(module.run(Options(quick, threads, Path(folder))))
            show(reports[-1], console)
            paths = write(reports, described, runs_dir / "bench")  # after each: an interrupted call keeps what it has
    for path in paths:
        typer.echo(path)
    if missed_elsewhere:
        console.print("a goal of a benchmark with its own table was missed: see above")


if __name__ == "__main__":
    typer.run(main)
