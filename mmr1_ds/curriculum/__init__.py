"""The curriculum: which prompts a step trains on, and what it learns from their responses."""
