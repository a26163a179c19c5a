#!/usr/bin/env bash
# NarVid end to end on a corpus that the project makes itself: bash scripts/demo.sh [flags of main_task_retrieval.py]
#
# Walks the path of a real corpus: videos and official annotation files -> prepare -> frames -> narrations -> train the
# towers and NarVid from scratch -> evaluate. Every step skips what is done, so it can be run again cheaply; delete demo/
# and runs/demo to start over.
set -euo pipefail
source "$(dirname "$0")/env.sh"
start=$SECONDS

echo "== 1/5 videos and annotations in MSR-VTT's formats -> demo/"
"$PYTHON" scripts/make_demo_corpus.py videos --out demo
echo "== 2/5 prepare: annotations -> demo/{train,test}.jsonl (the counts are not MSR-VTT's, hence --allow_partial)"
"$PYTHON" data/prepare_msrvtt.py --annotations demo/annotations --protocol 9k --allow_partial --videos demo/videos --out demo
echo "== 3/5 frames: one a second -> demo/frames/"
"$PYTHON" scripts/extract_frames.py --videos demo/videos --out demo/frames
echo "== 4/5 narrations: an imperfect captioner, one sentence a frame -> demo/narrations.jsonl"
"$PYTHON" scripts/make_demo_corpus.py narrate --out demo --frames demo/frames
echo "== 5/5 train and evaluate -> runs/demo/"
"$PYTHON" main_task_retrieval.py --config configs/demo.yaml --output_dir runs/demo --resume auto "$@"
echo "== done in $((SECONDS - start)) s after the set-up"
cat <<END
== search these videos with this model:
   $PYTHON -m narvid.search index demo/videos --out demo/index --checkpoint runs/demo --narrations demo/narrations.jsonl
   $PYTHON -m narvid.search query demo/index "a red star grows, and later a blue square flashes"
   $PYTHON -m narvid.search serve demo/index
END
