"""Reference models built on the operators of mmer_fast."""

from mmer_fast.models.config import RobMMRConfig
from mmer_fast.models.robmmr import Encodings, RobMMR, RobMMROutput

__all__ = ["Encodings", "RobMMR", "RobMMRConfig", "RobMMROutput"]
