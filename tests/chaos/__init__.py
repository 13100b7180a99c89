"""Studies under a fault injector: `make chaos`, or `python -m chaos` with tests/ on the path."""
