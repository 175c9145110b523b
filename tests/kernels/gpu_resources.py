"""Registers and spills of every GPU kernel, read from cubins that are compiled here: no GPU is needed.

Run as a script to print them as JSON: ``python gpu_resources.py triton|cuda sm_90 ...``. The Triton half must run in a
process of its own, without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

# What the launchers compile: the shapes of short, long and chunked rows.
TRITON_CASES = (
    ("forward", 500, "bf16"),
    ("forward", 4096, "bf16"),
    ("forward", 500, "fp64"),
    ("forward", 10**6, "bf16"),
    ("sinkhorn", 500, "bf16"),
    ("backward", 500, "bf16"),
    ("backward", 10**6, "bf16"),
)

# Attention: pass, type, width of a head, whether with weights (and their gradient) and dropout, longest sequence.
ATTENTION_CASES = (
    *((way, dtype, width, True, False, 500) for way in ("forward", "queries", "keys", "bias")
      for dtype in ("bf16", "fp32") for width in (64, 128)),
    *(("keys", "bf16", 64, True, dropout, 150) for dropout in (False, True)),
    *((way, "bf16", 64, False, False, 500) for way in ("forward", "queries", "keys")),
    *((way, "bf16", 64, True, True, 500) for way in ("forward", "queries", "keys")),
)  # fmt: skip

# The weight perturbation: kernel, types of weight and gradient, scope (0: global, 2: awp), whether adaptive.
PERTURBATION_CASES = (
    *((kernel, weight, grad, 0, adaptive) for kernel in ("norm", "step") for adaptive in (False, True)
      for weight, grad in (("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "bf16"), ("fp64", "fp64"))),
    *((kernel, "fp32", "fp32", 2, False) for kernel in ("norm", "step", "combine")),
    *(("restore", dtype, dtype, 0, False) for dtype in ("fp16", "fp32", "fp64")),
)  # fmt: skip
SHARED_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}  # KiB of a block

Usage = dict[str, int]  # registers, spill: bytes of stack frame and local memory; Triton's attention: shared memory too


def compile_cuda(architecture: str) -> dict[str, Usage]:
    """Compiles kernels/cuda/*.cu for one architecture; ``{kernel: usage}`` as ptxas reports it."""
    target = architecture.removeprefix("sm_")

    def compile_file(source: Path) -> str:
        command = ["nvcc", "-O3", "-std=c++17", "-cubin", "-Xptxas", "-v", "-o", os.devnull]
        command += [f"-gencode=arch=compute_{target},code={architecture}", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        return done.stderr

    with ThreadPoolExecutor(max_workers=2) as pool:
        logs = pool.map(compile_file, sorted((ROOT / "kernels" / "cuda").glob("*.cu")))
        return {kernel: used for log in logs for kernel, used in _parse_ptxas(log).items()}


def _parse_ptxas(log: str) -> dict[str, Usage]:
    usage: dict[str, Usage] = {}
    entry = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers",
        re.S,
    )
    for name, stack, spilled, registers in entry.findall(log):
        usage[readable(name)] = {"registers": int(registers), "spill": int(stack) + int(spilled)}
    return usage


def read_library(library: str) -> dict[str, dict[str, Usage]]:
    """``{architecture: {kernel: usage}}`` of every cubin embedded in a built library."""
    report = subprocess.run([_cuobjdump(), "-res-usage", library], capture_output=True, text=True, check=True).stdout
    usage: dict[str, dict[str, Usage]] = {}
    for part in report.split("Fatbin elf code:")[1:]:
        architecture = re.search(r"arch = (sm_\w+)", part).group(1)
        kernels = usage.setdefault(architecture, {})
        for name, figures in re.findall(r"Function (\w+):\s+(REG:[^\n]+)", part):
            registers, stack, local = (int(re.search(rf"{key}:(\d+)", figures).group(1)) for key in _FIGURES)
            kernels[readable(name)] = {"registers": registers, "spill": stack + local}
    return usage


def readable(mangled: str) -> str:
    """``_ZN4mmer...23soft_topk_forward_shortIfLi8ELi16EEEv...`` -> ``soft_topk_forward_short<float, 8, 16>``."""
    kernel = r"\d+((?:soft_topk|attention|perturbation)_[a-z_]+)I"
    match = re.search(kernel + r"(f|d|NS_4HalfE|NS_8BFloat16E)?((?:Li\d+E)*)E", mangled)
    if match is None:
        raise ValueError(f"expected a kernel of kernels/cuda, got {mangled}")
    name, storage, numbers = match.groups()
    types = {"f": "float", "d": "double", "NS_4HalfE": "Half", "NS_8BFloat16E": "BFloat16"}
    arguments = [*([types[storage]] if storage else []), *re.findall(r"Li(\d+)E", numbers)]
    return f"{name}<{', '.join(arguments)}>"


def compile_triton(architecture: str) -> dict[str, Usage]:
    """Compiles the shapes that the launchers use for one architecture; ``{kernel: usage}`` as cuobjdump reports it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    forward = _kernels("soft_topk_forward")
    backward = _kernels("soft_topk_backward")
    launch_shape = _kernels("soft_topk_rows").launch_shape
    launch_options = _kernels("launch_options").launch_options
    usage: dict[str, Usage] = {}
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    for direction, cols, dtype in TRITON_CASES:
        shape = launch_shape(cols)
        module = backward if direction == "backward" else forward
        way = "backward" if direction == "backward" else "forward"
        kernel = getattr(module, f"soft_topk_{way}_{'chunked' if shape.chunked else 'block'}")
        constants = {"SIGN": 1, "COMPUTE": _triton_dtype("fp64" if dtype == "fp64" else "fp32"), "BLOCK": shape.block}
        if not shape.chunked:
            constants["ROWS"] = shape.rows
        if way == "forward":
            constants["SINKHORN"] = direction == "sinkhorn"
        signature = {name: _argument_type(name, dtype) for name in kernel.arg_names}
        signature.update(dict.fromkeys(constants, "constexpr"))
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=target, options=launch_options(shape.warps))
        usage[f"{direction} {dtype} {cols}"] = _cubin_usage(compiled.asm["cubin"])
    return {**usage, **compile_triton_attention(architecture), **compile_triton_perturbation(architecture)}


@contextmanager
def _compile_only(architecture: str) -> Iterator[dict[str, Any]]:
    """Triton launches inside compile for `architecture` instead, those of the kernel ``found["wanted"]`` alone.

    Yields:
        found: ``found[name]`` is the compiled kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        """In the place of a GPU: it says what to compile for. Triton keeps the kernels of a device by its number."""

        def get_current_device(self) -> int:
            return int(architecture.removeprefix("sm_"))

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)

    found: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if kernel.__name__ == found["wanted"]:
            found[kernel.__name__] = run(kernel, *args, grid=grid, warmup=True, **options)

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run


def compile_triton_perturbation(architecture: str) -> dict[str, Usage]:
    """What the launchers of the weight perturbation launch, compiled for one architecture instead."""
    import torch

    perturbation = _kernels("perturbation")
    types = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    usage: dict[str, Usage] = {}
    with _compile_only(architecture) as found:
        for kernel, weight, grad, scope, adaptive in PERTURBATION_CASES:
            w, g = [torch.zeros(5000, dtype=types[weight])], [torch.zeros(5000, dtype=types[grad])]
            found["wanted"] = f"perturbation_{kernel}"
            if kernel == "combine":
                perturbation.grad_norm(g, w, scope, adaptive)
            elif kernel == "restore":
                perturbation.restore_(w, [w[0].clone()])
            else:
                perturbation.perturb_(w, g, [w[0].clone()], None, None, 0.5, scope, adaptive)
            options = f"{' awp' if scope == perturbation.AWP else ''}{' adaptive' if adaptive else ''}"
            name = f"perturbation {kernel} {weight} {grad}{options}"
            usage[name] = _cubin_usage(found.pop(found["wanted"]).asm["cubin"])
    return usage


def compile_triton_attention(architecture: str) -> dict[str, Usage]:
    """What the attention launchers launch, compiled for one architecture instead."""
    import torch

    attention = _kernels("attention")
    usage: dict[str, Usage] = {}
    with _compile_only(architecture) as found:
        for way, dtype, width, with_weights, with_dropout, length in ATTENTION_CASES:
            q = torch.zeros(1, 2, length, width, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
            lse, m = torch.zeros(1, 2, length), torch.ones(1, length) if with_weights else None
            bias = torch.zeros(1, 2, length, length) if way == "bias" else None
            lengths, seed = torch.tensor([length]), torch.tensor([1]) if with_dropout else None
            dropout_p = 0.1 if with_dropout else 0.0
            inputs = (
                q,
                q,
                q,
                m,
                None,
                bias,
                lengths,
                lengths,
                None,
                None,
                length,
                length,
                False,
                0.125,
                dropout_p,
                seed,
            )
            found["wanted"] = "attention_forward_kernel" if way == "forward" else f"attention_backward_{way}_kernel"
            if way == "forward":
                attention.attention_forward(*inputs, False)
            else:
                attention.attention_backward(q, None, q, lse, *inputs, False, with_weights, bias is not None)
            kernel = found.pop(found["wanted"])
            options = f"{' weights' if with_weights else ''}{' dropout' if with_dropout else ''}"
            name = f"attention {way} {dtype} {width}{options} {length}"
            usage[name] = {**_cubin_usage(kernel.asm["cubin"]), "shared": kernel.metadata.shared}
            if kernel.metadata.shared > 1024 * SHARED_LIMIT[architecture]:
                raise MemoryError(f"{name}: {kernel.metadata.shared} bytes of shared memory on {architecture}")
    return usage


def _kernels(module: str) -> Any:
    if "mmer_fast_triton" not in sys.modules:
        folder = ROOT / "kernels" / "triton"
        spec = importlib.util.spec_from_file_location(
            "mmer_fast_triton", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise FileNotFoundError(folder)
        sys.modules["mmer_fast_triton"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"mmer_fast_triton.{module}")


def _triton_dtype(name: str) -> object:
    import triton.language as tl

    return {"fp32": tl.float32, "fp64": tl.float64}[name]


def _argument_type(name: str, dtype: str) -> str:
    if name in ("scores_ptr", "weights_ptr", "grad_weights_ptr", "grad_scores_ptr"):
        return f"*{dtype}"
    if name == "mask_ptr":
        return "*u8"
    if name == "lengths_ptr":
        return "*i64"
    if name.endswith("_ptr"):
        return "*fp64"
    return "i64" if name.endswith("_bits") else "i32"


_FIGURES = ("REG", "STACK", "LOCAL")


def _cuobjdump() -> str:
    """The tool that Triton brings along, or the toolkit's."""
    found = shutil.which("cuobjdump")
    if importlib.util.find_spec("triton") is not None:
        import triton.backends.nvidia as nvidia

        bundled = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        found = str(bundled) if bundled.exists() else found
    if found is None:
        raise FileNotFoundError("cuobjdump: neither with Triton nor on PATH")
    return found


def _cubin_usage(cubin: bytes) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", report).group(1)) for key in _FIGURES)
    return {"registers": registers, "spill": stack + local}


def main() -> None:
    backend, *architectures = sys.argv[1:]
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET must not be set here")
    compile_for = {"cuda": compile_cuda, "triton": compile_triton}[backend]
    print(json.dumps({architecture: compile_for(architecture) for architecture in architectures or ARCHITECTURES}))


if __name__ == "__main__":
    main()
