"""Makes the linker's view of an old libstdc++.so.6: ``old_libstdcxx.py THE_COMPILERS_ONE FOLDER``.

manylinux_2_28 promises libstdc++'s symbols up to GLIBCXX_3.4.24 and CXXABI_1.3.11; the headers of a
newer compiler ask for newer ones. A library that is linked with this one first and with
libstdc++.a second takes what the old one has from the system, as it must where exceptions cross to
other libraries, and carries the rest. (Red Hat's newer compilers for old systems do the same.)

Writes FOLDER/libstdc++.so.6.s and .map: assembly that defines the old symbols, and their versions.
"""

import subprocess
import sys
from pathlib import Path

NEWEST = {"GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}


def main(library: str, folder: str) -> None:
    text = subprocess.run(
        ["readelf", "--dyn-syms", "--wide", library], check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, tuple[tuple[int, ...], str, str]] = {}
    for line in text.splitlines():
        # number: value size type binding visibility section name@@version
        fields = line.split()
        if len(fields) != 8 or fields[6] == "UND" or "@" not in fields[7]:
            continue
        name, _, version = fields[7].replace("@@", "@").partition("@")
        family, _, number = version.partition("_")
        try:
            order = tuple(map(int, number.split(".")))
        except ValueError:  # CXXABI_FLOAT128 and its like
            continue
        if family in NEWEST and order <= NEWEST[family] and name != version:
            found[name] = max(found.get(name, ((), "", "")), (order, version, fields[3]))
    assembly, versions = [], {}
    for name, (_, version, kind) in sorted(found.items()):
        of_type = {"OBJECT": "object", "TLS": "tls_object"}.get(kind, "function")
        section = ".section .tdata" if kind == "TLS" else ".data" if kind == "OBJECT" else ".text"
        assembly.append(f'{section}\n.globl "{name}"\n.type "{name}", @{of_type}\n"{name}":')
        assembly.append(".quad 0")
        versions.setdefault(version, []).append(f'"{name}";')
    Path(folder, "libstdc++.so.6.s").write_text("\n".join(assembly) + "\n")
    nodes = (f"{version} {{ {' '.join(names)} }};" for version, names in sorted(versions.items()))
    Path(folder, "libstdc++.so.6.map").write_text("\n".join(nodes) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
