"""Size, memory and speed of a packed model beside the dense one."""
