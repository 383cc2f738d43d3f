"""What other tools can use in place of a part of theirs: one file a tool, imported by its users alone."""
