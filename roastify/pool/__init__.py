"""What a converted model stores: the mapping, the plan, the pool, and how the pool's gradient is summed."""
