"""The transformers of RobMMR as graphs of torch.compile."""

from __future__ import annotations

import warnings

from torch import nn

from mmer_fast.models import RobMMR


def compile_stacks(model: RobMMR, backend: str = "inductor") -> None:
    """Have `torch.compile` run every E^x, E^m and D of `model` from now on; parameters and their names stay.

    The numbers of samples and of tokens are variables of the graphs, so that each kind of stack is compiled once for
    training and once for evaluation. Switches off `torch._functorch.config.donated_buffer` in this process: the
    backward pass of E^x may run twice on one graph (`FastStep`), which torch refuses where it may overwrite what the
    graph keeps.

    Args:
        model: of transformers.
        backend: of `torch.compile`.
    """
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    # float32 products stay as exact as without compilation: torch's advice to use TF32 is not wanted.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores for float32")
    stacks: list[nn.Module | None] = [*model.unimodal_encoders.values(), model.multimodal_encoder, model.decoder]
    for stack in stacks:
        if stack is not None:  # a model may do without
            stack.compile(dynamic=True, backend=backend)
