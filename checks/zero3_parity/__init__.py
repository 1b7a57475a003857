"""TRL's trainers against this library's under DeepSpeed ZeRO-3."""
