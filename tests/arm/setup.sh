#!/usr/bin/env bash
# Install an Arm (aarch64) Python with torch and ExecuTorch's own aarch64 build, emulated by qemu on x86-64 Linux.
#
#   tests/arm/setup.sh DIR [TORCH_VERSION EXECUTORCH_VERSION]     (default: the versions that pyproject.toml pins)
#
# Afterwards DIR/python is that interpreter. This takes 1-3 minutes, and 1.5 GB in DIR. Running it again does what is
# left to do. It needs root, for debootstrap and for Debian packages that are not installed yet. It is for tests of
# correctness: times under emulation say nothing about a phone.
#
#   DIR/root    Debian 12 for arm64, unpacked and never booted: the C library and Python 3.11
#   DIR/site    torch, ExecuTorch and what they import, from the package registry
#   DIR/stubs   stand-ins for CUDA's libraries, which the registry's aarch64 torch links to (stub_libraries.py)
#
# Optional variables: PYTHON (any Python with pip) and DEBIAN_MIRROR.
set -euo pipefail

stop() { echo "arm setup: $*" >&2; exit 1; }
say() { echo "arm setup: $*"; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -eq 1 ] || [ $# -eq 3 ] || stop "usage: $0 DIR [TORCH_VERSION EXECUTORCH_VERSION]"
pinned() { sed -nE "s/^ *\"$1==([^\"]+)\".*/\1/p" "$here/../../pyproject.toml" | head -n 1; }
torch=${2:-$(pinned torch)} executorch=${3:-$(pinned executorch)}
[ -n "$torch" ] && [ -n "$executorch" ] || stop "pyproject.toml pins no torch or no executorch: name both versions"

# the contents of DIR depend on these
versions="torch $torch, executorch $executorch, $(cat "$here/setup.sh" "$here/stub_libraries.py" | sha256sum | cut -c 1-12)"
[ "$(cat "$1/ready" 2>/dev/null)" = "$versions" ] && { say "$1 is ready ($versions)"; exit 0; }

[ "$(uname -sm)" = "Linux x86_64" ] || stop "this is $(uname -sm); it needs Linux x86_64"
[ "$(id -u)" = 0 ] || stop "needs root (debootstrap, apt-get): run it with sudo"
mkdir -p "$1"
dir=$(cd "$1" && pwd)
rm -f "$dir/ready"

# --- programs on the host ---------------------------------------------------------------------------------------------
declare -A package_of=(
  [qemu-aarch64-static]=qemu-user-static [debootstrap]=debootstrap [aarch64-linux-gnu-gcc]=gcc-aarch64-linux-gnu
  [readelf]=binutils [dpkg-deb]=dpkg
)
absent=()
for command in "${!package_of[@]}"; do
  command -v "$command" >/dev/null || absent+=("${package_of[$command]}")
done
[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || absent+=(debian-archive-keyring)
if [ ${#absent[@]} -gt 0 ]; then
  command -v apt-get >/dev/null || stop "no apt-get here; install what holds these Debian packages: ${absent[*]}"
  say "installing ${absent[*]}"
  export DEBIAN_FRONTEND=noninteractive
  get() { apt-get install -y -qq --no-install-recommends "${absent[@]}"; }
  # package lists may be missing or out of date: refresh them only then
  get >"$dir/apt.log" 2>&1 || { apt-get update -qq && get; } >>"$dir/apt.log" 2>&1 ||
    stop "apt-get could not install ${absent[*]}: see $dir/apt.log"
fi
python=${PYTHON:-python3}
"$python" -m pip --version >/dev/null 2>&1 || stop "$python has no pip; name a Python that has it: PYTHON=… $0 $1"

# --- DIR/root ---------------------------------------------------------------------------------------------------------
root=$dir/root
if [ ! -e "$root" ]; then
  say "unpacking Debian 12 for arm64"
  # the host's own Debian mirror, if it has one: some networks reach no other
  mirror=${DEBIAN_MIRROR:-$(grep -rhoE 'https?://[^] ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d \
    2>/dev/null | head -n 1 | tr -d ' ' || true)}
  rm -rf "$root.part"
  # --foreign downloads and unpacks the essential packages only; the rest need no configuring, so unpacking is enough
  debootstrap --arch=arm64 --foreign --variant=minbase --include=python3.11,libgomp1 \
    bookworm "$root.part" "${mirror:-http://deb.debian.org/debian}" >"$dir/debootstrap.log" 2>&1 ||
    stop "debootstrap failed: see $dir/debootstrap.log (another mirror: DEBIAN_MIRROR=URL)"
  for deb in "$root.part"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$deb" "$root.part"; done
  rm -rf "$root.part"/var/cache/apt/archives
  mv "$root.part" "$root"
fi

# PyTorch's cpuinfo reads these files; qemu 7 would read the x86 host's. They describe two Cortex-A76 cores with the dot
# product and int8 matrix instructions of a phone's cores.
cpus=$root/sys/devices/system/cpu
mkdir -p "$root/proc" "$cpus"
for file in possible present online; do echo 0-1 >"$cpus/$file"; done
for i in 0 1; do
  cat <<CPUINFO
processor	: $i
BogoMIPS	: 50.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp i8mm bf16
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x1
CPU part	: 0xd0b
CPU revision	: 0

CPUINFO
  core=$cpus/cpu$i
  mkdir -p "$core/topology" "$core/cpufreq" "$core/regs/identification"
  echo 0x00000000411fd0b0 >"$core/regs/identification/midr_el1"
  echo "$i" >"$core/topology/core_id"
  echo 0 >"$core/topology/physical_package_id"
  echo 0-1 | tee "$core/topology/core_siblings_list" >"$core/topology/package_cpus_list"
  echo 2000000 | tee "$core/cpufreq/cpuinfo_max_freq" >"$core/cpufreq/cpuinfo_min_freq"
done >"$root/proc/cpuinfo"

# --- DIR/site ---------------------------------------------------------------------------------------------------------
site=$dir/site
wanted="$torch $executorch"
if [ "$(cat "$site/.versions" 2>/dev/null)" != "$wanted" ]; then
  say "downloading torch $torch and executorch $executorch for aarch64"
  rm -rf "$site" "$site.part"
  # --no-deps, since the dependencies include gigabytes of CUDA; what the runtime imports is named here instead
  "$python" -m pip install -q --no-deps --no-compile --only-binary=:all: --target "$site.part" \
    --implementation cp --python-version 3.11 --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
    "torch==$torch" "executorch==$executorch" numpy pyyaml markupsafe typing_extensions filelock sympy mpmath networkx \
    jinja2 fsspec setuptools packaging flatbuffers ruamel.yaml tabulate >"$dir/pip.log" 2>&1 ||
    stop "pip could not get the aarch64 packages: see $dir/pip.log"
  echo "$wanted" >"$site.part/.versions"
  mv "$site.part" "$site"
fi

# --- DIR/stubs and DIR/python -----------------------------------------------------------------------------------------
"$python" "$here/stub_libraries.py" "$site/torch/lib" "$root" "$dir/stubs"
libraries=$site/torch/lib:$dir/stubs:$root/usr/lib/aarch64-linux-gnu:$root/lib/aarch64-linux-gnu
cat >"$dir/python" <<LAUNCHER
#!/usr/bin/env bash
# Python 3.11 for aarch64 with torch and ExecuTorch, emulated (made by llamaq's tests/arm/setup.sh).
# No SVE and no SME, as on most phones: with them XNNPACK would take other kernels. The paths of the Arm loader go
# to the emulated program alone; the host's qemu must not see them.
unset PYTHONHOME
exec env PYTHONPATH="$site" PYTHONNOUSERSITE=1 qemu-aarch64-static -cpu max,sve=off,sme=off,pauth-impdef=on \\
  -L "$root" -E LD_LIBRARY_PATH="$libraries" "$root/usr/bin/python3.11" "\$@"
LAUNCHER
chmod +x "$dir/python"
machine=$("$dir/python" -c 'import platform; print(platform.machine())') || stop "$dir/python does not start"
[ "$machine" = aarch64 ] || stop "$dir/python says it runs on $machine, not aarch64"
echo "$versions" >"$dir/ready"
say "ready: $dir/python"
