"""Inputs of the head: hidden states, vocabulary weight, labels and reference log-probs of preference pairs.

Real workloads: final hidden states of a real model on real pairs, its own head. `random-init` has the shape of
`gemma3-270m` with the flat softmax of an untrained model. Synthetic ones, for sweeps, imitate the real softmax: a logit
is that of `popularity` plus noise of standard deviation `SPREAD`, plus 0 to 2 `PEAK` at one id of each row, itself
log-uniform. Labels are drawn from that softmax. The number of active columns then follows `expected_active`, as in real
models: it hardly depends on V or on the rows, so its share falls as V grows.
All padding is at the end; sequences are all chosen ones first, then their rejected ones.

Dims: `B` pairs, `S` = 2B sequences, `L` padded length, `R` response rows, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastpref.kernels.active import FLAT_SHARE

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "runs" / "bench"
MODELS = {"gemma3-270m": "gemma3", "smollm2-135m": "smollm2"}
PAIRS = ROOT / "examples" / "data_real" / "head_pairs.jsonl"
NAMES = (*MODELS, "random-init", "dry")
IGNORE = -100
BETA = 0.1
SLOPE, CURVE = 1.69, 0.2143
"""With x = ln(1 + id) the logit of a column is SLOPE x - CURVE x^2 on average: fitted, as BULK, to the columns that are
active in two real models at seven tolerances each (`bench.activity`)."""
SPREAD, PEAK = 2.5, 11.0
MEAN = 0.8
"""Length of the mean hidden state over that of what is left of one without it: 0.77 and 0.86 in the two models. The
popularity of a column is its product with the mean; of a short mean it would take long weights, which no mean of cold
weights could stand for."""
BULK = 0.7
"""Mass per row that follows this law, as the bound of the forward pass overestimates it; the rest sits in the peaks."""
BLOCK_ROWS = {"cpu": 64, "cuda": 512}


@dataclass(frozen=True, eq=False)
class Case:
    """What every implementation gets: on the CPU in fp32, or, after `to`, on a GPU in 16 bits.

    Derived index tensors are what a collator hands over.
    """

    name: str
    hidden_SLH: Tensor
    weight_VH: Tensor
    labels_SL: Tensor
    """Already shifted; -100 on prompt and padding."""
    ref_logps_S: Tensor
    """Log-probs of the reference model: constants in fp32."""
    backend: str = "auto"
    """What `linear_logps` is to run on."""
    tp_group: ProcessGroup | None = None
    """The ranks that hold the weight's parts, where `weight_VH` is one."""

    @property
    def num_pairs(self) -> int:
        """B."""
        return self.labels_SL.shape[0] // 2

    @cached_property
    def rows_R(self) -> Tensor:
        """Flat positions that carry a label, sequence by sequence."""
        return (self.labels_SL.flatten() != IGNORE).nonzero().squeeze(1)

    @cached_property
    def row_labels_R(self) -> Tensor:
        """Their labels."""
        return self.labels_SL.flatten()[self.rows_R]

    @cached_property
    def row_sequences_R(self) -> Tensor:
        """The sequence each belongs to."""
        return self.rows_R // self.labels_SL.shape[1]

    @cached_property
    def cu_rows(self) -> Tensor:
        """[S+1], bounds of each sequence's rows."""
        counts_S = (self.labels_SL != IGNORE).sum(1)
        return torch.cat([counts_S.new_zeros(1), counts_S.cumsum(0)])

    @cached_property
    def host_rows(self) -> tuple[Tensor, Tensor]:
        """`rows_R` and `cu_rows` on the host, where a collator makes them."""
        return self.rows_R.cpu(), self.cu_rows.cpu()

    @cached_property
    def pair_lengths(self) -> list[int]:
        """Positions up to the last label of each pair's longer side."""
        is_labelled_SL = (self.labels_SL != IGNORE).cpu()
        last_SL = torch.arange(1, is_labelled_SL.shape[1] + 1, dtype=torch.int64) * is_labelled_SL
        return last_SL.amax(1).view(2, -1).amax(0).tolist()

    @property
    def folder(self) -> Path:
        """Where what costs much to make is kept; what belongs to another law of drawing is not found there."""
        law = f"{SLOPE}-{CURVE}-{SPREAD}-{PEAK}-{MEAN}"
        return CACHE / (f"{self.name}-{law}" if is_drawn(self.name) else self.name)

    @property
    def shape(self) -> dict[str, int]:
        """Sizes for a result row."""
        (sequences, length), (vocab, hidden) = self.labels_SL.shape, self.weight_VH.shape
        sizes = {"sequences": sequences, "positions": sequences * length, "rows": self.rows_R.numel()}
        return sizes | {"vocab": vocab, "hidden": hidden}

    def to(self, device: torch.device, dtype: torch.dtype) -> Case:
        """The same case elsewhere; hidden states and weight rounded to `dtype`."""
        return replace(
            self,
            hidden_SLH=self.hidden_SLH.to(device, dtype),
            weight_VH=self.weight_VH.to(device, dtype),
            labels_SL=self.labels_SL.to(device),
            ref_logps_S=self.ref_logps_S.to(device),
        )

    def tiny(self) -> Case:
        """The first labels of the same case on 64 vocabulary rows: enough to wake threads and BLAS."""
        labels_SL = torch.where(self.labels_SL == IGNORE, IGNORE, self.labels_SL % 64)
        return replace(self, weight_VH=self.weight_VH[:64].clone(), labels_SL=labels_SL)


def build(name: str) -> Case:
    """Make a workload, from the cache where its costly part is.

    Args:
        name: one of `NAMES`, or `synthetic-v<V>-r<R>-f<R/T in percent>`.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: the model of a real workload is not there; the message says how to get it.
    """
    synthetic = re.fullmatch(r"synthetic-v(\d+)-r(\d+)-f(\d+)", name)
    if name not in NAMES and not synthetic:
        raise ValueError(f"workload must be one of {', '.join(NAMES)} or synthetic-v<V>-r<R>-f<percent>; got {name!r}")
    if synthetic:
        vocab, rows, percent = map(int, synthetic.groups())
        return _finish(name, *_synthetic(vocab, 512, rows, rows * 100 // percent, num_pairs=4))
    if name == "dry":
        return _finish(name, *_synthetic(512, 64, 96, 192, num_pairs=2))
    if name == "random-init":
        return _finish(name, *_random_init(build("gemma3-270m")))
    model_dir = ROOT / "runs" / "models" / MODELS[name]
    if not model_dir.exists():
        command = f"python -m checks.real_models {MODELS[name]} {model_dir.relative_to(ROOT)}"
        raise FileNotFoundError(f"workload {name} needs {model_dir}; make it with: {command}")
    weight_VH = _head_weight(model_dir)
    cached = CACHE / name / "hidden.pt"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.save(_hidden_states(model_dir), cached)
    return _finish(name, weight_VH, *torch.load(cached))


def is_drawn(name: str) -> bool:
    """Tell whether `build` draws the activations of a workload after the law of real ones."""
    return name.startswith("synthetic-")


def softmax_blocks(hidden_RH: Tensor, weight_VH: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Softmax [rows, V] of a few rows at a time, in the dtype given."""
    height = BLOCK_ROWS[hidden_RH.device.type]
    for start in range(0, hidden_RH.shape[0], height):
        block = slice(start, min(start + height, hidden_RH.shape[0]))
        yield block, torch.softmax(hidden_RH[block] @ weight_VH.t(), dim=1)


def _finish(name: str, weight_VH: Tensor, hidden_SLH: Tensor, labels_SL: Tensor) -> Case:
    """Add reference log-probs; those of all but the dry case are kept on disk."""
    case = Case(name, hidden_SLH, weight_VH, labels_SL, torch.zeros(labels_SL.shape[0], dtype=torch.float32))
    cached = case.folder / "reference.pt"
    if name != "dry" and cached.exists():
        return replace(case, ref_logps_S=torch.load(cached))
    case = with_reference(case)
    if name != "dry":
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.save(case.ref_logps_S, cached)
    return case


def with_reference(case: Case) -> Case:
    """Give a case reference log-probs near the policy's own: a model some steps away from its reference."""
    logps_R = torch.empty(case.rows_R.numel(), dtype=torch.float32, device=case.rows_R.device)
    for block, softmax_RV in softmax_blocks(case.hidden_SLH.flatten(0, 1)[case.rows_R], case.weight_VH):
        logps_R[block] = softmax_RV.gather(1, case.row_labels_R[block, None]).squeeze(1).log()
    logps_S = torch.stack([part.sum() for part in logps_R.tensor_split(case.cu_rows[1:-1].cpu())])
    noise_S = torch.randn(logps_S.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32) * 5.0
    return replace(case, ref_logps_S=(logps_S + noise_S.to(logps_S.device)).round())


def _head_weight(model_dir: Path) -> Tensor:
    """The head [V, H] in fp32; both models tie it to the embedding and have no softcap."""
    from safetensors import safe_open

    with safe_open(model_dir / "model.safetensors", "pt") as file:
        return file.get_tensor("model.embed_tokens.weight").float()


def _hidden_states(model_dir: Path) -> tuple[Tensor, Tensor]:
    """Run the model on real pairs: hidden [S, L, H] after the final norm, labels [S, L]."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModel.from_pretrained(model_dir, dtype=torch.float32)
    pairs = [_tokenize(tokenizer, *texts) for texts in _texts()]
    sequences = [pair[side] for side in (0, 1) for pair in pairs]
    length = max(len(tokens) for tokens, _ in sequences) - 1
    hidden_SLH = torch.zeros(len(sequences), length, model.config.hidden_size, dtype=torch.float32)
    labels_SL = torch.full((len(sequences), length), IGNORE, dtype=torch.int64)
    with torch.no_grad():
        for index, (tokens, prompt_length) in enumerate(sequences):
            ids = torch.tensor([tokens], dtype=torch.int64)
            hidden_SLH[index, : len(tokens) - 1] = model(ids).last_hidden_state[0, :-1]
            labels_SL[index, prompt_length - 1 : len(tokens) - 1] = ids[0, prompt_length:]
    return hidden_SLH, labels_SL


def _texts() -> Iterator[tuple[str, str, str]]:
    """Prompt, chosen and rejected text of every pair."""
    for line in PAIRS.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        prompt = "\n\n".join(message["content"] for message in record["prompt"])
        yield prompt, record["chosen"][0]["content"], record["rejected"][0]["content"]


def _tokenize(tokenizer: Any, prompt: str, chosen: str, rejected: str) -> tuple[tuple[list[int], int], ...]:
    """(tokens, number of prompt tokens) of both sides: plain text, an empty line between prompt and response."""
    prompt_ids = tokenizer(prompt + "\n\n")["input_ids"]
    sides = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (chosen, rejected))
    return tuple((prompt_ids + ids + [tokenizer.eos_token_id], len(prompt_ids)) for ids in sides)


def _random_init(like: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Weights with standard deviation 0.02, as models start, and normalised hidden states: a flat softmax."""
    generator = torch.Generator().manual_seed(2)
    weight_VH = torch.randn(like.weight_VH.shape, generator=generator, dtype=torch.float32) * 0.02
    hidden_SLH = torch.randn(like.hidden_SLH.shape, generator=generator, dtype=torch.float32)
    labels_SL = torch.randint(weight_VH.shape[0], like.labels_SL.shape, generator=generator, dtype=torch.int64)
    return weight_VH, hidden_SLH, torch.where(like.labels_SL == IGNORE, IGNORE, labels_SL)


def _synthetic(vocab: int, hidden: int, rows: int, positions: int, num_pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences of one length with responses of one length."""
    sequences = 2 * num_pairs
    return draw_head(vocab, hidden, math.ceil(positions / sequences), [rows // sequences] * sequences)


def popularity(vocab: int, device: str | torch.device = "cpu") -> Tensor:
    """The mean logits of drawn columns, fp64 [V]: lognormal in the id, as the masses of real tokens in their rank."""
    log_id_V = torch.arange(1, vocab + 1, dtype=torch.float64, device=device).log()
    return SLOPE * log_id_V - CURVE * log_id_V.square()


def expected_active(vocab: int, active_eps: float) -> float:
    """The rule for the active part of a vocabulary: all but the least popular columns that hold `active_eps` together.

    It rests on two models (V = 49,152 and 262,144), 387 to 1614 rows and tolerances of 2^-5 to 2^-11, and does not
    depend on the rows; beyond them it is a guess. docs/benchmarks.md has it beside what was measured.

    Args:
        vocab: V.
        active_eps: tolerance of the active plan.

    Returns:
        The share of columns; 1 where the plan would fall back to exact gradients.
    """
    share_V = torch.softmax(popularity(vocab), dim=0).flip(0)
    share = 1.0 - float((BULK * share_V.cumsum(0) <= active_eps).sum()) / vocab
    return share if share <= FLAT_SHARE else 1.0


def draw_head(
    vocab: int, hidden: int, length: int, responses: list[int], device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw logits of a known law; the last positions of every sequence are its response.

    Args:
        vocab: V.
        hidden: H.
        length: L.
        responses: length of each sequence's response.
        device: where everything is drawn; each kind of device has its own numbers.

    Returns:
        (weight [V, H], hidden [S, L, H], labels [S, L]) in fp32.
    """
    generator = torch.Generator(device).manual_seed(3)
    sequences = len(responses)
    draw = {"generator": generator, "dtype": torch.float32, "device": device}
    weight_VH = torch.randn(vocab, hidden, **draw) * (SPREAD / hidden**0.5)
    hidden_SLH = torch.randn(sequences, length, hidden, **draw)
    likely_SL = (torch.rand(sequences, length, **draw) * math.log(vocab)).exp().long().clamp(max=vocab - 1)
    peak_SL = 2 * PEAK * torch.rand(sequences, length, **draw)
    hidden_SLH += weight_VH[likely_SL] * (peak_SL / SPREAD**2)[..., None]
    hidden_SLH[..., 0] = MEAN * hidden**0.5
    weight_VH[:, 0] = popularity(vocab, device).float() / (MEAN * hidden**0.5)
    labels_SL = torch.full((sequences, length), IGNORE, dtype=torch.int64, device=device)
    for sequence, response in enumerate(responses):
        for block, softmax_RV in softmax_blocks(hidden_SLH[sequence, length - response :], weight_VH):
            drawn = torch.multinomial(softmax_RV, 1, generator=generator).squeeze(1)
            labels_SL[sequence, length - response + block.start : length - response + block.stop] = drawn
    return weight_VH, hidden_SLH, labels_SL
