"""`python -m tokenloom`, as torchrun starts it."""

from tokenloom.cli import main

if __name__ == "__main__":
    main()
