"""Accuracy against stored parameters: roastify beside what else could be done with as many of them."""
