"""One comparison, tests of runs, answers to claims, measures, tables and figures, from run records alone."""
