"""The model on Megatron-Core: layers, head, weights and adapters."""
