"""The commands of `python -m bench`, a module per group.

A command that measures writes what it found with `shared.store`; what runs in a process of its own is a plain function,
named in `worker.WORKERS`.
"""
