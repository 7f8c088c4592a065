"""Search to a goal: the smallest or fastest variant that loses no more than a study allows."""
