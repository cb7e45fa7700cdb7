"""Grids of runs that differ in a few settings. Shared stages are computed once, and claims are tested."""
