"""Grids of runs that differ in a few settings: shared parts are computed once, and claims are tested."""
