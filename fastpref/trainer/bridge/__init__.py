"""Hugging Face models as Megatron models and back: one table of names and layouts for both directions."""
