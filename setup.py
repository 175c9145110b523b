"""Builds mmer_fast: one abi3 library for every torch >= 2.10, CPU and CUDA in one file.

Environment variables:
    MMER_CUDA             1: build the CUDA kernels (an error without nvcc); 0: do not; unset: if nvcc is there and
                          the installed torch has CUDA. Whether a GPU is present never matters.
    MMER_PURE_PYTHON      1: no compiled library (reference and Triton backends only).
    TORCH_CUDA_ARCH_LIST  e.g. "8.0;9.0+PTX" (default: kernels/sources.json, PTX of the newest).
    MAX_JOBS, NVCC_THREADS, CXX, CUDA_HOME

The torch of this environment is found also inside pip's isolated build: only its headers and library names are needed,
so nothing is imported and nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = json.loads((ROOT / "kernels" / "sources.json").read_text())
TORCH_TARGET = (2, 10)
PYTHON_TARGET = "cp310"


def fail(message: str) -> NoReturn:
    sys.exit(f"\nmmer_fast: {message}\n")


def enabled(variable: str) -> bool | None:
    """The environment variable as a choice: True, False, or None where it is unset."""
    value = os.environ.get(variable, "").strip()
    if value not in ("", "0", "1"):
        fail(f"{variable} must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def find_torch() -> tuple[Path, str, str | None]:
    """Folder, version and CUDA version (or None) of the installed torch, without importing it."""
    folders = [Path(entry or ".") for entry in sys.path]
    folders += [Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")]  # hidden by pip's build isolation
    for folder in folders:
        version_file = folder / "torch" / "version.py"
        if version_file.is_file():
            text = version_file.read_text()
            version = re.search(r"__version__ = '([^']+)'", text)
            cuda = re.search(r"^cuda.*= '([^']+)'", text, flags=re.MULTILINE)
            if version is None:
                continue
            if tuple(int(x) for x in version[1].split(".")[:2]) < TORCH_TARGET:
                fail(f"needs torch >= {TORCH_TARGET[0]}.{TORCH_TARGET[1]}, found {version[1]} in {folder}")
            return version_file.parent, version[1], cuda[1] if cuda else None
    fail(
        "PyTorch is not installed in this Python environment. Install it first (pip install 'torch>=2.10'), then "
        "repeat this command. If it is installed and your tool builds in another environment, "
        "use: pip install --no-build-isolation ."
    )


def find_compiler() -> list[str] | None:
    """The command of the C++ compiler, several words where CXX has them ("ccache g++"); None where there is none."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    if wanted:
        if shutil.which(wanted[0]) is None:
            fail(f"CXX={os.environ['CXX']!r}, but there is no program {wanted[0]!r}; MMER_PURE_PYTHON=1 needs none")
        return wanted
    return next(([path] for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)


def find_nvcc() -> tuple[Path, Path] | None:
    """nvcc and the toolkit's folder."""
    candidates = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates += [str(Path(found).resolve().parent.parent) if (found := shutil.which("nvcc")) else None]
    candidates += ["/usr/local/cuda"]
    for home in candidates:
        header = Path(home or "") / "include" / "cuda_runtime_api.h"
        if home and (Path(home) / "bin" / "nvcc").is_file() and header.is_file():
            return Path(home) / "bin" / "nvcc", Path(home)
    return None


def want_cuda(torch_cuda: str | None) -> tuple[Path, Path] | None:
    choice = enabled("MMER_CUDA")
    if choice is False:
        return None
    found = find_nvcc()
    if choice and found is None:
        fail(
            "MMER_CUDA=1, but no nvcc was found (CUDA_HOME, PATH and /usr/local/cuda were looked at). Install the "
            "CUDA toolkit or set CUDA_HOME; MMER_CUDA=0 builds for the CPU alone."
        )
    return found if choice or torch_cuda is not None else None


def cuda_architectures() -> list[str]:
    """E.g. ["8.0", "9.0+PTX"]."""
    listed = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if listed == [""]:
        listed = list(SOURCES["cuda_architectures"])
        listed[-1] += "+PTX"
    for arch in listed:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            fail(f"TORCH_CUDA_ARCH_LIST must look like '8.0;9.0+PTX', got {arch!r}")
    return listed


def gencode(architectures: list[str]) -> list[str]:
    flags = []
    for arch in architectures:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if arch.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def write_older_glibc(folder: Path) -> dict[Path, str]:
    """The sources of libraries to link with, which have the older version of a symbol alone; their sonames."""
    libraries = {}
    for soname, versions in SOURCES["older_glibc"].get(platform.machine(), {}).items():
        library = folder / f"older_{soname.partition('.')[0]}.so"
        functions = [name for names in versions.values() for name in names]
        write_if_new(library.with_suffix(".cpp"), "".join(f'extern "C" void {name}() {{}}\n' for name in functions))
        script = "".join(f"{version} {{ global: {'; '.join(names)}; }};\n" for version, names in versions.items())
        write_if_new(library.with_suffix(".so.map"), script)
        libraries[library] = soname
    return libraries


def write_if_new(path: Path, text: str) -> None:
    """Leaves the file's time alone where nothing changed: ninja goes by it."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def quote(text: str | Path) -> str:
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(
    build_folder: Path,
    cxx: str,
    cuda: tuple[Path, Path] | None,
    older: dict[Path, str],
    edges: list[tuple[str, Path, str]],
    target: Path,
    link: list[str],
) -> str:
    """The text of build.ninja.

    Args:
        build_folder: where the objects go.
        cxx: the command of the C++ compiler, quoted.
        cuda: from `want_cuda`.
        older: from `write_older_glibc`.
        edges: the sources: rule ("cxx" or "nvcc"), path and flags of each.
        target: the library.
        link: flags of its linking.
    """
    lines = [
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n  description = C++ $in",
        f"rule nvcc\n  command = {quote(cuda[0]) if cuda else 'false'} -MD -MF $out.d $flags -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n  description = CUDA $in",
        # Hidden visibility leaves what the headers of libstdc++ instantiate: the version script hides that too.
        f"rule link\n  command = {cxx} -shared -Wl,--exclude-libs,ALL $in -o $out $flags\n  description = link $out",
        f"rule older\n  command = {cxx} -shared -nostdlib -fPIC -fno-builtin -w -Wl,-soname,$soname "
        "-Wl,--version-script=$out.map $in -o $out\n  description = older glibc $soname",
    ]
    for library in older:
        source = quote(library.with_suffix(".cpp"))
        script = quote(library.with_suffix(".so.map"))
        lines.append(f"build {quote(library)}: older {source} | {script}\n  soname = {older[library]}")
    objects = []
    for i, (rule, source, flags) in enumerate(edges):
        out = build_folder / f"{i:02d}_{source.stem}.o"
        implicit = "" if rule == "nvcc" else f" | {quote(build_folder / 'build_info.h')}"
        lines.append(f"build {quote(out)}: {rule} {quote(source)}{implicit}\n  flags = {flags}")
        objects.append(quote(out))
    lines.append(f"build {quote(target)}: link {' '.join(objects)} | {' '.join(map(quote, older))}")
    lines.append(f"  flags = {' '.join(link)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Compiles through ninja: flags differ from file to file (one build of the CPU kernels per instruction set)."""

    def build_extension(self, ext: Extension) -> None:
        torch_folder, torch_version, torch_cuda = find_torch()
        compiler = find_compiler()
        if compiler is None:
            fail("no C++ compiler (g++, clang++, CXX)")
        cxx = shlex.join(compiler).replace("$", "$$")
        cuda = want_cuda(torch_cuda)
        # Not build_temp, which pip makes anew each time: ninja then rebuilds only what changed.
        build_folder = ROOT / "build" / ("ninja-cuda" if cuda else "ninja-cpu")
        build_folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        architectures = cuda_architectures() if cuda else []
        isas = SOURCES["isas"].get(platform.machine(), SOURCES["isas"]["other"])
        self.write_build_info(build_folder / "build_info.h", compiler, torch_version, cuda, architectures, list(isas))

        include = [
            f"-isystem {quote(torch_folder / 'include')}",
            f"-isystem {quote(sysconfig.get_path('include'))}",
            f"-include {quote(build_folder / 'build_info.h')}",
        ]
        target_hex = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
        torch_flags = [*SOURCES["cxx_flags"], f"-DTORCH_TARGET_VERSION={target_hex}", *include]
        exports = build_folder / "exports.map"
        exports.write_text("{ global: PyInit__C; local: *; };\n")
        older = write_older_glibc(build_folder)
        link = ["-lgcc"]  # static, before libgcc_s.so, which has the conversions of float16 only since 12
        link += ["-Wl,--as-needed", *(quote(library) for library in older), "-ldl", "-lrt", "-lpthread"]
        # libtorch leads to the weak symbol of cuda_stream.h, for which the linker alone would not keep it.
        link += [f"-L{quote(torch_folder / 'lib')}", "-ltorch_cpu", "-Wl,--no-as-needed", "-ltorch"]
        link.append(f"-Wl,--version-script={quote(exports)}")
        edges: list[tuple[str, Path, str]] = []
        if cuda:
            home = cuda[1]
            torch_flags += ["-DMMER_WITH_CUDA", f"-isystem {quote(home / 'include')}"]
            link = [f"-L{quote(home / 'lib64')}", "-lcudart_static", *link]
            threads = os.environ.get("NVCC_THREADS", "1")
            nvcc_flags = [*SOURCES["nvcc_flags"], *gencode(architectures), "--threads", threads]
            edges += [("nvcc", ROOT / "kernels" / name, " ".join(nvcc_flags)) for name in SOURCES["cuda"]]
        for isa, isa_flags in isas.items():
            flags = " ".join([*SOURCES["cxx_flags"], f"-DMMER_VARIANT={isa}", *isa_flags])
            edges += [("cxx", ROOT / "kernels" / name, flags) for name in SOURCES["cpu_per_isa"]]
        plain = " ".join(SOURCES["cxx_flags"])
        edges += [("cxx", ROOT / "kernels" / name, plain) for name in SOURCES["cpu"]]
        edges += [("cxx", ROOT / source, " ".join(torch_flags)) for source in ext.sources]

        (build_folder / "build.ninja").write_text(ninja_file(build_folder, cxx, cuda, older, edges, target, link))
        self.run_ninja(build_folder)

    def write_build_info(
        self,
        path: Path,
        compiler: list[str],
        torch_version: str,
        cuda: tuple[Path, Path] | None,
        architectures: list[str],
        isas: list[str],
    ) -> None:
        nvcc_version = None
        if cuda:
            printed = subprocess.run([cuda[0], "--version"], capture_output=True, text=True, check=True).stdout
            release = re.search(r"release ([\d.]+)", printed)
            nvcc_version = release[1] if release else "unknown"
        compiler_version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
        info = {
            "version": self.distribution.get_version(),
            "compiler": compiler_version.splitlines()[0],
            "torch": torch_version,
            "torch_target": ".".join(map(str, TORCH_TARGET)),
            "cuda": nvcc_version,
            "cuda_architectures": architectures,
            "isas": isas,
        }
        write_if_new(path, f'#define MMER_BUILD_INFO R"json({json.dumps(info)})json"\n')

    def run_ninja(self, build_folder: Path) -> None:
        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        command += ["-C", str(build_folder)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if self.verbose:
            command.append("-v")
        if subprocess.run(command).returncode != 0:
            fail("the compiled library could not be built; the compiler's message is above")


class FreshBuild(build_py):
    """Starts from an empty folder: a module deleted since the last build must not get into a wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Abi3Wheel(bdist_wheel):
    def finalize_options(self) -> None:
        if self.distribution.ext_modules:
            self.py_limited_api = PYTHON_TARGET
        super().finalize_options()


def extensions() -> list[Extension]:
    if enabled("MMER_PURE_PYTHON"):
        print("mmer_fast: MMER_PURE_PYTHON=1, no compiled library: reference and Triton backends only")
        return []
    if find_compiler() is None:
        if enabled("MMER_CUDA"):
            fail("MMER_CUDA=1, but no C++ compiler was found (g++, clang++, CXX)")
        print("mmer_fast: no C++ compiler found: pure-Python install, reference and Triton backends only")
        return []
    if enabled("MMER_CUDA"):
        want_cuda(None)  # says at once what is missing
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
    return [Extension("mmer_fast._C", sources, py_limited_api=True)]


version = re.search(r'__version__ = "([^"]+)"', (ROOT / "mmer_fast" / "_version.py").read_text())
assert version is not None
setup(
    version=version[1],
    ext_modules=extensions(),
    cmdclass={"build_py": FreshBuild, "build_ext": NinjaBuild, "bdist_wheel": Abi3Wheel},
)
