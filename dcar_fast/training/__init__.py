"""Training losses; they use the plain models."""
