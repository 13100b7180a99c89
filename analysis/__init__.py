"""Statistics, verdicts, tables and figures, computed from run records alone."""
