"""`gpu`: what matters most on a GPU that is there for two commands of five minutes; and what is prepared for it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import click
from click.core import ParameterSource

from bench.commands.shared import command_line
from bench.workloads import ROOT

DEFAULT_OUT, DEFAULT_CARRIED = ROOT / "runs" / "gpu", ROOT / "runs" / "carried"
carried_option = click.option(
    "--carried",
    type=click.Path(path_type=Path),
    default=DEFAULT_CARRIED,
    help="Folder with `wheels` and `cache`.  [default: runs/carried]",
)


@click.command()
@click.option("--command", "number", type=click.IntRange(1, 2), help="Which of the two.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The folder.  [default: runs/gpu; of a rehearsal one that is removed]",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    help="It ends by itself before so many have passed.",
)
@carried_option
@click.option("--rehearse", is_flag=True, help="Both commands without a GPU: what no longer fits, then tiny shapes.")
@click.option("--record", is_flag=True, help="Make the seconds of a run in --out the recorded clock.")
def gpu(number: int | None, out: Path | None, seconds: float, carried: Path, rehearse: bool, record: bool) -> None:
    """Measure what matters most on a Hopper GPU in two commands of five minutes each.

    Every step is stored as soon as it is done. What is in the folder already is not measured again.
    """
    if sum((number is not None, rehearse, record)) != 1:
        raise click.UsageError("give one of --command 1, --command 2, --rehearse and --record")
    if rehearse:
        if out is not None and out.is_dir() and any(out.iterdir()):
            raise click.UsageError(f"{out} is not empty, and what a rehearsal leaves means nothing; name a new folder")
        with tempfile.TemporaryDirectory() as scratch:
            _rehearse(out or Path(scratch) / "gpu", seconds, carried)
    elif record:
        source = click.get_current_context().get_parameter_source
        if ignored := [name for name in ("seconds", "carried") if source(name) is ParameterSource.COMMANDLINE]:
            raise click.UsageError(f"--record reads --out alone; leave out --{', --'.join(ignored)}")
        _record(out or DEFAULT_OUT)
    else:
        assert number is not None
        _run(number, out or DEFAULT_OUT, seconds - _seconds_since_start(), carried)


def _run(number: int, out: Path, seconds: float, carried: Path) -> None:
    import torch

    from bench.commands.h100 import attributes
    from bench.gpu.carried.sizes import CACHE
    from bench.gpu.fifteen import command

    if not torch.cuda.is_available():
        raise click.UsageError("PyTorch sees no CUDA device; --rehearse runs the same plan without one")
    cache = carried / CACHE
    summary = command.watch(number, out, seconds, cache if cache.is_dir() else None, attributes(command_line()))
    click.echo(summary.read_text(encoding="utf-8"))


def _rehearse(out: Path, seconds: float, carried: Path) -> None:
    assert "triton" not in sys.modules, "some module of bench.commands imports Triton, which reads this variable once"
    os.environ["TRITON_INTERPRET"] = "1"
    from bench.gpu.carried import sizes
    from bench.gpu.fifteen import command, plan, rehearsal
    from bench.gpu.parts import Session

    parts = sizes.weigh(carried)
    click.echo(sizes.table(parts))
    clock = rehearsal.read_clock()
    click.echo(f"recorded clock: {clock['source']}")
    faults = [*rehearsal.faults(clock, seconds), *filter(None, [sizes.fault(parts)])]
    with tempfile.TemporaryDirectory() as marks:
        for number, steps in plan.COMMANDS.items() if not faults else ():
            folder = command.open_folder(number, out, 3600.0, {"command": command_line()}, Path(marks))
            command.run_in_this_process(folder, number, steps, Session(is_dry=True))
            rows = folder.rows(plan.rows_file(number))
            failed = {name: row["reason"] for name, row in rows.items() if row["status"] in ("failed", "wrong")}
            faults += [f"command {number}, dry: {name}: {reason}" for name, reason in failed.items()]
        faults += rehearsal.folder_faults(out) if out.exists() else []
    for fault in faults:
        click.echo(f"does not fit: {fault}", err=True)
    if faults:
        raise SystemExit(1)
    click.echo("both commands fit")
    for lack in sizes.unprepared(carried):
        click.echo(f"not prepared: {lack}")


def _record(out: Path) -> None:
    from bench.gpu.fifteen import plan, rehearsal
    from bench.gpu.folder import Folder

    rows = Folder(out, 0.0, {}).rows(plan.rows_file(1))
    if not any("took_s" in row for row in rows.values()):
        raise click.UsageError(f"{out} holds no rows of a run; run --command 1 first, or name its folder by --out")
    row = next(iter(rows.values()))
    clock = rehearsal.record(
        out, f"measured on {row.get('gpu', 'a GPU')}, {row.get('date')}, commit {row.get('commit')}"
    )
    rehearsal.CLOCK.write_text(json.dumps(clock, indent=1) + "\n", encoding="utf-8")
    click.echo(rehearsal.CLOCK)


@click.command("gpu-part", hidden=True)
@click.argument("number", type=click.IntRange(1, 2))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("marks", type=click.Path(path_type=Path))
@click.argument("seconds", type=float)
def gpu_part(number: int, out: Path, marks: Path, seconds: float) -> None:
    """The steps of a command in this process; see `bench.gpu.fifteen.command`."""
    import torch

    from bench.commands.h100 import attributes
    from bench.gpu.fifteen import command, plan
    from bench.gpu.folder import run_to_exit_code
    from bench.gpu.parts import Session

    given = attributes(f"python -m bench gpu --command {number}") | {"gpu": torch.cuda.get_device_name()}
    folder = command.open_folder(number, out, seconds - _seconds_since_start(), given, marks)
    session = Session(is_dry=False)
    run_to_exit_code(lambda: command.run_in_this_process(folder, number, plan.COMMANDS[number], session))


@click.command("gpu-forward", hidden=True)
def gpu_forward() -> None:
    """One forward pass of the main head, for a profiler."""
    import torch

    from bench.gpu.fifteen.tools import forward_once
    from bench.gpu.parts import Session

    forward_once(Session(is_dry=not torch.cuda.is_available()))


@click.command("gpu-cache")
@click.argument("cache", type=click.Path(path_type=Path), default=DEFAULT_CARRIED / "cache")
@click.option(
    "--wheel", type=click.Path(path_type=Path, exists=True), help="Triton's wheel of the GPU machine's Python."
)
@click.option("--match", default="", help="Only variants whose name or origin contains this text.")
@click.option("--most", type=click.IntRange(1), help="Only so many variants, the most telling first.")
@click.option("--processes", type=click.IntRange(1), help="At once.  [default: the cores]")
@click.option("--list", "is_listed", is_flag=True, help="Print the variants and compile nothing.")
def gpu_cache(
    cache: Path, wheel: Path | None, match: str, most: int | None, processes: int | None, is_listed: bool
) -> None:
    """Fill a Triton cache, without a GPU, with what the two commands and tests/gpu launch on a Hopper GPU.

    What is there is not compiled again. One variant takes 10 to 30 seconds of a core.
    """
    from bench.gpu.carried import fill, launches

    try:
        build = fill.target_build(wheel)
    except (ValueError, RuntimeError, FileNotFoundError, zipfile.BadZipFile) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"for Triton {build.version}" + (f", {wheel.name}" if wheel else ", the build of this Python"))
    found = launches.collect()
    for name, reason in found.incomplete.items():
        click.echo(f"{name} ended on the simulated device by {reason[:100]}; what it launches after that is not known")
    names = [launches.name_of(text) for text in found.origins]
    wanted = fill.limited(found.origins, match, most, names)
    if not wanted:
        raise click.BadParameter(f"no variant's name or origin contains {match!r}", param_hint="--match")
    click.echo(f"{len(wanted)} of {len(found.origins)} variants")
    if is_listed:
        for text, origin in wanted.items():
            click.echo(f"{launches.name_of(text)} | {origin}")
        return
    start = time.monotonic()
    for count, entry in enumerate(fill.fill(cache, wanted, build, processes or len(os.sched_getaffinity(0))), 1):
        name = launches.name_of(entry["specialization"])
        outcome = entry.get("error") or f"{entry['seconds']} s"
        click.echo(f"{count}: {name} | {entry['origin']}: {outcome}, {time.monotonic() - start:.0f} s so far")
    mib = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) / 2**20
    click.echo(f"{cache}: {len(fill.read_manifest(cache)['entries'])} variants, {mib:.1f} MiB")


@click.command("gpu-carry")
@carried_option
def gpu_carry(carried: Path) -> None:
    """Add up what travels to the GPU machine: tree, wheels and cache; fails beyond 60 MiB."""
    from bench.gpu.carried import sizes

    parts = sizes.weigh(carried)
    click.echo(sizes.table(parts))
    if (fault := sizes.fault(parts)) is not None:
        raise click.ClickException(fault)


def _seconds_since_start() -> float:
    """How long this process has been running, its imports included."""
    started = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - started
