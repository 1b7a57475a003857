"""What a run is, without Megatron: its model, settings, plan and records."""
