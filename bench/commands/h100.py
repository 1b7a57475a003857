"""`h100`: the kernels, the head and the trainer on a GPU that is there for half an hour."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from bench.commands.shared import command_line
from bench.workloads import ROOT

DEFAULT_OUT = ROOT / "runs" / "h100"


@click.command()
@click.option("--part", default="all", show_default=True, type=click.Choice(["all", "1", "2", "3"]), help="See above.")
@click.option("--out", type=click.Path(path_type=Path), default=DEFAULT_OUT, help="The folder.  [default: runs/h100]")
@click.option("--dry", is_flag=True, help="Tiny shapes in this process, on the CPU and Triton's interpreter.")
def h100(part: str, out: Path, dry: bool) -> None:
    """Check and tune the kernels (1), time the head beside its peers (2) and training steps (3) on a GPU.

    At most 24 minutes, the most valuable first. What is in the folder already is not measured again.
    """
    if dry:
        assert "triton" not in sys.modules, (
            "some module of bench.commands imports Triton, which reads this variable once"
        )
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from bench.gpu import summary
    from bench.gpu.folder import Folder
    from bench.gpu.parts import BUDGETS_S, PARTS, ROW_LIMITS_S, Session
    from bench.gpu.supervisor import part_command, supervise

    if not dry and not torch.cuda.is_available():
        raise click.UsageError("PyTorch sees no CUDA device; --dry runs the same code on a CPU with tiny shapes")
    for number in PARTS if part == "all" else [int(part)]:
        folder = Folder(out, BUDGETS_S[number], attributes(command_line()))
        if dry:
            PARTS[number](folder, Session(is_dry=True))
        else:
            supervise(folder, number, part_command(number, out), ROW_LIMITS_S[number])
    folder = Folder(out, 0.0, {})
    text = summary.write(folder, is_dry=dry)
    (out / "summary.md").write_text(text, encoding="utf-8")
    click.echo(text)


@click.command("h100-part", hidden=True)
@click.argument("part", type=click.IntRange(1, 3))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("seconds", type=float)
def h100_part(part: int, out: Path, seconds: float) -> None:
    """One part in this process; see `bench.gpu.supervisor`."""
    import torch

    from bench.gpu.folder import Folder, run_to_exit_code
    from bench.gpu.parts import PARTS, Session

    tiles = out / "tiles.json"
    if part > 1 and tiles.exists():
        os.environ.setdefault("FASTPREF_TILES", str(tiles))
    gpu = {"gpu": torch.cuda.get_device_name()}
    folder = Folder(out, seconds, attributes(f"python -m bench h100 --part {part}") | gpu)
    run_to_exit_code(lambda: PARTS[part](folder, Session(is_dry=False)))


def attributes(command: str) -> dict[str, object]:
    """What every row says about where it comes from; the device itself is the child's alone."""
    from bench.measure import PACKAGES, surroundings

    peers = ("megatron-core", "transformer-engine", "quack-kernels", "verl")
    row = surroundings((*PACKAGES, *peers)) | {"command": command}
    return row | {"tiles": "tuned" if os.environ.get("FASTPREF_TILES") else "shipped"}
