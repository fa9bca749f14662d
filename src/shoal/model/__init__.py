"""Block spans of transformers models: where weights come from, how a span is built and run.

`source.py` opens a model (directory, GGUF file, known name, hub id), `manifest.py` names it by a
hash, `span_model.py` builds the blocks of a span and nothing else, `torch_backend.py` runs
them for many sequences behind `shoal.base.backend.BlockBackend`. torch lives here and in
`shoal.hf` only. No network but downloads of whole models
(`known.py`, `hub.py`), no sessions, no routing. Start reading at `source.py`.
"""
