"""What is claimed, and beside what it stands: the arms of each page's table and figure, and the differences that decide a claim."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarking.grids import ADV_GSCT_FORMS, ADV_GSCT_TRIED, J_SIGR_FORMS, J_SIGR_TRIED, METHODS

__all__ = ["CLAIMS", "HEADLINE", "TARGETS", "Claim", "Target"]

HEADLINE = METHODS
"""The rows of the README's tables."""


@dataclass(frozen=True)
class Target:
    """
    What a method must reach beside another arm.

    :ivar arm: The method. :ivar versus: What it is held against. :ivar least: The difference it must show, in points.
    :ivar key: Of which accuracy: that under AutoAttack, or under transferred attacks.
    """

    arm: str
    versus: str
    least: float
    key: str = "autoattack"


_WEAKER = ":lambda_sep=0.1:lambda_rec=0.1"
TARGETS = (
    Target("adv-gsct", "pgd-at", -1.0),
    Target("adv-gsct", "fgsm-rs", 0.0),
    Target("j-sigr@silu", "pgd-at", -10.0),
    Target("j-sigr@silu", "pgd-at", 0.0, "transfer"),
    Target("aalp", "pgd-at", 0.5),
    Target("aalp", "alp", 1.0),
    Target("fsr+pgd-at", "pgd-at", 1.0),
    Target("fsr+pgd-at", "adapter+pgd-at", 0.5),
    Target(f"fsr+pgd-at{_WEAKER}", "pgd-at", 4.0),
    Target(f"fsr+pgd-at{_WEAKER}", "adapter+pgd-at", 0.5),
    Target(f"fsr+adv-gsct{_WEAKER}", "pgd-at", 4.0),
    Target(f"fsr+adv-gsct{_WEAKER}", "adapter+adv-gsct", 0.5),
)
"""What each method is for, and what it must exceed. They were set for a ResNet-18 on all of CIFAR-10."""


@dataclass(frozen=True)
class Claim:
    """
    One page's question.

    :ivar title: Of the figure. :ivar arms: Rows and bars, in order.
    :ivar differences: (arm, versus): robust accuracies subtracted seed by seed; an arm's gain stands against each control alone.
    """

    title: str
    arms: tuple[str, ...]
    differences: tuple[tuple[str, str], ...]


CLAIMS = {
    "adv-gsct": Claim(
        "Adv-GSCT beside single-step and multi-step training, and without each of its terms",
        (
            "fgsm-rs",
            "pgd-at",
            "adv-gsct",
            *dict.fromkeys((*ADV_GSCT_FORMS, *ADV_GSCT_TRIED)),
            "adv-gsct:form=finite-difference:consensus=0.1",
        ),
        (
            ("adv-gsct", "fgsm-rs"),
            ("adv-gsct", "pgd-at"),
            ("adv-gsct", "adv-gsct:consensus=0"),
            ("adv-gsct", "adv-gsct:prediction_consensus=0"),
            ("adv-gsct", "adv-gsct:consensus=0:prediction_consensus=0"),
            ("adv-gsct", "adv-gsct:rho=0"),
            ("adv-gsct", "adv-gsct:offending=random-start"),
            ("adv-gsct", "adv-gsct:offending=random-start:prediction_consensus=3:rho=0.3"),
            ("adv-gsct:form=finite-difference:consensus=0.1", "adv-gsct"),
        ),
    ),
    "j-sigr": Claim(
        "J-SIGR, a smooth activation, its selective term, and where and how the Jacobian enters",
        (
            "standard",
            "fgsm-rs",
            "pgd-at",
            "pgd-at@silu",
            "j-sigr",
            "j-sigr@silu",
            *dict.fromkeys((*J_SIGR_FORMS, *J_SIGR_TRIED)),
        ),
        (
            ("j-sigr@silu", "j-sigr:selective_on=loss@silu"),
            ("j-sigr@silu", "pgd-at"),
            ("j-sigr@silu", "pgd-at@silu"),
            ("j-sigr@silu", "j-sigr"),
            ("j-sigr@silu", "fgsm-rs"),
            ("j-sigr@silu", "j-sigr:lambda_s=0@silu"),
            ("j-sigr:lambda_j=2@silu", "pgd-at"),
            ("j-sigr@silu", "j-sigr:linearise_at=random-point@silu"),
            ("j-sigr@silu", "j-sigr:linearise_at=image@silu"),
            ("j-sigr@silu", "j-sigr:jacobian=added:linearise_at=image@silu"),
        ),
    ),
    "aalp": Claim(
        "AALP beside ALP, with each module alone, and with a random mask",
        ("pgd-at", "alp", "alp:clean_weight=0", "aalp", "aalp:rate=0", "aalp:weighting=constant", "aalp:guide=random"),
        (
            ("aalp", "alp"),
            ("aalp", "pgd-at"),
            ("aalp", "alp:clean_weight=0"),
            ("aalp", "aalp:rate=0"),
            ("aalp", "aalp:weighting=constant"),
            ("aalp", "aalp:guide=random"),
        ),
    ),
    "fsr": Claim(
        "FSR beside its base and its controls",
        (
            "pgd-at",
            "adapter+pgd-at",
            "fsr+pgd-at",
            "fsr+pgd-at:lambda_sep=0.1:lambda_rec=0.1",
            "fsr+pgd-at:aux_warmup_share=0.5",
            "fsr+pgd-at:aux_warmup_share=1",
            "fsr+pgd-at:lambda_sep=0:lambda_rec=0",
            "fsr+pgd-at without noise",
            "trades",
            "fsr+trades",
        ),
        (
            ("fsr+pgd-at", "pgd-at"),
            ("fsr+pgd-at", "adapter+pgd-at"),
            ("fsr+pgd-at", "fsr+pgd-at:lambda_sep=0:lambda_rec=0"),
            ("fsr+pgd-at", "fsr+pgd-at without noise"),
            ("fsr+pgd-at:lambda_sep=0.1:lambda_rec=0.1", "pgd-at"),
            ("fsr+pgd-at:lambda_sep=0.1:lambda_rec=0.1", "adapter+pgd-at"),
            ("fsr+pgd-at:aux_warmup_share=0.5", "fsr+pgd-at"),
            ("fsr+pgd-at:aux_warmup_share=1", "fsr+pgd-at"),
            ("fsr+pgd-at:aux_warmup_share=1", "pgd-at"),
            ("fsr+pgd-at:aux_warmup_share=1", "adapter+pgd-at"),
            ("fsr+trades", "trades"),
        ),
    ),
    "combinations": Claim(
        "Combinations, with weight averaging (EMA) and adversarial weight perturbation (AWP)",
        (
            "pgd-at",
            "pgd-at:ema=0.99:awp=0.005",
            "trades:ema=0.99:awp=0.005",
            "aalp:ema=0.99:awp=0.005",
            "fsr+pgd-at:ema=0.99:awp=0.005",
            "fsr+adv-gsct",
            "fsr+adv-gsct:lambda_sep=0.1:lambda_rec=0.1",
            "adapter+adv-gsct",
            "fsr+aalp",
        ),
        (
            ("fsr+pgd-at:ema=0.99:awp=0.005", "pgd-at"),
            ("aalp:ema=0.99:awp=0.005", "pgd-at"),
            ("pgd-at:ema=0.99:awp=0.005", "pgd-at"),
            ("fsr+adv-gsct", "adv-gsct"),
            ("fsr+adv-gsct:lambda_sep=0.1:lambda_rec=0.1", "adv-gsct"),
            ("fsr+adv-gsct:lambda_sep=0.1:lambda_rec=0.1", "pgd-at"),
            ("fsr+adv-gsct:lambda_sep=0.1:lambda_rec=0.1", "adapter+adv-gsct"),
            ("fsr+aalp", "aalp"),
        ),
    ),
}
"""By page: the four cards, and the combinations."""
