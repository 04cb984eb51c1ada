"""What a converted model stores: the mapping, the plan, the pool, and the sum of the pool's gradient."""
