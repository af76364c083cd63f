"""Learning the truth about a network: accuracy, the AutoAttack, figures. Nothing here knows a training method."""
