"""The pages of `docs/`, and the code that draws their figures."""
