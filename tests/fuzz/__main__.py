"""`make fuzz`: coverage-guided fuzzing of the readers of untrusted files, each in a process of its own.

    python tests/fuzz --seconds 240                  # 60 seconds for each target
    python tests/fuzz --target config --seconds 600
    python tests/fuzz --target config FILE...        # run inputs that were found before, once each

The first byte of an input chooses the file that it replaces (`fuzz_targets`); the rest is its content. What reaches new
code is kept in runs/fuzz/<target>, and tried first the next time; inputs that break a reader are runs/fuzz/<target>-*.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).resolve().parents[1]))

import atheris
from fuzz_damage import damage

NAMES = ("data", "config", "manifest", "model")
CORPUS = Path("runs/fuzz")
MAX_BYTES = 16384


def fuzz(name: str, seconds: int, inputs: list[str]) -> None:
    """Fuzz one target in this process, which ends with libFuzzer's exit code."""
    folder = Path(tempfile.mkdtemp(prefix="fastpref-fuzz-"))
    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=["fastpref"], enable_loader_override=False):
        from fuzz_targets import TARGETS

        target = TARGETS[name]
        target.write(folder)
        for index, document in enumerate(target.documents):
            (corpus / f"seed-{index}").write_bytes(bytes([index]) + document.content)
            target.read(folder, document.name)  # what it imports only now is instrumented too

    def run_input(data: bytes) -> None:
        if data:
            target.survives(folder, target.documents[data[0] % len(target.documents)], data[1:])

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if not data or random.random() < 0.4:
            return atheris.Mutate(data, max_size)
        kind = target.documents[data[0] % len(target.documents)].kind
        return data[:1] + damage(kind, data[1:], random)[: max_size - 1]

    limits = [f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", "-timeout=20", "-rss_limit_mb=4096"]
    options = [*limits, f"-artifact_prefix={corpus}-", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, *(inputs or [str(corpus)])], run_input, custom_mutator=change)
    atheris.Fuzz()


def fuzz_all(seconds: int) -> int:
    """Fuzz every target for its share of `seconds`; return how many broke."""
    num_broken = 0
    for name in NAMES:
        command = [sys.executable, __file__, "--target", name, "--seconds", str(seconds // len(NAMES))]
        with tempfile.TemporaryFile("w+") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
            log.seek(0)
            text = log.read()
        runs = re.search(r"number_of_executed_units: *(\d+)", text)
        covered = re.findall(r"\bcov: (\d+)", text)
        print(f"{name}: {runs[1] if runs else '?'} inputs, {covered[-1] if covered else '?'} edges, exit code {code}")
        if code:
            num_broken += 1
            print(text[-4000:])
    return num_broken


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=NAMES, help="only this one")
    parser.add_argument("--seconds", type=int, default=240, help="for all targets together, or the only one")
    parser.add_argument("inputs", nargs="*", help="files to run instead")
    args = parser.parse_args()
    if args.target is None:
        sys.exit(min(fuzz_all(args.seconds), 1))
    fuzz(args.target, args.seconds, args.inputs)


if __name__ == "__main__":
    main()
