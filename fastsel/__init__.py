"""fastsel picks the examples worth training on."""

__version__ = "0.1.0"
