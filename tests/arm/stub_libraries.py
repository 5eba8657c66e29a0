"""Make stand-ins for the CUDA libraries that an aarch64 torch links to, so that its CPU code loads without them.

    stub_libraries.py TORCH_LIB ROOT STUBS      (needs readelf and aarch64-linux-gnu-gcc)

The registry's aarch64 torch is built for CUDA. The loader needs every library that torch names, and an address for
every symbol in its tables, although CPU code calls none of them. So this compiles one library whose functions return 0,
and links all the missing names to it.
"""

import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Library:
    """The parts of a shared library that the loader reads."""

    needed: set[str] = field(default_factory=set)
    version_files: dict[str, str] = field(default_factory=dict)  # symbol version → the library that must define it
    undefined: set[tuple[str, str]] = field(default_factory=set)  # (symbol, version or "")
    defined: set[str] = field(default_factory=set)


def read(path: Path) -> Library:
    """Read a file's dynamic section, version needs and symbols."""
    library, file = Library(), ""
    for line in readelf(path, "--dynamic", "--version-info", "--dyn-syms"):
        columns = line.split()
        if m := re.search(r"\(NEEDED\).*\[(.+)\]", line):
            library.needed.add(m[1])
        elif m := re.search(r"Version: \d+ +File: (\S+)", line):
            file = m[1]
        elif m := re.search(r"Name: (\S+) +Flags: .* Version: \d+$", line):
            library.version_files[m[1]] = file
        elif len(columns) >= 8 and columns[0].rstrip(":").isdigit() and columns[4] in ("GLOBAL", "WEAK", "UNIQUE"):
            name, _, version = columns[7].partition("@")
            if columns[6] != "UND":
                library.defined.add(name)
            elif columns[4] == "GLOBAL":  # weak symbols may stay without an address
                library.undefined.add((name, version.lstrip("@")))
    return library


def readelf(path: Path, *options: str) -> list[str]:
    command = ["readelf", "--wide", *options, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def find_missing(torch_lib: Path, root: Path) -> tuple[set[str], dict[str, str]]:
    """Return the libraries that torch names and nobody has, and the symbols it needs of them, with their versions.

    The version of a symbol without one is "".
    """
    own = {path.name: read(path) for path in sorted(torch_lib.glob("*.so*"))}
    places = [root / p for p in ("usr/lib/aarch64-linux-gnu", "lib/aarch64-linux-gnu", "lib")]
    named = {name for library in own.values() for name in library.needed} - set(own)
    system = {name: path for name in named for place in places if (path := place / name).exists()}
    missing = named - set(system)

    # the interpreter defines the Py… symbols
    others = [read(path) for path in (*system.values(), root / "usr/bin/python3.11")]
    defined = {name for library in (*own.values(), *others) for name in library.defined}
    symbols: dict[str, str] = {}
    for library in own.values():
        for name, version in library.undefined:
            if version and library.version_files[version] in missing:
                symbols[name] = version
            elif not version and name not in defined:
                symbols.setdefault(name, "")
    return missing, symbols


def write_stubs(missing: set[str], symbols: dict[str, str], stubs: Path) -> None:
    """Compile the stand-in, and make a link to it for every missing library.

    The version script is needed: the loader refuses a library that lacks a symbol version which another library needs.
    """
    stubs.mkdir(parents=True, exist_ok=True)
    for old in stubs.iterdir():
        old.unlink()
    by_version: dict[str, list[str]] = defaultdict(list)
    for name, version in sorted(symbols.items()):
        by_version[version].append(name)
    unversioned = by_version.pop("", [])
    # A version script cannot mix named and unnamed nodes. Unversioned symbols are left out; they are exported anyway.
    nodes = [f"{version} {{ global: {'; '.join(names)}; }};\n" for version, names in sorted(by_version.items())]
    (stubs / "stub.map").write_text("".join(nodes))
    (stubs / "stub.c").write_text("".join(f"void *{s}(void) {{ return 0; }}\n" for s in sorted(symbols)))
    library = stubs / "libstub.so"
    command = ["aarch64-linux-gnu-gcc", "-w", "-shared", "-fPIC", "-nostdlib"]
    command += [f"-Wl,--version-script={stubs / 'stub.map'}", "-o", str(library), str(stubs / "stub.c")]
    subprocess.run(command, check=True)
    for name in missing:
        (stubs / name).symlink_to(library.name)
    print(f"arm setup: {len(missing)} libraries stood in for, {len(symbols)} symbols, {len(unversioned)} unversioned")


if __name__ == "__main__":
    torch_lib, root, stubs = map(Path, sys.argv[1:])
    write_stubs(*find_missing(torch_lib, root), stubs)
