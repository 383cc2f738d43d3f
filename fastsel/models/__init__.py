"""Language models: where they come from, and how many sequences go through one at once."""
