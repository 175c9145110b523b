"""Operators, one file each: public function, documentation, validation, fake and autograd.

`mmer_fast.ops` itself names the bare operators over lists of tensors that `mmer_fast.perturbed` is made of.
"""

from mmer_fast.ops.perturbation import grad_norm, perturb_, restore_

__all__ = ["grad_norm", "perturb_", "restore_"]
