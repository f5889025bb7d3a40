class SparsekernWarning(UserWarning):
    """Something was done otherwise than asked for, and the result is still valid."""
