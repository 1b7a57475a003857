"""`python -m bench h100`: everything worth knowing from a GPU that is there for half an hour, in one command.

`fifteen` is the short form, `python -m bench gpu`, of the same folder, heads and checks; `carried` what is made for it
where there is no GPU.

Design decisions:
- Three parts, each a process with a deadline of its own: is it right (`sanity`), how fast is the head beside its peers
  (`heads`), how fast are steps of the trainer (`steps`). `--part` takes one.
- Everything is a row with a name in a JSON file under one folder, written as soon as it is known. A row that is there
  is not measured again; delete it to measure anew.
- The most valuable rows come first. What no longer fits before the deadline is left out, and listed.
- Nothing that one row does stops the others: exceptions become rows, and when the process dies or hangs the next one
  goes on behind the row that killed it (`supervisor`).
- `--dry` runs the same code on a CPU with tiny shapes and Triton's interpreter.
"""
