"""What is asked of a fitted model: each module answers one question, and none knows the others' callers."""
