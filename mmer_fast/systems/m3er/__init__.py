"""M3ER: modality check by canonical correlations, proxy feature vectors, multiplicative fusion."""

from mmer_fast.systems.m3er.cca import CanonicalCorrelations, canonical_correlations
from mmer_fast.systems.m3er.check import ModalityCheck, component_correlation
from mmer_fast.systems.m3er.config import M3ERConfig
from mmer_fast.systems.m3er.losses import multiplicative_loss
from mmer_fast.systems.m3er.memory import MemoryFusionNetwork, multiplicative_fusion
from mmer_fast.systems.m3er.model import M3ER, M3EROutput
from mmer_fast.systems.m3er.proxy import ProxyVectors, proxy_vectors

__all__ = [
    "M3ER",
    "CanonicalCorrelations",
    "M3ERConfig",
    "M3EROutput",
    "MemoryFusionNetwork",
    "ModalityCheck",
    "ProxyVectors",
    "canonical_correlations",
    "component_correlation",
    "multiplicative_fusion",
    "multiplicative_loss",
    "proxy_vectors",
]
