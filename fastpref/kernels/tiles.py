"""Tile shapes of the Triton kernels, by architecture, width of the operands and H.

A table, not an autotuner: the cut of the vocabulary is part of a result's bits, so it must not depend on what a timing
run found today. `python -m fastpref.kernels.tuning` measures and writes a table of the same form; it is used where
the environment variable FASTPREF_TILES names its file, instead of the entries here that it also has.

A file is {"sm_90/16": [{"min_hidden": 0, "rows": 128, ...}, ...], ...}; /8 is the screening pass, of int8 operands.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from pathlib import Path

import torch

from fastpref.errors import ConfigError

# Columns of the vocabulary that share an exponent in a cache; every tile is a multiple of it wide.
CACHE_COLUMNS = 64
OVERRIDE_VARIABLE = "FASTPREF_TILES"
INTERPRETER = "interpreter"
# Warpgroups that multiply in the Gluon kernel, each half of a tile's rows.
GLUON_HALVES = 2
FIELD_CHOICES = {
    "rows": (16, 32, 64, 128, 256),
    "columns": (64, 128, 256),
    "hidden": (16, 32, 64, 128),
    "group_rows": tuple(range(1, 65)),
    "slices": (1, 2, 4),
    "warps": (1, 2, 4, 8, 16),
    "stages": tuple(range(1, 9)),
    "programs_per_sm": (1, 2, 3, 4),
    "kernel": ("triton", "gluon"),
}
# A matrix instruction sums up so many products of int8.
LEAST_HIDDEN_8 = 32
# What the Gluon kernel is built for: two warpgroups of 64 rows, swizzles of 128 bytes, a ring of several buffers.
GLUON_KEY = "sm_90/16"
GLUON_CHOICES = {
    "rows": (128,),
    "columns": (128, 256),
    "hidden": (64,),
    "warps": (8,),
    "stages": tuple(range(2, 9)),
    "programs_per_sm": (1,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """How one program works."""

    min_hidden: int = 0
    """Smallest H that the entry is for; the last that fits is taken."""
    rows: int
    """Rows of a tile."""
    columns: int
    """Vocabulary columns of a tile."""
    hidden: int
    """Elements of H per step of the product."""
    group_rows: int
    """Row tiles of a band that goes through the vocabulary together."""
    slices: int
    """Slices of columns in which the finished tile is reduced: 1, 2 or 4; more need fewer registers."""
    warps: int
    """Warps of a program."""
    stages: int
    """Steps of H in flight."""
    programs_per_sm: int = 1
    """Programs that share a multiprocessor; with 2, one reduces its tile while the other multiplies."""
    kernel: str = "triton"
    """What computes the forward pass: "triton", or "gluon", whose warpgroups multiply and reduce out of step."""

    @property
    def mass_rows(self) -> int:
        """Rows whose share of a column's mass is written as one number."""
        return self.rows // GLUON_HALVES if self.kernel == "gluon" else self.rows


_HOPPER_16 = Tile(rows=128, columns=256, hidden=64, group_rows=16, slices=4, warps=8, stages=4)
_SMALL_16 = Tile(rows=128, columns=128, hidden=32, group_rows=16, slices=4, warps=8, stages=4)
_ANY_32 = Tile(rows=64, columns=128, hidden=16, group_rows=16, slices=2, warps=8, stages=3)
# As many bytes in a step as with 16 bits. Of fewer columns a program has fewer scales to keep in registers.
_HOPPER_8 = dataclasses.replace(_HOPPER_16, rows=256, columns=128, hidden=128, slices=2)
_SMALL_8 = dataclasses.replace(_SMALL_16, hidden=64)

TABLE: dict[str, tuple[Tile, ...]] = {
    "sm_90/8": (_HOPPER_8,),
    "sm_90/16": (_HOPPER_16,),
    "sm_90/32": (_ANY_32,),
    "sm_100/8": (dataclasses.replace(_SMALL_8, hidden=128, slices=1),),
    "sm_100/16": (dataclasses.replace(_HOPPER_16, columns=128, slices=1),),
    "sm_100/32": (_ANY_32,),
    # 163 KiB of shared memory on an A100 ...
    "sm_80/8": (dataclasses.replace(_SMALL_8, hidden=128),),
    "sm_80/16": (dataclasses.replace(_SMALL_16, hidden=64, stages=4),),
    "sm_80/32": (_ANY_32,),
    # ... and 99 KiB on the others of its kind and on consumer Blackwell.
    "sm_86/8": (_SMALL_8,),
    "sm_86/16": (_SMALL_16,),
    "sm_86/32": (_ANY_32,),
    # So small that a few rows and columns cross many tiles.
    f"{INTERPRETER}/8": (Tile(rows=16, columns=64, hidden=32, group_rows=2, slices=4, warps=4, stages=1),),
    f"{INTERPRETER}/16": (Tile(rows=16, columns=64, hidden=16, group_rows=2, slices=4, warps=4, stages=1),),
    f"{INTERPRETER}/32": (Tile(rows=16, columns=64, hidden=16, group_rows=2, slices=2, warps=4, stages=1),),
}

CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "sm_90/16": (
        _HOPPER_16,
        dataclasses.replace(_HOPPER_16, slices=2),
        dataclasses.replace(_HOPPER_16, stages=3),
        dataclasses.replace(_HOPPER_16, group_rows=8),
        dataclasses.replace(_HOPPER_16, group_rows=32),
        dataclasses.replace(_HOPPER_16, rows=256, columns=128),
        dataclasses.replace(_HOPPER_16, columns=128),
        dataclasses.replace(_HOPPER_16, columns=128, slices=2, warps=4, stages=3, programs_per_sm=2),
        dataclasses.replace(_HOPPER_16, columns=128, hidden=128, stages=3),
        dataclasses.replace(_HOPPER_16, kernel="gluon"),
        dataclasses.replace(_HOPPER_16, kernel="gluon", group_rows=32),
    ),
    "sm_90/32": (
        _ANY_32,
        dataclasses.replace(_ANY_32, columns=64),
        dataclasses.replace(_ANY_32, rows=128),
        dataclasses.replace(_ANY_32, warps=4, programs_per_sm=2),
    ),
}
"""What `fastpref.kernels.tuning` measures; architectures without candidates are tuned among the entries of `TABLE`."""


def architecture_of(capability: tuple[int, int]) -> str:
    """Return the name under which a device of this compute capability stands in the table.

    Raises:
        ConfigError: older than 8.0, which has no bf16.
    """
    if capability < (8, 0):
        raise ConfigError(
            f"the Triton backend needs a GPU of compute capability 8.0 or newer, got {capability[0]}.{capability[1]}; "
            "use backend='torch'"
        )
    if capability == (8, 0):
        return "sm_80"
    if capability[0] in (9, 10):
        return f"sm_{capability[0]}0"
    return "sm_86"


def select_tile(architecture: str, dtype: torch.dtype, hidden_size: int) -> Tile:
    """Return the tile for an architecture of the table, a dtype of the operands and H.

    Raises:
        ConfigError: the file that FASTPREF_TILES names cannot be used.
    """
    key = f"{architecture}/{dtype.itemsize * 8}"
    path = os.environ.get(OVERRIDE_VARIABLE)
    table = TABLE | load_table(path) if path else TABLE
    return [tile for tile in table[key] if tile.min_hidden <= hidden_size][-1]


@functools.cache
def load_table(path: str) -> dict[str, tuple[Tile, ...]]:
    """Read a table from a file; read once per process.

    Raises:
        ConfigError: unreadable, or an entry that no kernel can be built from.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        table = {key: tuple(Tile(**entry) for entry in entries) for key, entries in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{OVERRIDE_VARIABLE}={path} must name a tile table in JSON ({error}); write it with "
            "`python -m fastpref.kernels.tuning`, or unset the variable"
        ) from error
    for key, tiles in table.items():
        _check_entry(path, key, tiles)
    return table


def save_table(path: str, table: dict[str, tuple[Tile, ...]]) -> None:
    """Write a table for FASTPREF_TILES; an existing file is replaced as a whole."""
    content = {key: [dataclasses.asdict(tile) for tile in tiles] for key, tiles in table.items()}
    partial = Path(f"{path}.tmp")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _check_entry(path: str, key: str, tiles: tuple[Tile, ...]) -> None:
    if key not in TABLE:
        raise ConfigError(f"{path}: {key!r} must be one of {', '.join(TABLE)}")
    bounds = [tile.min_hidden for tile in tiles]
    if not bounds or bounds[0] != 0 or any(low >= high for low, high in itertools.pairwise(bounds)):
        raise ConfigError(f"{path}: min_hidden of {key} must start at 0 and rise, got {bounds}")
    for tile in tiles:
        for field, choices in FIELD_CHOICES.items():
            value = getattr(tile, field)
            if type(value) is not type(choices[0]) or value not in choices:
                raise ConfigError(
                    f"{path}: {field} of {key} must be one of {', '.join(map(str, choices))}, got {value!r}"
                )
        if key.endswith("/8") and tile.hidden < LEAST_HIDDEN_8:
            raise ConfigError(f"{path}: hidden of {key} must be at least {LEAST_HIDDEN_8}, got {tile.hidden}")
        if tile.kernel == "gluon":
            _check_gluon_entry(path, key, tile)


def _check_gluon_entry(path: str, key: str, tile: Tile) -> None:
    if key != GLUON_KEY:
        raise ConfigError(
            f'{path}: kernel of {key} must be triton: the Gluon kernel is for {GLUON_KEY}; set it to "triton", or '
            "write the table anew with `fastpref kernels tune` on the GPU that will use it"
        )
    for field, choices in GLUON_CHOICES.items():
        if getattr(tile, field) not in choices:
            raise ConfigError(
                f"{path}: {field} of {key} must be {' or '.join(map(str, choices))} with the Gluon kernel, got "
                f'{getattr(tile, field)}; change it, or set kernel to "triton"'
            )
