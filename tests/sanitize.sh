#!/usr/bin/env bash
# Runs the tests that exercise lwkd._C on a build of it with AddressSanitizer and UBSan, in a
# scratch copy.
# usage: tests/sanitize.sh PYTHON [OPTION OF PYTEST...]
set -euo pipefail
python=$(realpath -s "$1")
shift
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$root"
# What git lists less what is deleted here; a file that cannot be copied ends the script.
comm -z -23 <(git ls-files -z --cached --others --exclude-standard | sort -zu) \
    <(git ls-files -z --deleted | sort -zu) | xargs -0 cp --parents -t "$scratch"
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
# AddressSanitizer keeps what is freed in a quarantine, to catch a use of it: resident memory grows
# by that, and the test that it does not grow is left to the ordinary build.
growth=tests/ops/test_dispatch.py::test_ten_thousand_calls_leave_nothing_behind
run -m pytest "$@" -p no:cacheprovider -m "not slow and not gpu" --deselect "$growth" \
    tests/ops tests/test_csrc.py tests/meters tests/losses tests/test_schedule.py \
    tests/test_resume.py tests/test_hooks.py tests/cli/test_doctor.py
