"""stateofgpt raises a GPT assistant from raw text to RLHF, serves it, and lets its users' thumbs raise the next one."""

__version__ = "0.1.0"
