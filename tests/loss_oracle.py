"""The losses as their papers print them, in 80 digits, with central differences; shares no code with the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mpmath as mp

mp.mp.dps = 80
STEP = mp.mpf(10) ** -25

# name of a case -> arguments of DPOConfig
CASES: dict[str, dict] = {
    "sigmoid": {"pref_loss": "sigmoid"},
    "sigmoid beta 1": {"pref_loss": "sigmoid", "beta": 1.0},
    "sigmoid smoothed": {"pref_loss": "sigmoid", "label_smoothing": 0.2},
    "sigmoid half smoothed": {"pref_loss": "sigmoid", "label_smoothing": 0.5},
    "sigmoid forward_kl": {"pref_loss": "sigmoid", "f_divergence": "forward_kl"},
    "sigmoid js": {"pref_loss": "sigmoid", "f_divergence": "js"},
    "sigmoid alpha": {"pref_loss": "sigmoid", "f_divergence": "alpha"},
    "sigmoid alpha 1": {"pref_loss": "sigmoid", "f_divergence": "alpha", "f_alpha": 1.0},
    "sigmoid alpha 0": {"pref_loss": "sigmoid", "f_divergence": "alpha", "f_alpha": 0.0},
    "sigmoid alpha 1.3": {"pref_loss": "sigmoid", "f_divergence": "alpha", "f_alpha": 1.3},
    "orpo": {"pref_loss": "orpo", "beta": 0.3},
    "hinge": {"pref_loss": "hinge"},
    "hinge js": {"pref_loss": "hinge", "f_divergence": "js"},
    "ipo": {"pref_loss": "ipo"},
    "ipo sum": {"pref_loss": "ipo", "ipo_reduction": "sum"},
    "ipo forward_kl": {"pref_loss": "ipo", "f_divergence": "forward_kl"},
    "robust": {"pref_loss": "robust"},
    "robust smoothed": {"pref_loss": "robust", "label_smoothing": 0.3},
    "exo_pair": {"pref_loss": "exo_pair", "label_smoothing": 1e-3},
    "exo_pair alpha": {"pref_loss": "exo_pair", "label_smoothing": 0.1, "f_divergence": "alpha", "f_alpha": 0.7},
    "nca_pair": {"pref_loss": "nca_pair"},
    "bco_pair": {"pref_loss": "bco_pair"},
    "sppo_hard": {"pref_loss": "sppo_hard"},
    "apo_zero": {"pref_loss": "apo_zero"},
    "apo_down": {"pref_loss": "apo_down"},
    "discopop": {"pref_loss": "discopop"},
    "discopop beta 1 tau 1": {"pref_loss": "discopop", "beta": 1.0, "discopop_tau": 1.0},
    "sigmoid_norm": {"pref_loss": "sigmoid_norm", "beta": 2.0},
    "sigmoid_norm js": {"pref_loss": "sigmoid_norm", "beta": 2.0, "f_divergence": "js"},
    "simpo": {"pref_loss": "simpo", "beta": 2.0},
    "simpo all options": {
        "pref_loss": "simpo",
        "beta": 2.5,
        "simpo_gamma": 1.4,
        "simpo_alpha": 0.3,
        "nll_reduction": "sequence",
        "label_smoothing": 0.1,
    },
    "cpo": {"pref_loss": "cpo"},
    "cpo all options": {"pref_loss": "cpo", "cpo_alpha": 0.4, "nll_reduction": "sequence", "label_smoothing": 0.1},
    "cpo without nll": {"pref_loss": "cpo", "cpo_alpha": 0.0},
    "sft": {"pref_loss": "sft"},
    "sft sequence": {"pref_loss": "sft", "nll_reduction": "sequence"},
    "mpo": {"pref_loss": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.5)},
    "hinge + ipo": {"pref_loss": ("hinge", "ipo"), "beta": 0.4},
}
# a pair's loss is that pair's own in every case above; these two sort the batch and are tested beside it
SORTED_LOSSES = ("aot", "aot_unpaired")


@dataclass(frozen=True)
class Pair:
    """One pair: sums under policy and reference, and token counts."""

    chosen: float
    rejected: float
    ref_chosen: float
    ref_rejected: float
    chosen_count: int
    rejected_count: int


def lsig(x: mp.mpf) -> mp.mpf:
    return -mp.log1p(mp.exp(-x)) if x >= 0 else x - mp.log1p(mp.exp(x))


def sig(x: mp.mpf) -> mp.mpf:
    return 1 / (1 + mp.exp(-x))


def divergence(log_ratio: mp.mpf, case: dict) -> mp.mpf:
    kind, alpha = case.get("f_divergence", "reverse_kl"), mp.mpf(case.get("f_alpha", 0.5))
    ratio = mp.exp(log_ratio)
    if kind == "forward_kl":
        return 1 - 1 / ratio
    if kind == "js":
        return mp.log(2 * ratio / (ratio + 1))
    if kind == "alpha" and alpha != 1:
        return (ratio ** (alpha - 1) - 1) / (alpha - 1)
    return log_ratio


def smoothed(x: mp.mpf, case: dict) -> mp.mpf:
    ls = mp.mpf(case.get("label_smoothing", 0))
    return -(1 - ls) * lsig(x) - ls * lsig(-x)


def single(name: str, case: dict, v: list[mp.mpf], pair: Pair, mean_count: mp.mpf) -> mp.mpf:
    """Loss `name` of one pair at the sums `v` = chosen, rejected, ref_chosen, ref_rejected."""
    beta, ls = mp.mpf(case.get("beta", 0.1)), mp.mpf(case.get("label_smoothing", 0))
    n_c, n_r = max(pair.chosen_count, 1), max(pair.rejected_count, 1)
    r_c, r_r = v[0] - v[2], v[1] - v[3]
    f_c, f_r = divergence(r_c, case), divergence(r_r, case)
    m_c, m_r = v[0] / n_c, v[1] / n_r
    x, u_c, u_r = beta * (f_c - f_r), beta * r_c, beta * r_r
    nll = -m_c if case.get("nll_reduction") == "sequence" else -v[0] / mean_count
    tau = mp.mpf(case.get("discopop_tau", 0.05))
    mean_ipo = case.get("ipo_reduction", "mean") == "mean"
    formulas: dict[str, Callable[[], mp.mpf]] = {
        "sigmoid": lambda: smoothed(x, case),
        "orpo": lambda: -m_c - beta * lsig(m_c - m_r - (mp.log(1 - mp.exp(m_c)) - mp.log(1 - mp.exp(m_r)))),
        "hinge": lambda: max(mp.mpf(0), 1 - x),
        "ipo": lambda: ((f_c / n_c - f_r / n_r if mean_ipo else f_c - f_r) - 1 / (2 * beta)) ** 2,
        "robust": lambda: (-(1 - ls) * lsig(x) + ls * lsig(-x)) / (1 - 2 * ls),
        "exo_pair": lambda: sig(x) * (lsig(x) - mp.log(1 - ls)) + sig(-x) * (lsig(-x) - mp.log(ls)),
        "nca_pair": lambda: -lsig(u_c) - lsig(-u_c) / 2 - lsig(-u_r) / 2,
        "bco_pair": lambda: -lsig(u_c) - lsig(-u_r),
        "sppo_hard": lambda: (r_c - 1 / (2 * beta)) ** 2 + (r_r + 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: 1 - sig(u_c) + sig(u_r),
        "apo_down": lambda: sig(u_c) + 1 - sig(u_c - u_r),
        "discopop": lambda: (1 - sig(x / tau)) * -lsig(x) + sig(x / tau) * mp.exp(-x),
        "sigmoid_norm": lambda: -lsig(beta * (f_c / n_c - f_r / n_r)),
        "simpo": lambda: (
            smoothed(beta * (m_c - m_r) - mp.mpf(case.get("simpo_gamma", 0.5)), case)
            + mp.mpf(case.get("simpo_alpha", 0)) * nll
        ),
        "cpo": lambda: smoothed(beta * (v[0] - v[1]), case) + mp.mpf(case.get("cpo_alpha", 1)) * nll,
        "sft": lambda: nll,
    }
    return formulas[name]()


def names_of(case: dict) -> tuple[str, ...]:
    return case["pref_loss"] if isinstance(case["pref_loss"], tuple) else (case["pref_loss"],)


def loss_of(case: dict, v: list[mp.mpf], pair: Pair, mean_count: mp.mpf) -> mp.mpf:
    names = names_of(case)
    weights = case.get("loss_weights", (1,) * len(names))
    return sum(
        mp.mpf(weight) * single(name, case, v, pair, mean_count) for name, weight in zip(names, weights, strict=True)
    )


@dataclass(frozen=True)
class Expected:
    """Value and policy gradient of one pair's loss, each with its bound on the rounding error in units of eps."""

    loss: float
    loss_scale: float
    grads: tuple[float, float]
    grad_scales: tuple[float, float]


def expected(case: dict, pair: Pair, mean_count: float) -> Expected:
    """Loss and gradient, each with its conditioning 1 + |f| + sum_j |df/dv_j| |v_j|."""
    v = [mp.mpf(value) for value in (pair.chosen, pair.rejected, pair.ref_chosen, pair.ref_rejected)]

    def loss(*moves: tuple[int, mp.mpf]) -> mp.mpf:
        moved = list(v)
        for index, step in moves:
            moved[index] += step
        return loss_of(case, moved, pair, mp.mpf(mean_count))

    def slope(i: int, *moves: tuple[int, mp.mpf]) -> mp.mpf:
        return (loss((i, STEP), *moves) - loss((i, -STEP), *moves)) / (2 * STEP)

    def bend(i: int, j: int) -> mp.mpf:
        return (slope(i, (j, STEP)) - slope(i, (j, -STEP))) / (2 * STEP)

    value, slopes = loss(), [slope(i) for i in range(4)]
    scale = 1 + abs(value) + sum(abs(s * x) for s, x in zip(slopes, v, strict=True))
    grad_scales = [1 + abs(slopes[i]) + sum(abs(bend(i, j) * v[j]) for j in range(4)) for i in range(2)]
    return Expected(float(value), float(scale), (float(slopes[0]), float(slopes[1])), tuple(map(float, grad_scales)))
