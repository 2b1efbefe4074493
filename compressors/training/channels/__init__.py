"""The parts of channel pruning: networks, their units, scores, budgets and targets."""
