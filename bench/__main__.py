"""Command line of the benchmarks."""

from __future__ import annotations

import click

from bench.commands import demo, gpu, h100, head, integrations, output, save, steps, train, training_effect, worker


@click.group()
def main() -> None:
    """Measure fastpref beside its peers."""


for command in (
    head.head,
    head.score,
    head.sweep,
    head.ranks,
    head.machine,
    steps.reference,
    steps.packing,
    steps.scaling,
    save.save,
    save.save_ranks,
    train.train,
    train.train_table,
    training_effect.training_effect,
    integrations.dropin,
    demo.demo,
    output.table,
    output.readme,
    output.plot,
    h100.h100,
    h100.h100_part,
    gpu.gpu,
    gpu.gpu_part,
    gpu.gpu_forward,
    gpu.gpu_cache,
    gpu.gpu_carry,
    worker.worker,
):
    main.add_command(command)


if __name__ == "__main__":
    main()
