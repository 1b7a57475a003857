"""Whether a run can go on from a checkpoint: it must not be past the run's end."""

from __future__ import annotations

from pathlib import Path

from fastpref.checkpoint import directory
from fastpref.errors import CheckpointError


def check_position(path: Path, total_steps: int) -> None:
    """Require that a run of `total_steps` optimizer steps is not over before the checkpoint `path`.

    Raises:
        CheckpointError: the checkpoint is of a later step than the run's last, or its state cannot be read.
    """
    saved = directory.read_state(path)
    step = saved.get("step")
    if not isinstance(step, int) or step <= total_steps:
        return
    length = (saved.get("fingerprint") or {}).get("total_steps")
    before = f"; the run that saved it has {length}" if isinstance(length, int) else ""
    earlier = [other for other in directory.finished_steps(path.parent) if other <= total_steps]
    other_start = (
        f"continue from {directory.step_directory(path.parent, earlier[-1])} in another output_dir, " if earlier else ""
    )
    raise CheckpointError(
        f"{path} is at step {step}, but this run ends at step {total_steps}: there is nothing left to train, and these "
        f"are not the weights of step {total_steps}. Give the run at least {step} steps (training.max_steps, or more "
        f"training.num_train_epochs{before}), {other_start}or write the weights of step {step} with "
        f"fastpref export --checkpoint {path}"
    )
