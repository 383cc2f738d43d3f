"""What all operations share; it knows none of them."""
