"""`python -m robbench` is `robbench`."""

from robbench.cli import main

if __name__ == "__main__":
    main()
