"""A job of two real processes in which rank 1 fails in the second step, in one way or another."""

import os
import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import faulthandler, os, signal, sys, time

faulthandler.dump_traceback_later(150, exit=True)  # a hang shows where it hangs
from fastpref.cli.commands import cli
from fastpref.errors import DataError
from fastpref.trainer.step import feed
from fastpref.trainer.saves.shards import AbandonedError, Shards

original = feed.PairFeed.train_batches

def train_batches(self, step):
    if step == 1 and os.environ["RANK"] == "1":
        {action}
    return original(self, step)

def write(self, number, is_abandoned):
    while not is_abandoned():
        time.sleep(0.01)
    raise AbandonedError("the writer was told to end")

feed.PairFeed.train_batches = train_batches
Shards.write = write
cli(["train", "run.yaml", "training.output_dir=out", *{options}])
"""
ACTIONS = {
    "raises": 'raise DataError("the record is broken", path="pairs.jsonl", line=7)',
    "dies": "os.kill(os.getpid(), signal.SIGKILL)",
    "hangs": "os.kill(os.getpid(), signal.SIGSTOP)",
}
TIMEOUT_S = 8
COLLECTIVE = r"\w*(?:gather|reduce|broadcast|barrier|recv|send)\w* \(called at \w+\.py:\d+\)"
"""How an error names what the other rank did not join."""


def start(project: Path, rank: int, action: str, saves: bool, port: int) -> subprocess.Popen:
    script = project / f"rank{rank}.py"
    options = ["training.per_device_train_batch_size=1", f"training.distributed_timeout_seconds={TIMEOUT_S}"]
    if saves:
        options += ["training.async_save=true", "training.save_steps=1"]
    script.write_text(SCRIPT.format(action=ACTIONS[action], options=options))
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # as under torchrun: the store is the launcher's, so that no port has to be free when a rank begins
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def run(project: Path, action: str, *, saves: bool = False) -> list[tuple[int, str]]:
    """Exit code and error output of both ranks; a rank that hangs is killed, as a launcher would, after the other.

    With `saves` a save is under way beside the second step, which no rank gets written.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [start(project, rank, action, saves, store.port) for rank in (0, 1)]
    try:
        first = ranks[0].communicate(timeout=180)[1]
        if action == "hangs":
            ranks[1].send_signal(signal.SIGKILL)
        second = ranks[1].communicate(timeout=60)[1]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
    return [(ranks[0].returncode, first), (ranks[1].returncode, second)]
