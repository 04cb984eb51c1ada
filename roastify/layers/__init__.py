"""How a module reads from the pool: the classes on the pool, and which class replaces which."""
