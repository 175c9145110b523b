"""The in-place weight perturbation against how SAM's packages and plain PyTorch do the same."""
