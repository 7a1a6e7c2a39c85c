"""The package's version, which packed files record. setup reads this line without importing anything."""

__version__ = "0.1.0"
