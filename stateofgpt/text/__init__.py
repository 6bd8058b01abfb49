"""Text to tokens and back: the tokenizer, and the chat format. Knows nothing of models, data sets or runs."""
