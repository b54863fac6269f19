# Makes the virtual environment .venv with autoseg in it, and activates it. Sourced by the other scripts:
#     source scripts/environment.sh EXTRAS
# where EXTRAS is empty or a list of extras such as "test".

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Error: found no Python 3.10 or newer. Install one from your system's packages and run this again." >&2
    return 1
}

python=$(find_python) || exit 1
if [ ! -x .venv/bin/python ]; then
    "$python" -m venv .venv || {
        echo "Error: $python cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    }
fi
source .venv/bin/activate

# Without an NVIDIA driver, the version of which pip may find a build for CPUs: the other brings gigabytes for nothing.
constraints=(--constraint scripts/constraints-tools.txt)
if ! command -v nvidia-smi >/dev/null; then
    constraints+=(--constraint scripts/constraints-cpu.txt)
fi
python -m pip install --quiet --disable-pip-version-check "${constraints[@]}" --editable ".${1:+[$1]}"
