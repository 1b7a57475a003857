"""A small head whose softmax is peaked enough for a screened pass."""

from dataclasses import replace

import torch

from bench import workloads


def peaked_case() -> workloads.Case:
    """R = 96 rows of V = 8192 columns, H = 64, some of them far larger than the others, as those of real models are."""
    case = workloads._finish("dry", *workloads._synthetic(8192, 64, 96, 192, num_pairs=2))
    sizes_H = torch.where(torch.arange(64) % 16 == 3, 4.0, 1.0)
    return workloads.with_reference(
        replace(case, hidden_SLH=case.hidden_SLH * 2.0 * sizes_H, weight_VH=case.weight_VH / sizes_H)
    )
