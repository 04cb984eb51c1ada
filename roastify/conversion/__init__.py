"""From a dense model to one on the pool and back: tracing, planning, first values, rewriting."""
