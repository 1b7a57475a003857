"""`python -m bench gpu`: what matters most, on a GPU that is there for two commands of five minutes.

- `plan` lists the steps, the most telling first, each with the seconds that are kept for it;
- `command` runs one command's steps in a process that is watched, and goes on behind one that dies or hangs;
- every row and a text summary are written at once and replaced as a whole, so that what is lost is one step;
- `rehearsal` runs the same plan without a GPU against a recorded clock, and says what no longer fits.
"""
