"""What a run will do, worked out before the first step."""
