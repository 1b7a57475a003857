"""The reference model's log-probs: from a model, adapters or a cache."""
