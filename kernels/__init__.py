"""Operations: one folder = one operation, one file = one way to compute it.

Open the operation's folder and read api.py: the contract, and the table of implementations in the order in which
"auto" asks them. reference.py says what is computed in the fewest lines. Each of the other files holds one
implementation with exactly two functions: unsupported(*inputs) returns why it cannot take these inputs, or None, and
compute(*inputs) computes. cases.py names the shapes that tests and benchmarks share.

Operations import _runtime and their own folder, never each other.
"""
