"""What a wheel of zerowake carries beside its Python files: gRPC code made from `proto/`, and C programs compiled from `restore_agent/`.

Both are made at build time, in a temporary folder, for wheels and editable installs alike, so nothing generated ever lies in the source
tree or in a commit. The packages they become are

    zerowake_proto    `proto/NAME.proto` as NAME_pb2 and NAME_pb2_grpc, with type stubs
    zerowake_native   `restore_agent/*/NAME.c` as a static program NAME (it has a `main`) or a shared library libNAME.so (it has none)

protoc reads `proto/` under the virtual folder `zerowake_proto/`: so the generated modules import each other by their full package name, and
the descriptors' names (`zerowake_proto/agent.proto`) cannot clash with another distribution's `agent.proto` in the process-wide pool.
Committing the generated code was rejected (two truths); so was rewriting its imports afterwards (a regular expression over code).
"""

import re
import shutil
import subprocess
import sysconfig
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CFLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")


class CustomBuildHook(BuildHookInterface):
    """Adds the packages `zerowake_proto` and `zerowake_native` to the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        self._made = tempfile.TemporaryDirectory(prefix="zerowake-build-")
        made = Path(self._made.name)
        generate_proto(root / "proto", made / "zerowake_proto")
        compile_native(root / "restore_agent", made / "zerowake_native")
        include = build_data["force_include_editable" if version == "editable" else "force_include"]
        for package in ("zerowake_proto", "zerowake_native"):
            include[str(made / package)] = package
        build_data["pure_python"] = False
        # Of Python's ABI nothing here is a user: the C parts are programs and a library that is called by ctypes.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self._made.cleanup()


def generate_proto(sources: Path, package: Path) -> None:
    """Fills `package` from every `.proto` file in `sources`.

    Raises:
        RuntimeError: protoc refused one; its own words are on stderr.
    """
    package.mkdir()
    protos = sorted(sources.glob("*.proto"))
    arguments = [
        "protoc",
        f"-I{package.name}={sources}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"--python_out={package.parent}",
        f"--grpc_python_out={package.parent}",
        f"--pyi_out={package.parent}",
        f"--plugin=protoc-gen-mypy_grpc={Path(sysconfig.get_path('scripts')) / 'protoc-gen-mypy_grpc'}",
        f"--mypy_grpc_out=quiet:{package.parent}",
        *(f"{package.name}/{proto.name}" for proto in protos),
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError(f"protoc refused a file in {sources} (its message stands above): mend that .proto file")
    (package / "__init__.py").write_text('"""Generated at build from proto/: edit the .proto files and reinstall."""\n')
    (package / "py.typed").touch()


def compile_native(sources: Path, package: Path) -> None:
    """Compiles every C file in `sources` into `package`, each to a program or a library, whichever it is.

    Raises:
        RuntimeError: there is no C compiler, or it refused a file.
    """
    package.mkdir()
    paths: dict[str, str] = {}
    for source in sorted(sources.rglob("*.c")):
        stem = source.stem
        if re.search(r"^int\s+main\s*\(|^main\s*\(", source.read_text(), re.MULTILINE):
            target = package / stem.replace("_", "-")
            run_compiler(source, target, "-static")
        else:
            target = package / f"lib{stem}.so"
            run_compiler(source, target, "-shared", "-fPIC", "-pthread")
        paths[stem.upper()] = target.name
    head = '"""Where the compiled parts lie. Made from restore_agent/*/*.c: edit those and reinstall."""\n\nfrom pathlib import Path\n\n'
    lines = [f'{name} = Path(__file__).parent / "{file}"\n' for name, file in paths.items()]
    (package / "__init__.py").write_text(head + "".join(lines))
    (package / "py.typed").touch()


def run_compiler(source: Path, target: Path, *flags: str) -> None:
    """Raises RuntimeError with the compiler's own message, or with what to install."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError(f"no C compiler to build {source.name} with: install one (Debian, Ubuntu: apt-get install gcc libc6-dev)")
    ran = subprocess.run([compiler, *CFLAGS, *flags, "-o", str(target), str(source)], capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise RuntimeError(f"{compiler} could not build {source.name}:\n{ran.stderr}")
