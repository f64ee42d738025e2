"""The language model on llama.cpp: prompts of text, tokens and embeddings, sampling, beams, ranking, and its GGUF file."""
