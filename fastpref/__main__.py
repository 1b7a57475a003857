"""`python -m fastpref`, the form that `torchrun -m` starts."""

from fastpref.cli import main

if __name__ == "__main__":
    main()
