#!/usr/bin/env bash
# Caption the frames of a folder: bash scripts/narrate.sh FRAMES OUT [flags of python -m narvid.narration narrate]
#
#   bash scripts/narrate.sh data/msrvtt/frames data/msrvtt/narrations.jsonl                        LLaVA 1.5 7B, prompt C
#   bash scripts/narrate.sh FRAMES OUT --server http://localhost:8000/v1 --model NAME              a server's model
#
# One process a GPU of this machine; NPROC=n for another number. Several machines: a Slurm array of this command, or
# --shard i/n on each, with the folders on a shared disk. Stopped at any moment, the same command continues.
# Paths are seen from the repository's top folder. What transformers needs is installed once; a server needs none of it.
set -euo pipefail
source "$(dirname "$0")/env.sh"
frames=${1:?the folder of extracted frames} out=${2:?the narration file to write}
shift 2
case " $* " in
    *" --server "* | *" --server="* | *" --merge "*) model= ;;
    *) model=here ;;
esac
if [ -n "$model" ] && [ -z "${NARVID_PYTHON:-}" ] && ! "$PYTHON" -c 'import sys, importlib.util as i
sys.exit(not all(i.find_spec(m) for m in ("transformers", "accelerate")))'; then
    echo "== installing the captioners' packages into .venv (once)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -e '.[captioners]'
fi
processes=1
[ -z "$model" ] || processes=${NPROC:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
launch=()
if [ "$processes" -gt 1 ]; then
    launch=(-m torch.distributed.run --standalone --nproc_per_node "$processes")
fi
"$PYTHON" "${launch[@]}" -m narvid.narration narrate --frames "$frames" --out "$out" "$@"
