"""Episodes and their targets in, one update of the policy out: packing, losses, train state, train step."""
