# Sourced by scripts/check and scripts/test: `step NAME COMMAND...` runs one step,
# says how long it took, and ends the script with the step's name if it fails.

# One thread per process: tests start many, and results are the same on every machine.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
export TOKENIZERS_PARALLELISM=false
# Tests never ask a hub for anything.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export PATH="$PWD/.venv/bin:$PATH"

if [ ! -x .venv/bin/ruff ]; then
    echo "$0: the tools are not installed; run: scripts/install --dev" >&2
    exit 1
fi

step() {
    local name=$1 started=$SECONDS status=0
    shift
    echo "== $name: $*"
    "$@" || status=$?
    if [ "$status" -ne 0 ]; then
        echo "== FAILED: $name (exit $status, $((SECONDS - started)) s)" >&2
        exit "$status"
    fi
    echo "== ok: $name ($((SECONDS - started)) s)"
}
