"""What the figures of `docs/` show, each a function of a trained `tiny.Example`, drawn with the project's own code."""
