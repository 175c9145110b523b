"""How the cost of the operators grows with length, rows, batch, padding and tensors, on a CPU."""
