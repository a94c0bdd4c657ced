"""`python -m slidesparse` is the command `slidesparse`."""

from slidesparse.cli import main

if __name__ == "__main__":
    main()
