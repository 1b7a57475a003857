"""`make demo`: train on shipped preference data, draw the curves, and let the exported model answer held-out questions.

    python examples/demo.py                              # one process
    python examples/demo.py --nproc 2 --layout tp        # two tensor-parallel ranks (or --layout dp)
    python examples/demo.py --loss orpo                  # another loss of fastpref.losses

Every step is what a user would type; the commands are printed before they run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Path("examples/quickstart.yaml")


def main() -> None:
    """Runs the demo from the repository's root."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", default="default", help="a loss of fastpref.losses; default: that of quickstart.yaml")
    parser.add_argument("--nproc", type=int, default=1, help="number of ranks")
    parser.add_argument(
        "--layout", choices=("dp", "tp"), default="dp", help="what several ranks share: data or tensors"
    )
    parser.add_argument("--steps", type=int, help="stop after this many steps instead of whole epochs")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="where everything is written")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ["HF_HUB_OFFLINE"] = "1"
    # The model is too small to share its matrices between threads; waiting for each other only costs time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    shutil.rmtree(args.output, ignore_errors=True)

    overrides = overrides_of(args)
    before, after = args.output / "model-before", args.output / "model"
    export_initial_weights(overrides, before)
    run([*launcher(args.nproc), "train", str(CONFIG), *overrides, "--export", str(after)])
    run([sys.executable, "-m", "fastpref", "plot", str(args.output), "--output", str(args.output / "curves.png")])
    show_answers(before, after)
    print(f"\nIn {args.output}: metrics.jsonl, tensorboard/, curves.png, checkpoints/, model/ (Hugging Face form)")


def overrides_of(args: argparse.Namespace) -> list[str]:
    """Settings that differ from the file."""
    overrides = [f"training.output_dir={args.output}"]
    if args.loss != "default":
        overrides += [f"loss.pref_loss={args.loss}", "loss.loss_weights=null"]
    if args.steps is not None:
        overrides += [f"training.max_steps={args.steps}", f"training.warmup_steps={min(20, args.steps // 2)}"]
    if args.nproc > 1 and args.layout == "tp":
        overrides.append(f"training.tensor_model_parallel_size={args.nproc}")
    elif args.nproc > 1:
        overrides.append(f"training.per_device_train_batch_size={32 // args.nproc}")
    return overrides


def launcher(nproc: int) -> list[str]:
    """The command in front of `train`: plain Python, or torchrun for several ranks."""
    if nproc == 1:
        return [sys.executable, "-m", "fastpref"]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={nproc}",
        "-m",
        "fastpref",
    ]


def run(command: list[str]) -> None:
    """Prints a command, runs it, and stops the demo when it fails."""
    print("\n$ " + shlex.join(["python", *command[1:]]), flush=True)
    with subprocess.Popen(command) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # it has come to the command, too, which ends in its own way
            code = process.wait()
    if code:
        raise SystemExit(code)


def export_initial_weights(overrides: list[str], directory: Path) -> None:
    """Writes the random weights that training starts from, to compare with."""
    from fastpref.run.config.run_file import load_run_config
    from fastpref.trainer import build_models, initialize_megatron, save_hf
    from fastpref.trainer.ranks.platform import destroy

    config = load_run_config(CONFIG, [*overrides, "training.tensor_model_parallel_size=1"])
    initialize_megatron(config.training)
    models = build_models(config.model.config, seed=config.training.seed)
    save_hf(models, directory, config.model.config, config.model.tokenizer_path)
    destroy()


def show_answers(before: Path, after: Path) -> None:
    """Loads both models in transformers and prints their answers to two held-out questions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    lines = Path("examples/data/demo_eval.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines[:2]]
    tokenizer = AutoTokenizer.from_pretrained(after)
    models = {
        "before": AutoModelForCausalLM.from_pretrained(before),
        "after": AutoModelForCausalLM.from_pretrained(after),
    }
    print("\nHeld-out questions, answered by the exported model in transformers:")
    for pair in pairs:
        inputs = tokenizer.apply_chat_template(
            pair["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        print(f"\n  {pair['prompt'][-1]['content']}")
        for name, model in models.items():
            output = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            answer = tokenizer.decode(output[0, inputs["input_ids"].size(1) :], skip_special_tokens=True)
            print(f"    {name:>6}: {answer}")
        print(f"    wanted: {pair['chosen'][-1]['content']}")


if __name__ == "__main__":
    main()
