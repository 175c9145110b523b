"""Adversarial weight perturbation for a training loop: a step of the weights up the loss, and back bit for bit.

    with mf.perturbed(model, radius=0.05):   # w + gamma g/|g| in place, g from .grad
        loss(model(x)).backward()            # gradients there
    optimizer.step()                         # from w

RobMMR's APP (Ge et al. 2023, Eq. 12-14), SAM (Foret et al. 2021), ASAM (Kwon et al. 2021) and AWP (Wu et al. 2020) are
choices of its arguments. `mmer_fast.optim.SAM` is the optimizer made of it, `mmer_fast.ops` has the bare operators.
"""

from mmer_fast.perturbation.context import perturb_, perturbed
from mmer_fast.perturbation.handle import Perturbation, PerturbationInfo
from mmer_fast.perturbation.stash import release_stash

__all__ = ["Perturbation", "PerturbationInfo", "perturb_", "perturbed", "release_stash"]
