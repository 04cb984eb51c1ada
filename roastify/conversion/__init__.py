"""From a dense model to a model on the pool and back: tracing, planning, initial values, rewriting."""
