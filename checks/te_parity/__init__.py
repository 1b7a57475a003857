"""Every parallel layout on Transformer Engine's layers against one process on Megatron's own, over three steps."""
