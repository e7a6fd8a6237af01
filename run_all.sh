#!/usr/bin/env bash
# Make pictures end to end: text encoder, UNet, VAE. The first run sets up .venv; see --help.
#
#   ./run_all.sh --prompt "a large red star on a blue background"
set -euo pipefail

project="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
"$project/tools/set_up.sh"
exec "$project/.venv/bin/python" "$project/tools/run_all.py" "$@"
