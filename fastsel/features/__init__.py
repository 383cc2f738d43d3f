"""A model over a pool -> arrays, one entry a pool row."""
