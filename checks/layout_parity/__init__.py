"""Every parallel layout against one process, over three steps."""
