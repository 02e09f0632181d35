"""tuppence trains GPTs to a budget."""

__version__ = "0.1.0"
