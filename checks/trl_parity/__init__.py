"""TRL's trainer against this one, on a real model and real pairs."""
