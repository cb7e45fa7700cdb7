"""The report: plots and one self-contained page."""

from lorapar_ray.reporting.page import render, write_report

__all__ = ["render", "write_report"]
