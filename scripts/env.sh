# Sourced by the other scripts: leaves $PYTHON, an interpreter with requirements.txt installed in the versions of
# constraints.txt, in .venv unless $NARVID_PYTHON names one of yours (then nothing is installed). Needs Python 3.10 or
# newer and a package index.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -n "${NARVID_PYTHON:-}" ]; then
    PYTHON=$NARVID_PYTHON
else
    PYTHON=.venv/bin/python
    wanted=$(cat requirements.txt constraints.txt | cksum)
    if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
        for base in python3 python3.13 python3.12 python3.11 python3.10 none; do
            "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
        done
        if [ "$base" = none ]; then
            echo "error: NarVid needs Python 3.10 or newer; none of python3, python3.10 .. python3.13 is" >&2
            exit 1
        fi
        echo "== setting up .venv with $("$base" --version) (once; torch with CUDA is about 5 GB)"
        "$base" -m venv .venv || {
            echo "error: $base cannot make a virtual environment; install its venv module (Debian: python3-venv)" >&2
            exit 1
        }
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
        # Where PYTHONDONTWRITEBYTECODE is set, as in many containers, every start would compile torch anew: 6 s.
        .venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true # templates among it are no Python
        echo "$wanted" > .venv/installed # last: an interrupted installation is taken up again
    fi
fi
