"""Training behind a method: of one block at a time, and of the whole model."""
