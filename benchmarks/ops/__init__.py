"""One module per op: `bench_<op>.py`. README.md says what such a module gives."""
