"""A tiny random model of every family that pruning must work on or refuse, with what is to be found in it."""

from .decoders import DECODERS
from .encoder_decoders import ENCODER_DECODERS
from .encoders import ENCODERS
from .family import Family, together
from .hybrids import HYBRIDS
from .mixtures import MIXTURES
from .vision_language import VISION_LANGUAGE

ZOO: dict[str, Family] = {**DECODERS, **MIXTURES, **HYBRIDS, **ENCODER_DECODERS, **VISION_LANGUAGE, **ENCODERS}

__all__ = ["ZOO", "Family", "together"]
