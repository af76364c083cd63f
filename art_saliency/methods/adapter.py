"""The control of FSR: an adapter of as many parameters, without masks and losses of its own."""

from __future__ import annotations

from torch import Tensor, nn

from art_saliency import _checks
from art_saliency.methods.surgery import FeatureLayer, TokenGrid, bottleneck, insert_after

__all__ = ["AdapterLayer", "insert_adapter"]


class AdapterLayer(FeatureLayer):
    """
    The control f + R(f), of as many parameters as S and R together (to 0.5 %): neither masks nor losses.

    "Without the adapter control, a gain is not FSR's."

    :param channels: C.
    :param fsr_hidden: The width of the FSR layer that it stands against.
    :param tokens: As for :class:`FSRLayer`.
    """

    def __init__(self, channels: int, *, fsr_hidden: int = 64, tokens: TokenGrid | None = None) -> None:
        super().__init__(tokens)
        # 18 C h + 9 h^2 + 4 h = 2 (18 C h_fsr + 9 h_fsr^2 + 4 h_fsr), solved for h.
        half = (18 * _checks.whole("channels", channels, least=1) + 4) / 18
        budget = 2 * (half * 18 * fsr_hidden + 9 * fsr_hidden**2) / 9
        self.recalibration = bottleneck(channels, round((half**2 + budget) ** 0.5 - half))

    def transform(self, f: Tensor) -> Tensor:
        """:return: f + R(f), (N, C, H, W) as `f`."""
        output: Tensor = f + self.recalibration(f)
        return output


def insert_adapter(model: nn.Module, target: str, example: Tensor, *, fsr_hidden: int = 64) -> nn.Module:
    """Put an :class:`AdapterLayer` behind a submodule, in place, as :func:`insert_fsr` does. :return: The same network."""
    insert_after(
        model,
        target,
        example,
        "adapter",
        lambda found: AdapterLayer(found.channels, fsr_hidden=fsr_hidden, tokens=found.tokens),
    )
    return model
