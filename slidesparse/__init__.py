"""What Z:L weight sparsity buys on this machine, for this model: measured, checked, reported."""

__version__ = "0.1.0"
