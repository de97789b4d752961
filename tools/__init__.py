"""What is made from a run, and from many: python -m tools.chat RUN."""
