"""A training run: its plan, recipes, loop and folder."""
