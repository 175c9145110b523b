"""Entry point of the `mmer-fast` command: finds missing packages, runs the command, turns errors into one
line.
"""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Sequence

# What is imported, and what pip calls it.
TRAIN_PACKAGES = {
    "typer": "typer",
    "rich": "rich",
    "yaml": "pyyaml",
    "safetensors": "safetensors",
    "torchmetrics": "torchmetrics",
    "matplotlib": "matplotlib",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `mmer-fast`; ends the process.

    Args:
        arguments: the command line without the program's name; None takes that of the process.

    Raises:
        SystemExit: 0 on success, 1 when training fails or memory runs out, 2 on bad input, 130 when interrupted,
            143 when terminated by SIGTERM while training.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does, for what a terminal's encoding lacks
    missing = [package for name, package in TRAIN_PACKAGES.items() if importlib.util.find_spec(name) is None]
    if missing:
        _fail(f"this command needs {', '.join(missing)}: pip install 'mmer_fast[train]'", 2)

    import mmer_fast.ablation.commands
    import mmer_fast.bench.commands
    import mmer_fast.report.commands  # noqa: F401  adds report and explain
    from mmer_fast._files import WriteError
    from mmer_fast.bench.harness import NoBackendError, WrongResultError
    from mmer_fast.bench.shapes import ShapeError
    from mmer_fast.data import DataError
    from mmer_fast.training.checkpoint import CheckpointError
    from mmer_fast.training.commands import app
    from mmer_fast.training.distributed import ProcessFailed, WorldError
    from mmer_fast.training.errors import TrainingError
    from mmer_fast.training.memory import shortage
    from mmer_fast.training.run import RunError

    try:
        app(args=None if arguments is None else list(arguments), prog_name="mmer-fast")
    except (DataError, RunError, CheckpointError, WorldError, ShapeError, NoBackendError) as error:
        _fail(str(error), 2)
    except (TrainingError, WriteError, WrongResultError, FloatingPointError) as error:
        _fail(str(error), 1)
    except ProcessFailed as error:
        if error.reported:
            raise SystemExit(1) from None
        _fail(str(error), 1)
    except (MemoryError, RuntimeError) as error:
        cause = shortage(error)
        if cause is None:
            raise
        _fail(f"memory ran out: {cause}", 1)


def _fail(message: str, code: int) -> None:
    print(f"mmer-fast: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
