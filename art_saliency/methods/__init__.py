"""The training methods: pure functions and an objective each, by name in :data:`OBJECTIVES`."""

from art_saliency.methods.aalp import AALP
from art_saliency.methods.adv_gsct import AdvGSCT
from art_saliency.methods.base import Objective
from art_saliency.methods.baselines import ALP, FGSMRS, MART, PGDAT, TRADES, Standard
from art_saliency.methods.j_sigr import JSIGR

__all__ = ["OBJECTIVES"]

OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls for cls in (Standard, FGSMRS, PGDAT, TRADES, MART, ALP, AdvGSCT, JSIGR, AALP)
}
"""Every objective by its name. FSR is none: it is a layer that any of them trains."""
