"""`python -m conversion SOURCE OUT` and `python -m conversion verify STORE SOURCE`."""

from .commands import main

if __name__ == "__main__":
    main()
