"""Benchmarks of fastpref beside its peers; `python -m bench --help` is the way in.

    python -m bench head --workload gemma3-270m    one row per implementation, stored as it is done
    python -m bench score --workload gemma3-270m   the same without a gradient, as a reference model is scored
    python -m bench table                          the Markdown tables, from the stored rows
    python -m bench plot                           the figures, from the stored rows
    python -m bench gpu                            what matters most on a GPU, in fifteen minutes; --rehearse
    python -m bench gpu-cache, gpu-carry           a Triton cache filled without a GPU; what travels to one, in MiB
    python -m bench h100                           everything on a GPU that is there for half an hour (`bench.gpu`)
    pytest bench/suite                             the same registry under pytest-benchmark

Design decisions:
- No speed without correctness: an implementation is timed only after its log-probs and gradients passed the gate.
- One implementation, one row, one file of rows per workload. A row that is there is not measured again, so an
  interrupted run goes on where it stopped; delete the file to measure anew.
- Times are compared within a process, in turns, with the bare product X W^T measured in the same turns. Peak memory is
  measured in a process of its own.
- `workloads` makes inputs, `implementations` (with `peers`, on `registry`) is the registry of what is measured,
  `oracle` says what is right, `measure` measures, `report` and `plots` read rows, `commands` is the command line.
"""
