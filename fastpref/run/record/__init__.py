"""What a run leaves to read: logs and curves."""
