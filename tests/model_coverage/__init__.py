"""Coverage of model types: tiny random models of all of them go through every step (run.py)."""
