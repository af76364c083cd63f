"""Slow oracles, written from the equations, loop by loop, independently of the package."""
