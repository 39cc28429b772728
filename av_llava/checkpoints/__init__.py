"""Reading and writing checkpoints of the LLaVA family."""
