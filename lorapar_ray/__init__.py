"""LoRA-PAR on Ray: one adapter, two Systems of thought, any number of machines (method: arXiv 2507.20999)."""

__version__ = "0.1.0"
