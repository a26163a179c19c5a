"""Search your own videos by sentence: `python -m narvid.search index | query | serve`.

  database.py    one SQLite file: locks, threads, transactions, its errors in words
  store.py       the index on disk: what lies in that file, a transaction a video file
  speech_store.py   what is said in the files, in the same database
  speech_sources.py  subtitles beside and inside the files, and their sound -> that
  speech.py      what is said as a third view of a search
  milvus_store.py  the same in Milvus, for many machines: what lies in which collection, the order of writing
                 milvus.py: connections, rows, errors in words; milvus_lease.py: one writer; milvus_stage.py: stage
                 one; milvus_speech.py: what is said
  embedding.py   what a search asks of a model (narvid.Retriever): features, scores, vectors, "more like this"
  stage_one.py   nearest vectors among very many (FAISS)
  statistics.py  what scores are compared with: for Eq. 11, and what nonsense reaches; neutral.txt: queries for it
  parts.py       a query of parts: texts, pictures, clips, windows, signs and weights
  engine.py      query -> candidates (stage one) -> exact scores (stage two, evaluation's own functions) -> answers
  answers.py     an answer: a file with its best moment, in words, and why
  folders.py     the folders of an index, where a file lies
  reading.py     which files, windows; worker processes without torch
  spool.py       a file read by such a process: its frames wait on disk
  sentences.py   the sentences of frames: a captioner, a narration file, or none
  build.py       folder of files -> index; goes on where it stopped, notices what has changed
  server.py      which address answers what (page/: the page), and a server that runs
  site.py        answers and pictures as JSON; asked.py: what a request may say
  watching.py    clips over HTTP
  serving.py     a running server and the commands of its machine
  guard.py       who may ask the server: hosts, password
  clips.py       which files a browser plays, stretches of others on their way, the folder of made ones
  preview.py     a stretch of a file as an mp4 that plays while it is made
  __main__.py    the flags

Nothing is imported here before it is asked for, so that a worker process that decodes needs no torch. For programs:
`from narvid.search import Client` asks a running server, and needs no torch either.
"""

__all__ = ["Client"]


def __getattr__(name: str):
    if name == "Client":
        from narvid.search.serving import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
