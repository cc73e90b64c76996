#!/usr/bin/env bash
# The first minutes of a newcomer: from an empty folder and a wheel to a verdict on five checkpoints of five sources.
#
#     make wheel && tests/first_minutes.sh dist/qswin-*.whl
#
# The wheel's dependencies are those of the Python that PYTHON names (default: python). Prints seconds and commands.
set -euo pipefail
wheel=$(realpath "$1")
checkout=$(realpath "$(dirname "$0")/..")
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

commands=0
start=$SECONDS
run() {
    echo "\$ qswin $*" >&2
    "$python" -m qswin "$@"
    commands=$((commands + 1))
}

"$python" -m pip install --quiet --no-deps --no-index --target site "$wheel"
(cd "$checkout" && "$python" -m tests.first_checkpoints "$work/new")
echo "photos and checkpoints made: $((SECONDS - start)) s"

export PYTHONPATH=$work/site PYTHONSAFEPATH=1 # from here on qswin is that of the wheel
"$python" -c 'import qswin, sys; sys.exit(not qswin.__file__.startswith(sys.argv[1]))' "$work/site"
for weights in new/weights/*; do
    before=$SECONDS
    run quantize --model "$weights" --data new/photos -o "runs/$(basename "$weights" .pth)" device=cpu >said.txt
    cat said.txt
    grep -q 'the same class for' said.txt
    echo "$(basename "$weights"): $((SECONDS - before)) s from weights to a verdict, one command"
done
test "$(find runs -name int8.onnx | wc -l)" = 5
test "$(find runs -name report.html | wc -l)" = 5
echo "five checkpoints: $((SECONDS - start)) s, $commands commands"
