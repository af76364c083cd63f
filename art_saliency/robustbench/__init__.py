"""RobustBench: from a trained classifier to a submission that its maintainers can load, and from its zoo to a classifier."""
