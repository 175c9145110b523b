"""`python -m mmer_fast` is `mmer-fast`."""

from mmer_fast.cli import main

if __name__ == "__main__":
    main()
