"""Exit codes that are no errors; those of errors are in `failures`."""

PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h, try again: stopped by a signal, with a checkpoint."""
INTERRUPTED = 130
"""128 + SIGINT, as shells count: ended at once by Ctrl-C."""
