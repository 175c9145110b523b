"""The CPU kernels alone, through the NumPy module of CMakeLists.txt: every instruction set, memory and sanitizers.

Each run is a process of its own (run_cpu_kernels.py): the instruction set is chosen once a process, and a stray access
ends it. The build folders are pytest's cache, so only the first run compiles.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attention_kernel_cases
import cmake_build
import dropout_kernel_cases
import numpy as np
import perturbation_kernel_cases
import pytest
from cpu_kernel_cases import cases

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ISAS = ("baseline", "avx2", "avx512")
# Of a weight, between two instruction sets: both are within the oracle's tolerance, and usually much nearer.
AGREEMENT = {"float64": 1e-13, "float32": 5e-7, "bfloat16": 2**-8, "float16": 2**-11}


@pytest.fixture(scope="session")
def module(pytestconfig: pytest.Config) -> Path:
    return cmake_build.build(ROOT, pytestconfig.cache.mkdir("cpu_kernels"))


@pytest.fixture(scope="session")
def sanitized_module(pytestconfig: pytest.Config) -> Path:
    folder = pytestconfig.cache.mkdir("cpu_kernels_sanitized")
    return cmake_build.build(ROOT, folder, "-DMMER_SANITIZE=address,undefined")


class Runs:
    """run_cpu_kernels.py on one build, once for every instruction set; two at a time."""

    def __init__(self, module: Path, folder: Path, memory: str, **environment: str) -> None:
        self.module, self.folder, self.memory, self.environment = module, folder, memory, environment
        with ThreadPoolExecutor(2) as pool:
            self.results = dict(zip(ISAS, pool.map(self._run, ISAS), strict=True))

    def _run(self, isa: str) -> subprocess.CompletedProcess[str]:
        script = [str(HERE / "run_cpu_kernels.py"), str(self.module), str(self.outputs(isa)), self.memory]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MMER_FAST_CPU_ISA": isa, **self.environment}
        command = [sys.executable, "-W", "error", *script]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    def outputs(self, isa: str) -> Path:
        return self.folder / f"{isa}.npz"

    def report(self, isa: str) -> dict[str, Any]:
        """What it printed; skips where the CPU lacks `isa`, and fails with its last words if it ended otherwise."""
        result = self.results[isa]
        assert result.returncode == 0, f"ended with {result.returncode}:\n{result.stderr[-6000:]}"
        report = json.loads(result.stdout)
        if report["isa"] != isa:
            pytest.skip(f"this CPU has no {isa}: the best that it can run is {report['isa']}")
        return report


def _assert_clean(report: dict[str, Any]) -> None:
    modules = (attention_kernel_cases, dropout_kernel_cases, perturbation_kernel_cases)
    assert report["cases"] == len(list(cases())) + sum(len(list(module.cases())) for module in modules)
    assert not report["failures"], "\n".join(report["failures"][:20])


@pytest.fixture(scope="session")
def guarded(module: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(module, tmp_path_factory.mktemp("guarded"), "guard-page")


@pytest.fixture(scope="session")
def sanitized(sanitized_module: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        command = [str(cmake_build.compiler()), f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not os.path.isabs(found):
            pytest.skip(f"the compiler has no {name}")
        libraries.append(os.path.realpath(found))
    environment = {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    return Runs(sanitized_module, tmp_path_factory.mktemp("sanitized"), "heap", **environment)


@pytest.mark.parametrize("isa", ISAS)
def test_against_bisection_before_guard_pages(guarded: Runs, isa: str) -> None:
    _assert_clean(guarded.report(isa))


@pytest.mark.parametrize("isa", ISAS[1:])
def test_instruction_sets_agree(guarded: Runs, isa: str) -> None:
    guarded.report(isa)
    guarded.report("baseline")
    with np.load(guarded.outputs(isa)) as weights, np.load(guarded.outputs("baseline")) as baseline:
        assert weights.files == baseline.files == [repr(case) for case in cases()]
        for case in cases():
            got, expected = weights[repr(case)], baseline[repr(case)]
            np.testing.assert_allclose(got, expected, rtol=0, atol=AGREEMENT[case.dtype], err_msg=repr(case))


@pytest.mark.parametrize("isa", ISAS)
def test_sanitizers(sanitized: Runs, isa: str) -> None:
    _assert_clean(sanitized.report(isa))


def test_sanitizers_are_on(sanitized_module: Path) -> None:
    library = next(sanitized_module.glob("mmer_kernels_numpy*.so"))
    symbols = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
    assert "__asan_report_load" in symbols
    assert "__ubsan_handle" in symbols


@pytest.mark.parametrize("isa", ISAS[:2])
def test_valgrind(module: Path, isa: str) -> None:
    """No result depends on uninitialised memory, and no access leaves its block. Valgrind knows no AVX-512."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        pytest.skip("valgrind is not installed")
    driver = cmake_build.build(ROOT, module, target="mmer_memcheck_driver") / "mmer_memcheck_driver"
    command = [valgrind, "--quiet", "--error-exitcode=9", "--leak-check=full", "--track-origins=no", str(driver)]
    environment = {**os.environ, "MMER_FAST_CPU_ISA": isa}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, f"ended with {run.returncode}\n{run.stdout}{run.stderr[-6000:]}"
    if not run.stdout.startswith(isa):
        pytest.skip(f"this CPU has no {isa}")


def test_every_kernel_source_is_built(module: Path) -> None:
    """compile_commands.json, for editors: each source of sources.json, once for every instruction set."""
    sources = json.loads((ROOT / "kernels" / "sources.json").read_text())
    commands = json.loads((module / "compile_commands.json").read_text())
    built = [str(Path(entry["file"]).resolve().relative_to(ROOT)) for entry in commands]
    isas = {name for name in ISAS if any(f"-DMMER_VARIANT={name}" in entry["command"] for entry in commands)}
    assert isas in [set(family) for family in sources["isas"].values()]
    for name in sources["cpu"]:
        assert built.count(f"kernels/{name}") == 1
    for name in sources["cpu_per_isa"]:
        assert built.count(f"kernels/{name}") == len(isas)
