"""Talking to an assistant: one page and an API on this machine, and a prompt in the terminal. Cannot start training."""
