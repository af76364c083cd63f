"""Every number that a method takes: silly ones are refused by name, and a zero that is taken trains something."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from art_saliency.errors import InputError
from art_saliency.methods import OBJECTIVES
from art_saliency.methods.base import Batch
from art_saliency.methods.fsr import FSRLayer, insert_fsr
from art_saliency.randomness import RandomSource
from tests.method_settings import small_network

NUMBERS = ("int", "int | None", "float", "float | None")
TAKEN = {
    **{name: (kind, {"eps": 0.1}) for name, kind in OBJECTIVES.items()},
    "FSRLayer": (FSRLayer, {"channels": 4, "num_classes": 10}),
}
PARAMETERS = [
    (method, name)
    for method, (kind, _) in TAKEN.items()
    for name, parameter in inspect.signature(kind).parameters.items()
    if str(parameter.annotation) in NUMBERS and name not in ("channels", "num_classes")  # which are the network's
]
NO_ZERO = {"max_iter", "h", "projections", "probability", "hidden", "tau"}
NO_ZERO |= {"saliency_stride", "saliency_sigma", "saliency_radius"}
"""Those of which zero is no number at all. Of an attack's step it is none either, but of Adv-GSCT's alpha it is."""


def made(method: str, **options: object) -> torch.nn.Module:
    kind, needed = TAKEN[method]
    return kind(**{**needed, **options})


def test_the_numbers_are_found():
    assert {"eps", "max_iter", "eps_step", "beta", "lam", "rho", "lambda_j", "rate", "tau"} <= {
        n for _, n in PARAMETERS
    }
    assert {method for method, _ in PARAMETERS} == set(TAKEN)


@pytest.mark.parametrize(
    "value", [-1, -0.5, math.nan, math.inf, -math.inf, 1e300, 10**400, True, "1"], ids=lambda value: repr(value)[:6]
)
@pytest.mark.parametrize(("method", "name"), PARAMETERS)
def test_a_silly_number_is_refused_by_the_name_of_its_parameter(method, name, value):
    if (name, value) == ("eps", 1e300):
        value = 2  # of L2 any finite radius is one; of Linf none beyond the range of pixels
    with pytest.raises(InputError, match=f"^{name}: got .*, expected "):
        made(method, **{name: value})


@pytest.mark.parametrize(("method", "name"), PARAMETERS)
def test_zero_is_refused_or_trains_with_a_finite_loss_and_gradient(method, name):
    if name in NO_ZERO or (name == "eps_step" and method != "adv-gsct"):
        with pytest.raises(InputError, match=f"^{name}: got 0, expected "):
            made(method, **{name: 0})
        return
    torch.manual_seed(0)
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    network = small_network()
    if method == "FSRLayer":
        insert_fsr(network, "features", 10, x, **{name: 0})
        objective = OBJECTIVES["standard"]()
    else:
        objective = made(method, **{name: 0}, **({"max_iter": 1} if (method, "max_iter") in PARAMETERS else {}))
    maps = {"maps": torch.rand(4, 1, 8, 8)} if objective.needs_maps else {}
    terms = objective(network.train(), Batch(x, y, progress=0.5, random=RandomSource(0), **maps))
    terms.loss.backward()
    assert torch.isfinite(terms.loss)
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert any(bool(gradient.any()) for gradient in gradients)
