"""The commands of `python -m bench`, a module per group.

Importing them must import neither Megatron-Core nor Triton: the head does not need the one, and a dry run on Triton's
interpreter has to set a variable before the other; commands import what they measure when they run.
A command that measures writes what it found with `shared.store`; what runs in a process of its own is a plain function,
named in `worker.WORKERS`.
"""
