"""Train a real model on real preference pairs with TRL and with fastpref, and compare every metric of every step.

    python -m checks.trl_parity       # a few minutes and about 8 GB on two CPU cores; the first run downloads a model

- SmolLM2-135M-Instruct in fp32 on the CPU, 4 steps of DPO and 4 of ORPO, 4 pairs a step, from examples/data_real.
- The tokens of all pairs must be equal before anything is trained.
- Exits with 1 if any metric at any step differs by more than 1e-3, relative. Numbers, machine and versions go to
  bench/results/parity_trl.json, the tables to docs/parity-trl.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Read once, when the Hugging Face libraries are imported: all files are local, and this script does the talking.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")
os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")

import torch
from rich.console import Console
from rich.table import Table

from checks import real_models
from checks.machine import machine
from checks.trl_parity.runs import (
    LIMIT,
    Comparison,
    ParityRun,
    check_tokens,
    compare,
    run_fastpref,
    run_trl,
    worst,
    write_text_form,
)
from fastpref.data import load_tokenizer
from fastpref.losses import DPOConfig

ROOT = Path(__file__).resolve().parents[2]
PAIRS = ROOT / "examples/data_real/pairs.jsonl"
MODEL = "smollm2"
PACKAGES = ("trl", "transformers", "accelerate", "torch", "megatron-core", "fastpref")
# TRL counts a tie as a loss, and averages ORPO's NLL over the tokens of prompt and response.
LOSSES = {
    "DPO": DPOConfig(pref_loss="sigmoid", tie_value=0.0),
    "ORPO": DPOConfig(pref_loss="orpo", orpo_nll="prompt_and_response", tie_value=0.0),
}
DOC_HEAD = """\
# Parity with TRL

Written by `make parity-trl` (`checks/trl_parity`); every number is in `bench/results/parity_trl.json`.

SmolLM2-135M-Instruct, trained by TRL {trl} and by fastpref, each through its own trainer class from the same files:
fp32, one process on a CPU, {steps} steps of {pairs} real preference pairs, AdamW at a constant learning rate of {lr:g},
epsilon {epsilon:g}, weight decay {decay:g}, gradients clipped at {clip:g}, at most {length} tokens a side. fastpref
accumulates {accumulation} microbatches of {batch} pairs.

**Rule.** Every metric at every step must have |TRL - fastpref| / max(|TRL|, |fastpref|) <= {limit:g}. Rewards, margins
and log-odds are differences of fp32 log-probs and can be near 0; there a difference of one bit of the mean log-prob
(2^-23 of it, times beta for rewards) also counts as equal, and the tables mark it with a star. Nothing else has an
absolute allowance. At step 1 of DPO, where policy and reference are one model, every reward is 0.

**Result.** {result}

The columns "step n" hold the relative difference at that step.
"""
DOC_TAIL = """
## Conventions that differ

How the runs above were set so that both sides compute one thing:

- **Token means with accumulation** (the NLL of ORPO). TRL averages the means of the microbatches, so a token in a short
  microbatch weighs more; fastpref averages over the tokens of the step, whatever the split. TRL's ORPO got each step's
  pairs as one microbatch, fastpref accumulated.
- **NLL of ORPO.** TRL's covers prompt and response: `orpo_nll="prompt_and_response"`. The default here is `response`.
- **`logps/*` under ORPO.** Per token in TRL, sums here as under DPO; compared per token.
- **Embedding of the padding token.** transformers gives `config.pad_token_id` no gradient as an input. SmolLM2 pads
  with its end-of-turn token, which stands in every prompt: that row of the embedding then loses a real part of its
  gradient (1.3 % of the whole gradient at step 1 of DPO, and up to 0.9 % of a reward two steps later). fastpref trains
  every token; against fp64 its gradient is off by 4e-6. TRL's model got `padding_idx = None`.
- **Ties in `rewards/accuracies`.** 0 in TRL, `tie_value` here, by default 0.5; set to 0.
- **End of a chat completion.** TRL's DPO and fastpref take what the template writes; TRL's ORPO adds another
  end-of-sequence token where the template ends in something else (a newline, for this model). ORPO read the same pairs
  as strings, which all of them end in one such token.
- **`logits/*` under ORPO.** TRL averages over prompt, response and padding, fastpref over the response; not compared.
- **Token statistics under DPO** (`entropy`, `mean_token_accuracy`, `logits/*`) are token means as above; they are
  compared on a small model by `tests/trainer/test_parity_trl.py`.
"""


def main() -> None:
    """Prepares the model, trains four times and reports."""
    arguments = parse_arguments()
    console = Console()
    model_dir = real_models.prepare(MODEL, arguments.work_dir / "models" / MODEL)
    work_dir = arguments.work_dir / "parity_trl"
    work_dir.mkdir(parents=True, exist_ok=True)
    texts = write_text_form(PAIRS, load_tokenizer(model_dir), work_dir / "pairs_as_text.jsonl")
    files = {"DPO": PAIRS, "ORPO": texts}
    reports = []
    for name, loss in LOSSES.items():
        run = ParityRun(model_dir=model_dir, data_file=files[name], work_dir=work_dir, loss=loss)
        report, comparisons = train_both(name, run, console)
        console.print(terminal_table(name, comparisons))
        reports.append(report)
    document = {
        "command": "python -m checks.trl_parity",
        "machine": machine(threads=torch.get_num_threads()),
        "versions": {package: version(package) for package in PACKAGES},
        "model": {"name": MODEL, "packages": real_models.SOURCES[MODEL].packages},
        "data": {"file": str(PAIRS.relative_to(ROOT)), "sha256": hashlib.sha256(PAIRS.read_bytes()).hexdigest()},
        "limit": LIMIT,
        "passed": all(report["passed"] for report in reports),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "runs": reports,
    }
    outputs = {arguments.results: json.dumps(document, indent=1) + "\n", arguments.docs: markdown(document)}
    for path, text in outputs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    console.print(f"{'PASS' if document['passed'] else 'FAIL'}: {result_sentence(document)}")
    sys.exit(0 if document["passed"] else 1)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Compare TRL and fastpref on a real model.")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs", help="models and what the trainers write")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/parity_trl.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/parity-trl.md")
    return parser.parse_args()


def train_both(name: str, run: ParityRun, console: Console) -> tuple[dict[str, Any], list[Comparison]]:
    """Trains with both libraries, TRL first; returns the run's entry in the results, and the comparisons."""
    console.print(f"{name}: training with TRL ...")
    trl = run_trl(run)
    console.print(f"{name}: training with fastpref ...")
    fastpref = run_fastpref(run)
    comparisons = compare(run, trl, fastpref)
    num_tokens = check_tokens(trl.pairs, fastpref.pairs)
    console.print(f"{name}: all {num_tokens} tokens of {len(trl.pairs)} pairs are identical")
    settings = {field: value for field, value in asdict(run).items() if isinstance(value, (int, float))}
    report = {
        "name": name,
        "settings": {**settings, "loss": asdict(run.loss), "trl_batch_pairs_and_accumulation": run.trl_layout},
        "pairs_compared": len(trl.pairs),
        "tokens_compared": num_tokens,
        "tokens_identical": True,
        "train_seconds": {"trl": round(trl.seconds, 1), "fastpref": round(fastpref.seconds, 1)},
        "passed": all(row.agrees for row in comparisons),
        "worst": entry(worst(comparisons)),
        "comparisons": [entry(row) for row in comparisons],
    }
    return report, comparisons


def entry(row: Comparison) -> dict[str, Any]:
    """A comparison as it stands in the results."""
    return {**asdict(row), "relative_difference": row.relative_difference, "agrees": row.agrees}


def terminal_table(name: str, comparisons: list[Comparison]) -> Table:
    """Metric by step, with both values."""
    table = Table(title=f"{name}: TRL and fastpref", title_justify="left")
    for column in ("metric", "step", "TRL", "fastpref", "relative difference"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for row in comparisons:
        table.add_row(
            *(row.metric, str(row.step), f"{row.trl:.7g}", f"{row.fastpref:.7g}", shown(entry(row))),
            style=None if row.agrees else "bold red",
            end_section=row.step == comparisons[-1].step,
        )
    return table


def markdown(document: dict[str, Any]) -> str:
    """The page that docs/parity-trl.md holds."""
    settings = document["runs"][0]["settings"]
    head = DOC_HEAD.format(
        trl=document["versions"]["trl"],
        steps=settings["steps"],
        pairs=settings["batch_pairs"] * settings["accumulation"],
        lr=settings["learning_rate"],
        decay=settings["weight_decay"],
        epsilon=settings["adam_epsilon"],
        clip=settings["max_grad_norm"],
        length=settings["max_length"],
        accumulation=settings["accumulation"],
        batch=settings["batch_pairs"],
        limit=document["limit"],
        result=result_sentence(document),
    )
    return head + "".join(markdown_section(report) for report in document["runs"]) + DOC_TAIL


def markdown_section(report: dict[str, Any]) -> str:
    """One run: the values of its last step, and the difference at every step."""
    rows = report["comparisons"]
    steps = sorted({row["step"] for row in rows})
    pairs, accumulation = report["settings"]["trl_batch_pairs_and_accumulation"]
    lines = [
        f"\n## {report['name']}\n",
        f"All {report['tokens_compared']} tokens of {report['pairs_compared']} pairs are identical. TRL's step: "
        f"{accumulation} microbatch{'es' if accumulation > 1 else ''} of {pairs} pairs.\n",
        f"| metric | TRL, step {steps[-1]} | fastpref, step {steps[-1]} | "
        + " | ".join(f"step {step}" for step in steps)
        + " |",
        "|---|---:|---:|" + "---:|" * len(steps),
    ]
    for metric in dict.fromkeys(row["metric"] for row in rows):
        mine = [row for row in rows if row["metric"] == metric]
        differences = " | ".join(shown(row) for row in mine)
        lines.append(f"| `{metric}` | {mine[-1]['trl']:.7g} | {mine[-1]['fastpref']:.7g} | {differences} |")
    return "\n".join(lines) + "\n"


def result_sentence(document: dict[str, Any]) -> str:
    """What the comparison found, in one line."""
    rows = [row for report in document["runs"] for row in report["comparisons"]]
    largest = ", ".join(
        f"{report['name']} {report['worst']['relative_difference']:.1e} (`{report['worst']['metric']}`, "
        f"step {report['worst']['step']})"
        for report in document["runs"]
    )
    return f"{sum(row['agrees'] for row in rows)} of {len(rows)} comparisons agree; largest difference: {largest}."


def shown(row: dict[str, Any]) -> str:
    """A relative difference, with a star where only the resolution of fp32 makes it agree."""
    difference = row["relative_difference"]
    return f"{difference:.1e}" + ("*" if row["agrees"] and difference > LIMIT else "")


if __name__ == "__main__":
    main()
