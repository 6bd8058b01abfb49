"""Models made elsewhere become folders of ours: GGUF files, llama2.c files, and folders of the Hugging Face hub."""
