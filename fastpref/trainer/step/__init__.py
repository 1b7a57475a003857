"""One optimizer step: batch, schedule, update and guard."""
