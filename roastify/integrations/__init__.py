"""What roastify adds to other libraries when they are imported."""
