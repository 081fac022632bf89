"""One short script for each classic use, against a served system; each checks itself against transformers.

`make examples` serves a model for each and runs them all; one by one they take the address of any system:

    python -m tests.examples.translate --address gateway:50051 --key tr_... --model Helsinki-NLP/opus-mt-en-de

`--model` is what the worker was given (a directory or a Hub id): the reference is computed from it. `--name` is the
name that it is served under, by default the last part of `--model`.
"""
