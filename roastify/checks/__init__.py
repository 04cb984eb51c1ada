"""Whether a converted model can stand in for the original, and how fast each of them is."""
