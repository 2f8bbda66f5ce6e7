"""Training (Algorithm 1): one update, the loop around it, its logs, and the cost of a run."""
