"""The benchmark of a training step of RobMMR: the fast step against Algorithm 1 as a textbook has it."""
