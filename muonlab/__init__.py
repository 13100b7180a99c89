"""muonlab: a research harness for the Muon family of optimizers."""

__version__ = "0.1.0"
