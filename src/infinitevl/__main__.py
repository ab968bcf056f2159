"""`python -m infinitevl`, which torchrun starts in every process: the same as the `infinitevl` command."""

from infinitevl.cli import main

if __name__ == "__main__":
    main()
