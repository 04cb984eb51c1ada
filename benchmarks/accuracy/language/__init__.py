"""A decoder that learns to predict reviews' text: dense, rivals and roastify, with as many stored parameters."""
