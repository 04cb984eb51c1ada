"""Bringing a converted pretrained model back to what the dense model did."""
