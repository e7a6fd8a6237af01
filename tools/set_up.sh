#!/usr/bin/env bash
# Make .venv and install the project into it, once.
#
#   tools/set_up.sh          what running needs
#   tools/set_up.sh dev      what testing and checking need as well
#   tools/set_up.sh tpu      what running on a TPU VM needs as well
#   tools/set_up.sh gpu      what running on a GPU needs as well
#   tools/set_up.sh ray      what running on many hosts needs as well
#
# Installs the exact versions of constraints.txt; runs again only when they or pyproject.toml change.
# PYTHON names the interpreter to use (3.11 or later).
set -euo pipefail

project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$project/.venv"
extra="${1:-}"
lock="$project/.venv.lock"

wanted() { cat "$project/pyproject.toml" "$project/constraints.txt" | cksum; }
is_installed() { [ "$(cat "$venv/.installed${extra:+-$extra}" 2>/dev/null)" = "$(wanted)" ]; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or later is needed; install it, or name it in PYTHON" >&2
    return 5
}

is_installed && exit 0

# One set-up at a time: a second one waits for the first, and takes over if that one died.
until mkdir "$lock" 2>/dev/null; do
    holder="$(cat "$lock/pid" 2>/dev/null || true)"
    if [ -n "$holder" ] && ! kill -0 "$holder" 2>/dev/null; then
        rm -rf "$lock"
    else
        sleep 1
    fi
done
echo $$ >"$lock/pid"
trap 'rm -rf "$lock"' EXIT
is_installed && exit 0

python="$(find_python)"
echo "set-up: installing into .venv (once; some minutes)" >&2
[ -x "$venv/bin/python" ] || "$python" -m venv --clear "$venv"
log="$venv/set_up.log"
if ! "$venv/bin/python" -m pip install --disable-pip-version-check --quiet \
    --constraint "$project/constraints.txt" --editable "$project${extra:+[$extra]}" >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "error: the installation failed; the whole log is .venv/set_up.log" >&2
    exit 5
fi
wanted >"$venv/.installed${extra:+-$extra}"
