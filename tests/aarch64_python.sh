#!/usr/bin/env bash
# aarch64_python.sh FOLDER: makes FOLDER/bin/python, Debian's Python for aarch64 under QEMU, with an
# environment of its own. Packages are taken from this system's sources and unpacked into FOLDER;
# nothing of the system changes, and no root is needed.
set -euo pipefail
if ! qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64); then
  echo "tests for aarch64 need an emulator: on Debian, apt install qemu-user-static" >&2
  exit 1
fi
mkdir -p "$1"/{bin,apt/lists/partial,apt/archives/partial,root/usr/lib}
folder=$(realpath "$1")
ln -sfn usr/lib "$folder/root/lib"
touch "$folder/apt/status"
apt=(apt-get --quiet=2 -o APT::Architecture=arm64 -o APT::Architectures::=arm64
  -o APT::Sandbox::User=root -o Dir::State="$folder/apt" -o Dir::State::status="$folder/apt/status"
  -o Dir::Cache="$folder/apt")
"${apt[@]}" update
"${apt[@]}" install --download-only --no-install-recommends python3 libgomp1 libstdc++6
for package in "$folder"/apt/archives/*.deb; do dpkg-deb --extract "$package" "$folder/root"; done

python=$(realpath "$folder/root/usr/bin/python3")
mkdir -p "$folder/lib/$(basename "$python")/site-packages"
cat >"$folder/pyvenv.cfg" <<EOF
home = $folder/root/usr/bin
include-system-site-packages = false
EOF
cat >"$folder/bin/python" <<EOF
#!/bin/sh
exec "$qemu" -cpu neoverse-n1 -L "$folder/root" -0 "\$0" "$python" "\$@"
EOF
chmod +x "$folder/bin/python"
"$folder/bin/python" -c "import platform; assert platform.machine() == 'aarch64'"
