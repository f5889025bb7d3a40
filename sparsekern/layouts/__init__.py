"""Memory layouts of packed weights: the Python mirror of csrc/common, used by the references that pack and unpack."""
