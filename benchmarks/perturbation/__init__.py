"""What the measurements of the weight perturbation promise, and their table and plot."""
