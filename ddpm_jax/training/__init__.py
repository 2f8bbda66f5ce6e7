"""Algorithm 1: one update, the loop around it, what it logs, and what a run costs."""
