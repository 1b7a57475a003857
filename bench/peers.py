"""The peers of the registry: what each needs, and how a pass is known to be the one that is meant.

How each is called, and where that is documented, is in `peer_calls`.
"""

from __future__ import annotations

from functools import partial

from bench import peer_calls as calls
from bench.registry import Implementation

_LIGER_INSTALL = "pip install --no-deps liger-kernel triton"
_CUTE_INSTALL = 'pip install "liger-kernel[cutedsl]"'
_CCE_INSTALL = "pip install --no-deps cut-cross-entropy triton"
_MEGATRON_INSTALL = 'pip install "fastpref[megatron]"'

PEERS = {
    "liger": Implementation(
        title="Liger fused linear DPO",
        run=calls.liger_dpo,
        modules=("liger_kernel",),
        install=_LIGER_INSTALL,
        is_compiled=True,
        time_target=13,
        memory_target=3,
    ),
    "cce": Implementation(
        title="Apple CCE, torch_compile",
        logps=calls.cce,
        devices=("cpu",),
        modules=("cut_cross_entropy",),
        install=_CCE_INSTALL,
        path=("CompiledFunctionBackward",),
        is_compiled=True,
        time_target=2.4,
        memory_target=2,
    ),
    "torch-lce": Implementation(
        title="torch linear_cross_entropy, chunks, response rows",
        logps=calls.torch_lce,
        modules=("torch.nn.modules.linear_cross_entropy_options",),
        install='pip install "torch>=2.13"',
        path=("GeneratedBackwardFor_torch_nn__linear_cross_entropy_batch_chunked_no_reduction_defaultBackward",),
    ),
    "trl": Implementation(
        title="TRL chunked log-probs, response rows",
        logps=calls.trl,
        modules=("trl",),
        install='pip install "fastpref[trl]"',
        path=("trl.kernels.chunked_logprob.ChunkedLogProbFunction",),
        time_target=8,
        memory_target=1.6,
    ),
    "cce-kernel": Implementation(
        title="Apple CCE",
        logps=calls.cce,
        devices=("cuda",),
        modules=("cut_cross_entropy",),
        install=_CCE_INSTALL,
        path=("cut_cross_entropy.cce.LinearCrossEntropyFunction",),
        is_compiled=True,
    ),
    "liger-ce": Implementation(
        title="Liger fused linear cross entropy, Triton",
        mean_nll=calls.liger_ce,
        loss="mean-nll",
        devices=("cuda",),
        modules=("liger_kernel",),
        install=_LIGER_INSTALL,
        path=("liger_kernel.ops.fused_linear_cross_entropy.LigerFusedLinearCrossEntropyFunction",),
        is_compiled=True,
    ),
    "liger-ce-sm90": Implementation(
        title="Liger fused linear cross entropy, CuTe",
        mean_nll=calls.liger_ce_sm90,
        loss="mean-nll",
        devices=("cuda",),
        modules=("liger_kernel", "cutlass"),
        install=_CUTE_INSTALL,
        capabilities=(9,),
        path=("liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90.LigerFusedLinearCrossEntropySM90Function",),
        is_compiled=True,
    ),
    "liger-ce-scaled": Implementation(
        title="Liger fused linear scaled cross entropy, CuTe",
        logps=calls.liger_ce_scaled,
        devices=("cuda",),
        modules=("liger_kernel", "cutlass"),
        install=_CUTE_INSTALL,
        capabilities=(9,),
        path=("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90.LigerFusedScaledCrossEntropySM90Function",),
        is_compiled=True,
    ),
    "liger-ce-tp": Implementation(
        title="Liger fused linear scaled cross entropy, tensor-parallel",
        logps=calls.liger_ce_tp,
        devices=("cuda",),
        modules=("liger_kernel", "liger_cute_kernels", "megatron.core"),
        install="liger-cute-kernels for this CUDA and torch, from Liger's repository; " + _MEGATRON_INSTALL,
        capabilities=(9, 10),
        path=(
            "liger_kernel.ops.cute.fused_linear_scaled_cross_entropy_tp"
            ".LigerFusedLinearScaledCrossEntropyNativeTPFunction",
        ),
        is_compiled=True,
    ),
    "liger-orpo": Implementation(
        title="Liger fused linear ORPO",
        run=calls.liger_orpo,
        loss="orpo",
        devices=("cuda",),
        modules=("liger_kernel",),
        install=_LIGER_INSTALL,
        is_compiled=True,
    ),
    "quack": Implementation(
        title="quack chunked linear cross entropy",
        mean_nll=calls.quack_ce,
        loss="mean-nll",
        devices=("cuda",),
        modules=("quack", "cutlass"),
        install="pip install quack-kernels",
        path=(
            "quack.linear_cross_entropy.ScaledExpLinearCrossEntropyFunction",
            "quack.linear_cross_entropy.ChunkedLinearCrossEntropyFunction",
        ),
        is_compiled=True,
    ),
    "verl": Implementation(
        title="verl linear cross entropy",
        logps=calls.verl,
        devices=("cuda",),
        modules=("verl.utils.kernel",),
        install="pip install --no-deps verl, and what its import asks for",
        path=("verl.utils.kernel.linear_cross_entropy.LinearCrossEntropy",),
        is_compiled=True,
    ),
    "megatron": Implementation(
        title="Megatron vocab-parallel cross entropy, all positions",
        logps=partial(calls.megatron, False),
        devices=("cuda",),
        modules=("megatron.core",),
        install=_MEGATRON_INSTALL,
        path=("megatron.core.tensor_parallel.cross_entropy._VocabParallelCrossEntropy",),
    ),
    "megatron-fused": Implementation(
        title="Megatron fused vocab-parallel cross entropy, all positions",
        logps=partial(calls.megatron, True),
        devices=("cuda",),
        modules=("megatron.core",),
        install=_MEGATRON_INSTALL,
        path=("megatron.core.fusions.fused_cross_entropy._VocabParallelCrossEntropy",),
        is_compiled=True,
    ),
    "megatron-linear": Implementation(
        title="Megatron linear cross entropy",
        logps=calls.megatron_linear,
        devices=("cuda",),
        modules=("megatron.core.fusions.fused_linear_cross_entropy", "cutlass"),
        install="Megatron-LM's main branch, and pip install nvidia-cutlass-dsl",
        capabilities=(10,),
        path=("megatron.core.fusions.fused_linear_cross_entropy.LinearCrossEntropy",),
        is_compiled=True,
    ),
}
