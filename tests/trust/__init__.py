"""Trust: programs that try to lose, mix or damage what roastify writes, and count how often they succeed."""
