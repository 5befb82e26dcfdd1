#!/usr/bin/env bash
# Runs the ops' tests on a build of lwkd._C with AddressSanitizer and UBSan, in a scratch copy.
# usage: tests/sanitize.sh PYTHON
set -euo pipefail
python=$(realpath -s "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
(cd "$root" && git ls-files -z --cached --others --exclude-standard) |
    (cd "$root" && xargs -0 cp --parents -t "$scratch" 2>/dev/null || true)
cd "$scratch"
LWKD_SANITIZE=address,undefined LWKD_CUDA=0 "$python" setup.py -q build_ext --inplace

run() {
    # Python itself never frees its interned objects, and torch's libraries are not instrumented.
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
        ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=0 \
        UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
        PYTHONPATH="$scratch" "$python" "$@"
}
run -c 'import lwkd; from lwkd.ops import backends; i = backends.build_info()
assert backends.CPU.live, backends.CPU.reason
assert i["sanitize"] == "address,undefined", i
assert lwkd.__file__.startswith("'"$scratch"'"), lwkd.__file__'
run -m pytest -p no:cacheprovider -m "not slow and not gpu" tests/ops tests/test_csrc.py tests/meters
