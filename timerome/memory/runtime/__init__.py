"""A memory at work: following rows through loops, what acts on them, the hooks."""
