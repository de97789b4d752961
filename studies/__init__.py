"""How good the instruments are, and what many runs say: python -m studies.paper."""
