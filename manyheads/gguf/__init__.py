"""GGUF files, as llama.cpp and its family keep models: one file with metadata, a tokenizer and blocks of numbers."""
