#!/bin/sh
# Installs icmoe-fl from the wheels beside this file. Needs Python 3.11 and no network.
# Usage: sh install.sh [FOLDER]     FOLDER: where the environment goes, default /opt/icmoe-fl
set -eu

here=$(cd "$(dirname "$0")" && pwd)
target=${1:-/opt/icmoe-fl}
python=${PYTHON:-python3.11}

command -v "$python" >/dev/null || {
    echo "$python is not there. Install Python 3.11 with its venv module, or name another: PYTHON=/path/to/python sh $0" >&2
    exit 2
}
test ! -e "$target" || {
    echo "$target exists. Remove it, or name another folder: sh $0 FOLDER" >&2
    exit 2
}
(cd "$here" && sha256sum --check --quiet SHA256SUMS) || {
    echo "A wheel differs from SHA256SUMS: the copy is damaged. Copy the folder again." >&2
    exit 2
}
"$python" -m venv "$target"
"$target/bin/python" -m pip install --no-index --disable-pip-version-check -f "$here" 'icmoe-fl[lite]'
"$target/bin/icmoe-fl" --version
