"""`table`, `readme` and `plot`: what the stored rows say."""

from __future__ import annotations

import json
from pathlib import Path

import click

from bench import report
from bench.commands.head import SWEEPS
from bench.commands.shared import out_option
from bench.pages import replace_in
from bench.plots import draw, draw_bars, draw_heads_roofline, draw_products
from bench.workloads import MODELS, ROOT

MEASURE = "measure them with: python -m bench head --workload {}"


@click.command()
@click.option("--into", type=click.Path(path_type=Path), help="Put the tables into this document instead of printing.")
@out_option
def table(into: Path | None, out: Path) -> None:
    """Markdown tables of the workloads measured so far, sweeps excepted."""
    for kind, layout in report.LAYOUTS.items():
        tables = report.tables(kind, out)
        if into is None:
            click.echo(tables)
        else:
            replace_in(into, tables, layout.mark)


@click.command()
@out_option
def readme(out: Path) -> None:
    """Put the stored results into the tables of README.md and docs/results.md."""
    from bench.readme import OPEN, headline, table

    for file, make in ((ROOT / "README.md", headline), (ROOT / "docs" / "results.md", table)):
        replace_in(file, make(out), OPEN)


@click.command()
@click.option("--images", type=click.Path(path_type=Path), default=ROOT / "docs" / "images", help="Where figures go.")
@out_option
def plot(images: Path, out: Path) -> None:
    """Figures of the heads and sweeps measured so far, or of a folder that `h100` has filled."""
    if (out / "sanity.json").exists():
        from bench.gpu.plots import draw_all

        for file in draw_all(out, images):
            click.echo(file)
        return
    for workload in MODELS:
        if (file := out / f"head-{workload}.json").exists():
            draw_bars(workload, rows := report.read_rows(file), images / f"bench-head-{workload}.png")
            click.echo(images / f"bench-head-{workload}.png")
            if draw_products(workload, rows, images / f"bench-products-{workload}.png"):
                click.echo(images / f"bench-products-{workload}.png")
            else:
                click.echo(f"{workload}: no rows yet for a figure in bare products; {MEASURE.format(workload)}")
    if (stored := out / "tensor-parallel.json").exists():
        from bench import ranks

        ranks.draw(json.loads(stored.read_text(encoding="utf-8")), images / "bench-head-tp.png")
        click.echo(images / "bench-head-tp.png")
    if (stored := out / "training-effect-smollm2-135m.json").exists():
        from bench import training_effect_report

        training_effect_report.draw(json.loads(stored.read_text(encoding="utf-8")), images / "training-effect.png")
        click.echo(images / "training-effect.png")
    if (stored := out / "machine.json").exists():
        heads = [report.read_rows(file) for file in sorted(out.glob("head-*.json"))]
        draw_heads_roofline(heads, json.loads(stored.read_text(encoding="utf-8")), images / "bench-roofline.png")
        click.echo(images / "bench-roofline.png")
    for axis, workloads in SWEEPS.items():
        files = [out / f"head-{workload}.json" for workload in workloads]
        rows = [report.read_rows(file) for file in files if file.exists()]
        if not rows:
            click.echo(f"no rows; measure with: python -m bench sweep {axis}")
            continue
        draw(rows, axis, images / f"bench-head-{axis}.png")
        click.echo(images / f"bench-head-{axis}.png")
