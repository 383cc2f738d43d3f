"""`python -m fastsel` is `fastsel`; also what `accelerate launch -m fastsel` and `torchrun -m fastsel` start."""

from fastsel.cli import entry_point

if __name__ == "__main__":
    entry_point()
