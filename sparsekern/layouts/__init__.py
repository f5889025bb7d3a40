"""How packed weights lie in memory: the Python mirror of csrc/common, from which references pack and unpack."""
