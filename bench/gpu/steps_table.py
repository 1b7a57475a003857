"""Markdown of the rows of part 3; apart from `steps`, which needs Megatron-Core."""

from __future__ import annotations

from statistics import median

from bench.measure import Row

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 rates of the data sheets, for the utilisation."""


def steps_table(rows: dict[str, Row]) -> str:
    """One line per setting; utilisation only where the device's rate is known."""
    if not rows:
        return ""
    lines = ["## Part 3: training steps", ""]
    right = {name: row for name, row in rows.items() if row["status"] == "ok"}
    if right:
        first = next(iter(right.values()))
        shape = first["shape"]
        lines += [
            f"DPO steps of {shape['pairs']} pairs, {shape['tokens']} tokens, {shape['rows']} of them scored, "
            f"vocabulary {shape['vocab']}; utilisation counts every sequence on its own, so sharing prompts shows as "
            "more.",
            "",
            "| setting | s a step | tokens/s | utilisation | peak memory, GiB | active | x first |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in right.values():
            wall_s = median(row["wall_s"])
            peak = next((rate for name, rate in PEAK_FLOPS.items() if name in str(row.get("gpu"))), None)
            cells = [
                row["title"],
                f"{wall_s:.3f} ({min(row['wall_s']):.3f} to {max(row['wall_s']):.3f})",
                f"{shape['tokens'] / wall_s:.0f}",
                "" if peak is None else f"{row['flops'] / wall_s / peak:.1%}",
                f"{row['peak_mib'] / 1024:.1f}",
                "" if row["active_fraction"] is None else f"{row['active_fraction']:.1%}",
                f"{median(first['wall_s']) / wall_s:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {name}: {row['status']}, {row['reason']}" for name, row in rows.items() if name not in right)]
    return "\n".join(lines)
