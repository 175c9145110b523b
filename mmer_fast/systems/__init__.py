"""The sister systems of RobMMR, on the same data layer, trainer and report."""

from mmer_fast.systems.interface import Objective, Preset, SystemModel

__all__ = ["Objective", "Preset", "SystemModel"]
