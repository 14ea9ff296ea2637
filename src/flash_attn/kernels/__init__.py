"""Device code only: Triton functions, no torch and no host code."""
