"""The figures of `docs/`. Each is a function of a trained `tiny.Example` and is drawn with the project's own code."""
