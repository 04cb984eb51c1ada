"""What a converted model stores: the mapping, the plan, the pool and how its gradient comes together."""
