"""The loop that removes experts of a mixture."""
